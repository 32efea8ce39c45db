"""Files of data that tests make: pictures, archives, pickles, and the checksums that pass them off as official ones."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from python2 import python2_pickle

from diffopt.tasks import DataError, sample_episodes
from diffopt.tasks.data import KnownFile

PICKLES = {
    "python 2": python2_pickle,
    "protocol 2": partial(pickle.dumps, protocol=2),
    "protocol 5": partial(pickle.dumps, protocol=5),
}
SHORT = {"train": "train", "validation": "val", "test": "test"}
CALL = b"\x80\x02cposix\nsystem\nU\x04true\x85R."  # a pickle that runs a command


def refused(message: str, kind: type[Exception] = DataError) -> Any:
    """Within it, an error must say so."""
    return pytest.raises(kind, match=message)


def refuses(
    message: str, call: Callable[..., Any], *given: Any, kind: type[Exception] = DataError, **options: Any
) -> None:
    """The call must end in an error that says so."""
    with refused(message, kind):
        call(*given, **options)


@contextmanager
def little_memory(limit: int) -> Iterator[None]:
    """Within it, no more than so many bytes may be taken."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def assert_holds(loaded: Any, expected: Mapping[str, np.ndarray], *sources: str) -> None:
    """It holds these classes and images ``[examples, 3, ...]``, from these files; and episodes are drawn from it."""
    assert loaded.class_names == tuple(expected)
    assert loaded.sources == sources
    for images, wanted in zip(loaded.images, expected.values(), strict=True):
        assert images.dtype == torch.uint8
        assert np.array_equal(images.numpy(), wanted)
    drawn = sample_episodes(loaded.images, way=1, shot=1, query=1, tasks=3, generator=torch.Generator())
    assert drawn.query_inputs.shape == (3, 1, *loaded.images[0].shape[1:])


def nearest_neighbours(images: Any, shot: int) -> float:
    """The accuracy of the nearest neighbour in pixels, on 600 episodes of five classes."""
    generator = torch.Generator().manual_seed(0)
    episodes = sample_episodes(images, way=5, shot=shot, query=15, tasks=600, generator=generator)
    distance = torch.cdist(episodes.query_inputs.flatten(2), episodes.support_inputs.flatten(2))
    nearest = episodes.support_targets.gather(1, distance.argmin(dim=2))
    return float((nearest == episodes.query_targets).float().mean())


def cut_short(path: Path) -> Iterator[None]:
    """The file again and again, cut at several places; whole at the end."""
    whole = path.read_bytes()
    for end in (0, 1, 10, len(whole) // 10, len(whole) // 2, len(whole) - len(whole) // 20):
        path.write_bytes(whole[:end])
        yield
    path.write_bytes(whole)


def known(path: Path, folder: Path | None = None) -> KnownFile:
    """The file as one that is known by its size and SHA-256."""
    content = path.read_bytes()
    name = str(path.relative_to(folder or path.parent))
    return KnownFile(name, len(content), hashlib.sha256(content).hexdigest())


def encoded(image: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    """A picture as a file holds it."""
    content = io.BytesIO()
    Image.fromarray(image).save(content, format=form, **options)
    return content.getvalue()


def brought(image: np.ndarray, size: int) -> np.ndarray:
    """The picture at another size, by Pillow's antialiased bilinear filter."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def triangle(size: int, target: int) -> np.ndarray:
    """The weights of an antialiased triangle filter along one axis, written out."""
    scale = size / target
    centres = (np.arange(target) + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(size) + 0.5 - centres[:, None]) / max(scale, 1.0))
    return weights / weights.sum(axis=1, keepdims=True)


def write_tar(path: Path, members: Mapping[str, bytes | dict[str, Any]], mode: str = "w:gz") -> Path:
    """An archive: of each member its content, or the fields of one that is no plain file."""
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            entry, fields = tarfile.TarInfo(name), content if isinstance(content, dict) else {"size": len(content)}
            for field, value in fields.items():
                setattr(entry, field, value)
            archive.addfile(entry, io.BytesIO(b"" if isinstance(content, dict) else content))
    return path


def write_zip(path: Path, members: Mapping[str, bytes]) -> Path:
    """A zip of files."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path
