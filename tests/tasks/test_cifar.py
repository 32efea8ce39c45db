"""CIFAR-FS and FC100 from a small archive in the official format, made here as Python 2 wrote it."""

from __future__ import annotations

import pickle
import shutil
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import PICKLES, assert_holds, brought, cut_short, known, refuses, write_tar

from diffopt.tasks import CIFARFS, FC100, cifar100
from diffopt.tasks.class_lists import class_list, superclasses

SUPERCLASS = {name: superclass for superclass, names in superclasses().items() for name in names}
NAMES = sorted(SUPERCLASS)
COARSE = sorted(superclasses())
TRAIN, TEST = 3, 1  # of each class; officially 500 and 100


class Made:
    """The tables of a small CIFAR-100, its pixels random; ``images[name]`` are those of a class in their order."""

    def __init__(self):
        generator = np.random.default_rng(0)
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


MADE = Made()


def write(path, tables=MADE.tables, dump=PICKLES["python 2"]):
    """The archive, with the clutter that the official one has."""
    members = {"file.txt~": b"", **{name: dump(table) for name, table in tables.items()}}
    return write_tar(path, {f"cifar-100-python/{name}": content for name, content in members.items()})


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write(tmp_path_factory.mktemp("cifar") / "cifar-100-python.tar.gz")


SIZES = {CIFARFS: {"train": 64, "validation": 16, "test": 20}, FC100: {"train": 60, "validation": 20, "test": 20}}


@pytest.mark.parametrize(("data_set", "split"), [(data_set, split) for data_set in SIZES for split in SIZES[data_set]])
def test_every_image_is_where_it_belongs(data_set, split, archive):
    loaded = data_set.from_archive(archive, split=split)
    assert loaded.images.shape == (SIZES[data_set][split], TRAIN + TEST, 3, 32, 32)
    names = class_list("fc100" if data_set is FC100 else "cifar-fs", split)
    expected = {name: np.stack(MADE.images[name]) for name in names}
    assert_holds(loaded, expected, archive.name)


@pytest.mark.parametrize("form", ["protocol 2", "protocol 5"])
def test_pickles_of_python_3_are_read_alike(form, archive, tmp_path):
    path = write(tmp_path / "again.tar.gz", dump=PICKLES[form])
    expected = CIFARFS.from_archive(archive, split="test")
    assert torch.equal(CIFARFS.from_archive(path, split="test").images, expected.images)


def test_images_are_brought_to_a_size(archive):
    loaded = FC100.from_archive(archive, split="test", size=16)
    expected = brought(np.moveaxis(MADE.images[loaded.class_names[3]][2], 0, 2), 16)
    assert np.array_equal(loaded.images[3, 2].permute(1, 2, 0).numpy(), expected)


def test_load_takes_the_archive_or_what_was_extracted(archive, monkeypatch, tmp_path):
    monkeypatch.setattr(cifar100, "ARCHIVE", known(archive))
    expected = CIFARFS.from_archive(archive, split="test")
    assert torch.equal(CIFARFS.load(archive.parent, split="test").images, expected.images)

    pieces = [tmp_path / "cifar-100-python" / name for name in MADE.tables]
    pieces[0].parent.mkdir()
    for piece in pieces:
        piece.write_bytes(PICKLES["python 2"](MADE.tables[piece.name]))
    monkeypatch.setattr(cifar100, "EXTRACTED", tuple(known(piece, tmp_path) for piece in pieces))
    extracted = CIFARFS.load(tmp_path, split="test")
    assert torch.equal(extracted.images, expected.images)
    assert extracted.sources == tuple(f"cifar-100-python/{name}" for name in ("meta", "train", "test"))
    pieces[2].write_bytes(pieces[2].read_bytes()[:-1] + b"?")
    refuses(r"test has SHA-256 \w+, expected \w+; .*download it again", CIFARFS.load, tmp_path, split="test")


LACKING = object()
DATA = MADE.tables["train"]["data"]
BROKEN = [
    ("train", "data", DATA[:, :3071], r"train has data uint8 of shape \(300, 3071\), expected uint8"),
    ("test", "data", DATA[:100].astype(np.int32), "test has data int32"),
    ("train", "data", LACKING, "train has the keys 'filenames', .* expected 'data' among them"),
    ("train", "fine_labels", LACKING, "expected 'fine_labels' among them"),  # as in CIFAR-10
    ("train", "fine_labels", [0] * 299, r"300 images and labels of shape \(299,\)"),
    ("train", "fine_labels", [100] * 300, "labels from 100 to 100, expected 0 to 99"),
    ("train", "fine_labels", "apple", "fine_labels is a bytes, expected a numpy"),
    ("train", "fine_labels", [0] * 300, "have .* images, expected as many .600."),
    ("meta", "fine_label_names", ["cat"] * 10, "names 10 classes, expected the hundred"),
    ("meta", "fine_label_names", [*NAMES, "cat"], "names 101 classes, expected the hundred"),
    ("meta", "fine_label_names", 3, "fine_label_names as int, expected a list"),
    ("meta", None, [1, 2], "holds a list, expected a dictionary with the key 'fine_label_names'"),
    (None, "meta", LACKING, "has no file cifar-100-python/meta"),
]


@pytest.mark.parametrize(("member", "key", "value", "message"), BROKEN)
def test_archives_of_another_content_are_refused(member, key, value, message, tmp_path):
    tables = deepcopy(MADE.tables)
    changed, key = (tables[member], key) if member and key else (tables, key or member)
    changed[key] = value
    if value is LACKING:
        del changed[key]
    refuses(message, FC100.from_archive, write(tmp_path / "broken.tar.gz", tables), split="train")


def test_archives_cut_short_or_absent_are_refused(archive, tmp_path):
    for _ in cut_short(Path(shutil.copy(archive, tmp_path))):
        refuses("cut short", CIFARFS.from_archive, tmp_path / archive.name, split="train")
    for data_set in SIZES:
        refuses(r"absent\.tar\.gz cannot be read", data_set.from_archive, tmp_path / "absent.tar.gz", split="test")


def test_a_pickle_within_the_archive_that_calls_is_refused(tmp_path):
    mark = tmp_path / "mark"

    class Touches:
        def __reduce__(self):
            return Path.touch, (mark,)

    path = write(tmp_path / "evil.tar.gz", {"meta": {"fine_label_names": Touches()}}, pickle.dumps)
    message = r"evil\.tar\.gz: cifar-100-python/meta names '(pathlib|builtins|os)"
    refuses(message, CIFARFS.from_archive, path, split="train")
    assert not mark.exists()
