"""Reading Omniglot: from an archive drawn here, and from the real files where they are."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import encoded, known, nearest_neighbours, refuses, triangle, write_zip

from diffopt.tasks import Omniglot, omniglot
from diffopt.tasks import data_folder as find_data_folder

NAMES = (("Greek", "character01"), ("Greek", "character02"), ("N_Ko", "character01"))
INK = np.random.default_rng(3).random((3, 4, 105, 105)) < 0.2
"""Of each of these characters, the drawings of four drawers."""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A zip in the official layout; members in no useful order, with the clutter that zips have."""
    members = dict.fromkeys(["images_background/Greek/.DS_Store", "__MACOSX/images_background/._Greek"], b"clutter")
    members["images_background/"] = b""
    for row, (alphabet, character) in reversed(list(enumerate(NAMES))):
        for drawer in (2, 0, 3, 1):
            name = f"images_background/{alphabet}/{character}/{row + 1:04}_{drawer + 1:02}.png"
            members[name] = encoded(~INK[row, drawer])  # one bit per pixel, 0 is ink
    return write_zip(tmp_path_factory.mktemp("omniglot") / "images_background.zip", members)


@pytest.fixture
def folder(drawn, monkeypatch):
    """Where the drawn archive lies, passed off as the official one: its size and SHA-256 are the expected ones."""
    monkeypatch.setattr(omniglot, "BACKGROUND", known(drawn))
    return drawn.parent


UNEVEN = ["x/A/character02/1_1.png", "x/A/character02/1_2.png"]
BLANK = encoded(np.ones((105, 105), dtype=bool))


def test_drawings_are_inverted_and_shrunk(drawn):
    loaded = Omniglot.from_archives([drawn])
    expected = triangle(105, 28) @ (255.0 * INK) @ triangle(105, 28).T
    assert loaded.images.dtype == torch.uint8
    assert loaded.images.shape == (3, 4, 28, 28)
    # Pillow rounds to whole grey levels after each of its two passes.
    assert np.abs(loaded.images.numpy() - expected).max() <= 1.01
    assert tuple(zip(loaded.alphabets, loaded.characters, strict=True)) == NAMES
    assert loaded.sources == ("images_background.zip",)


def test_load_finds_the_archive_and_its_rotations(folder):
    plain = Omniglot.load(folder, split="background")
    turned = Omniglot.load(folder, split="background", rotations=True)
    assert turned.images.shape == (12, 4, 28, 28)
    for quarter in range(4):
        expected = np.rot90(plain.images.numpy(), quarter, axes=(2, 3))
        assert np.array_equal(turned.images[3 * quarter : 3 * quarter + 3].numpy(), expected)
    assert turned.alphabets == plain.alphabets * 4
    assert turned.characters[:4] == (*plain.characters, "character01 rotated 90")
    assert len(set(zip(turned.alphabets, turned.characters, strict=True))) == 12


def test_archives_that_agree_are_joined_and_others_refused(drawn, tmp_path):
    once = Omniglot.from_archives([drawn])
    assert torch.equal(Omniglot.from_archives([drawn, drawn]).images, once.images)
    other = write_zip(tmp_path / "other.zip", {f"x/Greek/character01/0001_{i:02}.png": BLANK for i in range(4)})
    refuses("Greek/character01 with other drawings than an earlier zip", Omniglot.from_archives, [drawn, other])
    added = write_zip(tmp_path / "added.zip", {f"x/Arcadian/character07/0001_{i:02}.png": BLANK for i in range(4)})
    joined = Omniglot.from_archives([drawn, added])
    assert joined.alphabets == ("Arcadian", "Greek", "Greek", "N_Ko")
    assert torch.equal(joined.images[1:], once.images)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"x/A/character01/0001_01.png": encoded(np.ones((28, 28), dtype=bool))}, "is 28x28 pixels, expected 105x105"),
        (dict.fromkeys(["x/A/character01/1_1.png", *UNEVEN], BLANK), r"have \[1, 2\] drawings"),
    ],
)
def test_archives_of_another_layout_are_refused(members, message, tmp_path):
    refuses(message, Omniglot.from_archives, [write_zip(tmp_path / "some.zip", members)])


def test_the_data_folder_is_argument_then_variable_then_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("DIFFOPT_DATA", "~/named")
    assert find_data_folder("~/given") == tmp_path / "given"
    assert find_data_folder() == tmp_path / "named"
    monkeypatch.setenv("DIFFOPT_DATA", "")
    assert find_data_folder() == tmp_path / ".cache" / "diffopt"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert find_data_folder() == Path("/elsewhere/diffopt")


@pytest.mark.data
def test_real_splits_have_the_published_sizes(data_folder):
    vinyals = {"vinyals-train": 1028, "vinyals-validation": 172, "vinyals-test": 423}
    sizes = {"background": 964, "evaluation": 659, **vinyals}
    loaded = {split: Omniglot.load(data_folder, split=split) for split in sizes}
    assert {split: len(one.images) for split, one in loaded.items()} == sizes
    for one in loaded.values():
        assert one.images.shape[1:] == (20, 28, 28)
        assert len(set(zip(one.alphabets, one.characters, strict=True))) == len(one.images)
    background, evaluation = (set(loaded[split].alphabets) for split in ("background", "evaluation"))
    assert (len(background), len(evaluation)) == (30, 20)
    assert background.isdisjoint(evaluation)
    assert loaded["background"].images.float().mean() < 60, "paper is 0 and most of a drawing is paper"


@pytest.mark.data
def test_real_archives_decode_to_the_rows_of_the_single_file(data_folder, tmp_path):
    small = [f"images_background_small{number}.zip" for number in (1, 2)]
    shutil.copy(data_folder / small[1], tmp_path)
    assert Omniglot.load(tmp_path, split="background").sources == (small[1],)
    shutil.copy(data_folder / small[0], tmp_path)
    decoded = Omniglot.load(tmp_path, split="background")
    assert decoded.sources == tuple(small)
    assert len(set(decoded.alphabets)) == 8
    whole = Omniglot.load(data_folder, split="background")
    assert whole.sources == ("omniglot_28.npz",)
    names = list(zip(whole.alphabets, whole.characters, strict=True))
    rows = [names.index(name) for name in zip(decoded.alphabets, decoded.characters, strict=True)]
    assert rows == sorted(rows), "both come in the same order"
    assert torch.equal(decoded.images, whole.images[rows])


@pytest.mark.data
def test_nearest_neighbours_on_real_episodes_score_as_measured(data_folder):
    images = Omniglot.load(data_folder, split="evaluation").images
    # Measured by a separate program: 45.4 +- 0.8 % over 600 episodes; twice that for the difference of two draws.
    assert nearest_neighbours(images, 1) == pytest.approx(0.454, abs=0.016)


@pytest.mark.data
def test_the_checksum_takes_a_moment(data_folder):
    start = time.process_time()
    omniglot.SINGLE_FILE.read(data_folder)
    assert time.process_time() - start < 0.5  # seconds of this process; measured 0.01
