"""CIFAR-FS and FC100 from a small archive in the official format, made here as Python 2 wrote it."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from python2 import python2_pickle

from diffopt.tasks import CIFARFS, FC100, DataError, ProblemError, cifar100, sample_episodes
from diffopt.tasks.class_lists import superclasses
from diffopt.tasks.data import KnownFile

SUPERCLASS = {name: superclass for superclass, names in superclasses().items() for name in names}
NAMES = sorted(SUPERCLASS)
COARSE = sorted(superclasses())
TRAIN, TEST = 3, 1  # of each class; officially 500 and 100


class Made:
    """The tables of a small CIFAR-100, its pixels random; ``images[name]`` are those of a class in their order."""

    def __init__(self, seed: int = 0):
        generator = np.random.default_rng(seed)
        self.images: dict[str, list[np.ndarray]] = {name: [] for name in NAMES}
        self.tables = {"meta": {"fine_label_names": NAMES, "coarse_label_names": COARSE}}
        for half, count in (("train", TRAIN), ("test", TEST)):
            labels = generator.permutation(np.repeat(np.arange(100), count)).tolist()
            data = generator.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
            for label, row in zip(labels, data, strict=True):
                self.images[NAMES[label]].append(row.reshape(3, 32, 32))  # red, green, blue; row by row
            self.tables[half] = {
                "filenames": [f"{NAMES[label]}_s_{place:06}.png" for place, label in enumerate(labels)],
                "batch_label": f"{half}ing batch 1 of 1",
                "fine_labels": labels,
                "coarse_labels": [COARSE.index(SUPERCLASS[NAMES[label]]) for label in labels],
                "data": data,
            }

    def write(self, path: Path, dump=python2_pickle) -> Path:
        """The archive, with the clutter that the official one has."""
        with tarfile.open(path, "w:gz") as archive:
            folder = tarfile.TarInfo("cifar-100-python")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            for name, content in [("file.txt~", b""), *((name, dump(self.tables[name])) for name in self.tables)]:
                entry = tarfile.TarInfo(f"cifar-100-python/{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
        return path


@pytest.fixture(scope="module")
def made():
    return Made()


@pytest.fixture(scope="module")
def archive(made, tmp_path_factory):
    return made.write(tmp_path_factory.mktemp("cifar") / "cifar-100-python.tar.gz")


SPLITS = [
    (CIFARFS, "train", 64),
    (CIFARFS, "validation", 16),
    (CIFARFS, "test", 20),
    (FC100, "train", 60),
    (FC100, "validation", 20),
    (FC100, "test", 20),
]


@pytest.mark.parametrize(("data_set", "split", "classes"), SPLITS)
def test_every_image_is_where_it_belongs(data_set, split, classes, archive, made):
    loaded = data_set.from_archive(archive, split=split)
    assert loaded.images.dtype == torch.uint8
    assert loaded.images.shape == (classes, TRAIN + TEST, 3, 32, 32)
    assert loaded.class_names == tuple(sorted(loaded.class_names))
    assert loaded.sources == ("cifar-100-python.tar.gz",)
    for name, images in zip(loaded.class_names, loaded.images, strict=True):
        assert np.array_equal(images.numpy(), np.stack(made.images[name]))


@pytest.mark.parametrize("data_set", [CIFARFS, FC100])
def test_the_splits_share_no_class_and_fc100_no_superclass(data_set, archive):
    names = [set(data_set.from_archive(archive, split=split).class_names) for split in ("train", "validation", "test")]
    assert len(set.union(*names)) == sum(map(len, names)) == 100
    if data_set is FC100:
        above = [{SUPERCLASS[name] for name in one} for one in names]
        assert [len(one) for one in above] == [12, 4, 4]
        assert len(set.union(*above)) == 20


@pytest.mark.parametrize("protocol", [2, 5])
def test_pickles_of_python_3_are_read_alike(protocol, archive, made, tmp_path):
    path = made.write(tmp_path / "again.tar.gz", lambda table: pickle.dumps(table, protocol))
    expected = CIFARFS.from_archive(archive, split="test")
    assert torch.equal(CIFARFS.from_archive(path, split="test").images, expected.images)


def test_images_are_brought_to_a_size(archive, made):
    loaded = FC100.from_archive(archive, split="test", size=16)
    assert loaded.images.shape[2:] == (3, 16, 16)
    picture = Image.fromarray(np.moveaxis(made.images[loaded.class_names[3]][2], 0, 2))
    expected = np.asarray(picture.resize((16, 16), Image.Resampling.BILINEAR))
    assert np.array_equal(loaded.images[3, 2].permute(1, 2, 0).numpy(), expected)


def test_episodes(archive, generator):
    images = CIFARFS.from_archive(archive, split="validation").images
    episodes = sample_episodes(images, way=5, shot=1, query=3, tasks=2, generator=generator)
    assert episodes.support_inputs.shape == (2, 5, 3, 32, 32)
    with pytest.raises(DataError, match=r"shot . query is 2 . 3, expected at most 4; a class has only 4 images"):
        sample_episodes(images, way=5, shot=2, query=3, tasks=2, generator=generator)
    with pytest.raises(DataError, match="way is 17, expected at most 16; there are only 16 classes"):
        sample_episodes(images, way=17, shot=1, query=3, tasks=2, generator=generator)


def test_load_takes_the_archive_or_what_was_extracted(archive, made, monkeypatch, tmp_path):
    content = archive.read_bytes()
    known = KnownFile(archive.name, len(content), hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(cifar100, "ARCHIVE", known)
    expected = CIFARFS.from_archive(archive, split="test")
    assert torch.equal(CIFARFS.load(archive.parent, split="test").images, expected.images)

    pieces = []
    for name, table in made.tables.items():
        piece = tmp_path / "cifar-100-python" / name
        piece.parent.mkdir(exist_ok=True)
        piece.write_bytes(python2_pickle(table))
        pieces.append(KnownFile(f"cifar-100-python/{name}", None, md5=hashlib.md5(piece.read_bytes()).hexdigest()))
    monkeypatch.setattr(cifar100, "EXTRACTED", tuple(pieces))
    extracted = CIFARFS.load(tmp_path, split="test")
    assert torch.equal(extracted.images, expected.images)
    assert extracted.sources == tuple(f"cifar-100-python/{name}" for name in ("meta", "train", "test"))
    (tmp_path / "cifar-100-python" / "test").write_bytes(b"other")
    with pytest.raises(DataError, match=r"test has MD5 \w+, expected \w+; .*download it again"):
        CIFARFS.load(tmp_path, split="test")


def test_the_official_archive_is_known_by_size_and_checksum(tmp_path):
    path = tmp_path / "cifar-100-python.tar.gz"
    path.write_bytes(b"cut short")
    with pytest.raises(DataError, match=r"has 9 bytes, expected 169,001,437; the download was cut short"):
        CIFARFS.load(tmp_path, split="train")
    with path.open("wb") as file:
        file.truncate(169_001_437)  # a hole: takes no room
    with pytest.raises(DataError, match=r"has SHA-256 \w+, expected 85cd44d02ba6"):
        FC100.load(tmp_path, split="train")


def test_missing_data_says_what_to_do(tmp_path):
    for data_set, name in ((CIFARFS, "CIFAR-FS"), (FC100, "FC100")):
        with pytest.raises(DataError, match=f"no {name} data for split 'test' in .*: it has none of the") as error:
            data_set.load(tmp_path, split="test")
        for part in (str(tmp_path), "expected cifar-100-python.tar.gz", "www.cs.toronto.edu", "--data-dir"):
            assert part in str(error.value)
        with pytest.raises(DataError, match="there is no such folder"):
            data_set.load(tmp_path / "absent", split="test")
        with pytest.raises(DataError, match="split is 'val', expected one of train, validation, test"):
            data_set.load(tmp_path, split="val")
        with pytest.raises(DataError, match="split is 'val'"):
            data_set.from_archive(tmp_path / "absent", split="val")
        with pytest.raises(ProblemError, match="size is 0"):
            data_set.load(tmp_path, split="test", size=0)
        with pytest.raises(DataError, match=r"absent\.tar\.gz cannot be read"):
            data_set.from_archive(tmp_path / "absent.tar.gz", split="test")


def without(table, key):
    return {name: value for name, value in table.items() if name != key}


BROKEN = {
    "wrong shape": (
        "train",
        lambda t: t | {"data": t["data"][:, :3071]},
        r"uint8 of shape \(300, 3071\), expected uint8",
    ),
    "wrong dtype": ("test", lambda t: t | {"data": t["data"].astype(np.int32)}, "test has data int32"),
    "no data": ("train", lambda t: without(t, "data"), "train has the keys 'filenames', .* expected 'data' among them"),
    "cifar-10": ("train", lambda t: without(t, "fine_labels") | {"labels": []}, "expected 'fine_labels' among them"),
    "too few labels": ("train", lambda t: t | {"fine_labels": [0] * 299}, r"300 images and labels of shape \(299,\)"),
    "a label beyond": ("train", lambda t: t | {"fine_labels": [100] * 300}, "labels from 100 to 100, expected 0 to 99"),
    "labels in words": ("train", lambda t: t | {"fine_labels": "apple"}, "fine_labels is a bytes, expected a numpy"),
    "one class too many": ("train", lambda t: t | {"fine_labels": [0] * 300}, "have .* images, expected as many .600."),
    "other classes": (
        "meta",
        lambda t: t | {"fine_label_names": ["cat"] * 10},
        "names 10 classes, expected the hundred",
    ),
    "a class too many": (
        "meta",
        lambda t: t | {"fine_label_names": [*t["fine_label_names"], "cat"]},
        "names 101 classes, expected the hundred",
    ),
    "no list": ("meta", lambda t: t | {"fine_label_names": 3}, "fine_label_names as int, expected a list"),
    "a list": ("meta", lambda t: [1, 2], "holds a list, expected a dictionary with the key 'fine_label_names'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_archives_of_another_content_are_refused(name, tmp_path):
    member, change, message = BROKEN[name]
    made = Made()
    made.tables[member] = change(made.tables[member])
    path = made.write(tmp_path / "broken.tar.gz")
    with pytest.raises(DataError, match=message):
        FC100.from_archive(path, split="train")


def test_archives_cut_short_or_without_a_file_are_refused(archive, made, tmp_path):
    content = archive.read_bytes()
    path = tmp_path / "cut.tar.gz"
    for end in (0, 1, 10, len(content) // 10, len(content) // 2, len(content) - len(content) // 20):
        path.write_bytes(content[:end])
        with pytest.raises(DataError, match="cut short"):
            CIFARFS.from_archive(path, split="train")
    less = Made()
    del less.tables["meta"]
    with pytest.raises(DataError, match="has no file cifar-100-python/meta"):
        CIFARFS.from_archive(less.write(tmp_path / "less.tar.gz"), split="train")


def test_a_pickle_within_the_archive_that_calls_is_refused(made, tmp_path):
    mark = tmp_path / "mark"

    class Touches:
        def __reduce__(self):
            return Path.touch, (mark,)

    path = made.write(tmp_path / "evil.tar.gz", lambda table: pickle.dumps({"fine_label_names": Touches()}))
    with pytest.raises(DataError, match=r"evil\.tar\.gz: cifar-100-python/meta names '(pathlib|builtins|os)"):
        CIFARFS.from_archive(path, split="train")
    assert not mark.exists()
