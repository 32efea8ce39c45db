"""Where the tests of the tasks find data: the real files if they are there, and a small archive drawn here."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image


class DrawnArchive(NamedTuple):
    """A zip in the official Omniglot layout, and the ink that was drawn, bool [characters, drawers, 105, 105]."""

    path: Path
    names: tuple[tuple[str, str], ...]
    ink: np.ndarray


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20)


@pytest.fixture(scope="session")
def drawn_archive(tmp_path_factory: pytest.TempPathFactory) -> DrawnArchive:
    """Two alphabets, three characters, four drawers; members in no useful order, with the clutter that zips have."""
    names = (("Greek", "character01"), ("Greek", "character02"), ("N_Ko", "character01"))
    ink = np.random.default_rng(3).random((3, 4, 105, 105)) < 0.2
    path = tmp_path_factory.mktemp("omniglot") / "images_background.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images_background/", "")
        archive.writestr("__MACOSX/images_background/._Greek", "clutter")
        archive.writestr("images_background/Greek/.DS_Store", "clutter")
        for row, (alphabet, character) in reversed(list(enumerate(names))):
            for drawer in (2, 0, 3, 1):
                content = io.BytesIO()
                Image.fromarray(~ink[row, drawer]).save(content, format="PNG")  # one bit per pixel, 0 is ink
                member = f"images_background/{alphabet}/{character}/{row + 1:04}_{drawer + 1:02}.png"
                archive.writestr(member, content.getvalue())
    return DrawnArchive(path, names, ink)
