"""Reading Omniglot: from an archive drawn here, and from the real files where they are."""

from __future__ import annotations

import hashlib
import io
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffopt.tasks import DataError, Omniglot, omniglot, sample_episodes
from diffopt.tasks import data_folder as find_data_folder
from diffopt.tasks.data import KnownFile


@pytest.fixture
def known_archive(drawn_archive, monkeypatch):
    """The drawn archive, passed off as the official one: its size and SHA-256 are the expected ones."""
    content = drawn_archive.path.read_bytes()
    known = KnownFile(drawn_archive.path.name, len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(omniglot, "BACKGROUND", known)
    return drawn_archive


def shrunk(ink):
    """The recipe of the 28x28 images on one drawing: an antialiased triangle filter, written out in numpy."""
    scale = 105 / 28
    centres = (np.arange(28) + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(105) + 0.5 - centres[:, None]) / scale)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights @ (255.0 * ink) @ weights.T


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def png(size=(105, 105), ink=0):
    content = io.BytesIO()
    Image.new("1", size, 1 - ink).save(content, format="PNG")
    return content.getvalue()


def test_drawings_are_inverted_and_shrunk(drawn_archive):
    loaded = Omniglot.from_archives([drawn_archive.path])
    expected = np.stack([[shrunk(one) for one in row] for row in drawn_archive.ink])
    assert loaded.images.dtype == torch.uint8
    assert loaded.images.shape == (3, 4, 28, 28)
    # Pillow rounds to whole grey levels after each of its two passes.
    assert np.abs(loaded.images.numpy() - expected).max() <= 1.01
    assert tuple(zip(loaded.alphabets, loaded.characters, strict=True)) == drawn_archive.names
    assert loaded.sources == ("images_background.zip",)


def test_load_finds_the_archive_and_its_rotations(known_archive):
    plain = Omniglot.load(known_archive.path.parent, split="background")
    turned = Omniglot.load(known_archive.path.parent, split="background", rotations=True)
    assert turned.images.shape == (12, 4, 28, 28)
    for quarter in range(4):
        expected = np.rot90(plain.images.numpy(), quarter, axes=(2, 3))
        assert np.array_equal(turned.images[3 * quarter : 3 * quarter + 3].numpy(), expected)
    assert turned.alphabets == plain.alphabets * 4
    assert turned.characters[:4] == (*plain.characters, "character01 rotated 90")
    assert len(set(zip(turned.alphabets, turned.characters, strict=True))) == 12


def test_images_make_episodes(known_archive, generator):
    images = Omniglot.load(known_archive.path.parent, split="background").images
    episodes = sample_episodes(images, way=3, shot=1, query=2, tasks=5, generator=generator)
    assert episodes.query_inputs.shape == (5, 6, 1, 28, 28)
    assert 0 <= episodes.query_inputs.min() < episodes.query_inputs.max() <= 1


def test_archives_that_agree_are_joined_and_others_refused(drawn_archive, tmp_path):
    once = Omniglot.from_archives([drawn_archive.path])
    twice = Omniglot.from_archives([drawn_archive.path, drawn_archive.path])
    assert torch.equal(once.images, twice.images)
    other = write_zip(
        tmp_path / "other.zip", {f"x/Greek/character01/0001_{drawer:02}.png": png() for drawer in range(1, 5)}
    )
    with pytest.raises(DataError, match="Greek/character01 with other drawings than an earlier zip"):
        Omniglot.from_archives([drawn_archive.path, other])
    added = write_zip(
        tmp_path / "added.zip", {f"x/Arcadian/character07/0001_{drawer:02}.png": png() for drawer in range(4)}
    )
    joined = Omniglot.from_archives([drawn_archive.path, added])
    assert joined.alphabets == ("Arcadian", "Greek", "Greek", "N_Ko")
    assert torch.equal(joined.images[1:], once.images)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"x/readme.txt": b"hello"}, "no drawings in"),
        ({"x/A/character01/0001_01.png": b"not a picture"}, "not a readable image"),
        ({"x/A/character01/0001_01.png": png((28, 28))}, "is 28x28 pixels, expected 105x105"),
        (
            {f"x/A/character{which}.png": png() for which in ("01/0001_01", "02/0002_01", "02/0002_02")},
            r"have \[1, 2\] drawings",
        ),
    ],
)
def test_archives_of_another_layout_are_refused(members, message, tmp_path):
    path = write_zip(tmp_path / "some.zip", members)
    with pytest.raises(DataError, match=message):
        Omniglot.from_archives([path])


def test_files_that_are_no_archives_are_refused(tmp_path):
    (tmp_path / "cut.zip").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(DataError, match=r"cut\.zip cannot be read .*, expected a zip"):
        Omniglot.from_archives([tmp_path / "cut.zip"])
    with pytest.raises(DataError, match=r"absent\.zip cannot be read .*No such file"):
        Omniglot.from_archives([tmp_path / "absent.zip"])


def test_a_wrong_size_and_a_wrong_checksum_are_refused(known_archive, tmp_path):
    content = known_archive.path.read_bytes()
    (tmp_path / "images_background.zip").write_bytes(content[:-1])
    with pytest.raises(DataError, match=rf"has {len(content) - 1:,} bytes, expected {len(content):,}.*again"):
        Omniglot.load(tmp_path, split="background")
    (tmp_path / "images_background.zip").write_bytes(content[:-1] + b"?")
    with pytest.raises(DataError, match=r"has SHA-256 .* expected .*download it again"):
        Omniglot.load(tmp_path, split="background")
    (tmp_path / "omniglot_28.npz").write_bytes(b"short")
    with pytest.raises(DataError, match=r"omniglot_28\.npz has 5 bytes, expected 5,524,973"):
        Omniglot.load(tmp_path, split="vinyals-test")


def test_missing_data_says_what_to_do(tmp_path, known_archive):
    with pytest.raises(DataError, match=r"there is no such folder.*images_background\.zip.*github") as error:
        Omniglot.load(tmp_path / "absent", split="background")
    for part in (str(tmp_path / "absent"), "omniglot_28.npz", "images_background_small1.zip", "--data-dir"):
        assert part in str(error.value)
    with pytest.raises(DataError, match=r"none of the accepted files.* or images_evaluation\.zip; put"):
        Omniglot.load(tmp_path, split="evaluation")
    with pytest.raises(DataError, match=r"expected omniglot_28\.npz; .*they do not know the Vinyals splits"):
        Omniglot.load(known_archive.path.parent, split="vinyals-train")
    with pytest.raises(DataError, match="split is 'train', expected one of background, evaluation, vinyals-"):
        Omniglot.load(tmp_path, split="train")
    (tmp_path / "images_evaluation.zip").mkdir()
    with pytest.raises(DataError, match=r"images_evaluation\.zip"):
        Omniglot.load(tmp_path, split="evaluation")


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
    sizes = {
        "background": 964,
        "evaluation": 659,
        "vinyals-train": 1028,
        "vinyals-validation": 172,
        "vinyals-test": 423,
    }
    loaded = {split: Omniglot.load(data_folder, split=split) for split in sizes}
    assert {split: len(one.images) for split, one in loaded.items()} == sizes
    for one in loaded.values():
        assert one.images.shape[1:] == (20, 28, 28)
        assert len(set(zip(one.alphabets, one.characters, strict=True))) == len(one.images)
    assert len(set(loaded["background"].alphabets)) == 30
    assert len(set(loaded["evaluation"].alphabets)) == 20
    assert set(loaded["background"].alphabets).isdisjoint(loaded["evaluation"].alphabets)
    assert loaded["background"].images.float().mean() < 60, "paper is 0 and most of a drawing is paper"


@pytest.mark.data
def test_real_archives_decode_to_the_rows_of_the_single_file(data_folder, tmp_path):
    for number in (1, 2):
        shutil.copy(data_folder / f"images_background_small{number}.zip", tmp_path)
    decoded = Omniglot.load(tmp_path, split="background")
    assert decoded.sources == ("images_background_small1.zip", "images_background_small2.zip")
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
    generator = torch.Generator().manual_seed(0)
    episodes = sample_episodes(images, way=5, shot=1, query=15, tasks=600, generator=generator)
    distance = torch.cdist(episodes.query_inputs.flatten(2), episodes.support_inputs.flatten(2))
    nearest = episodes.support_targets.gather(1, distance.argmin(dim=2))
    accuracy = (nearest == episodes.query_targets).float().mean()
    # Measured by a separate program: 45.4 +- 0.8 % over 600 episodes; twice that for the difference of two draws.
    assert float(accuracy) == pytest.approx(0.454, abs=0.016)


@pytest.mark.data
def test_the_checksum_takes_a_moment(data_folder):
    start = time.process_time()
    omniglot.SINGLE_FILE.read(data_folder)
    assert time.process_time() - start < 0.5  # seconds of this process; measured 0.01
