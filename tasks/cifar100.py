"""CIFAR-FS and FC100: the hundred classes of CIFAR-100, read from its official files, split in two ways."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np
from torch import Tensor

from diffopt.tasks.class_lists import Named, class_list, superclasses
from diffopt.tasks.classification import Classes, ClassificationSet, Form, KnownSet
from diffopt.tasks.data import KnownFile, Split, check_size, check_split, expanded
from diffopt.tasks.errors import DataError
from diffopt.tasks.images import channels_first
from diffopt.tasks.pickled_arrays import Array, text
from diffopt.tasks.pickles import archived_pickles, array, entry, read_pickle

ARCHIVE = KnownFile(
    "cifar-100-python.tar.gz",
    169_001_437,
    "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
)
EXTRACTED = (
    KnownFile("cifar-100-python/meta", None, md5="7973b15100ade9c7d40fb424638fde48"),
    KnownFile("cifar-100-python/train", None, md5="16019d7e3df5f24257cddd939b257f8d"),
    KnownFile("cifar-100-python/test", None, md5="f0ef6b0ae62326f3e7ffdfab6717acfc"),
)
ORIGIN = "https://www.cs.toronto.edu/~kriz/cifar.html offers it (161 MB)"
LARGEST_MEMBER = 160_000_000
LARGEST_ARCHIVE = 200_000_000
"""Bytes; the official archive has 155,249,918 in its largest file and less than this in all of them."""


def _forms(data_set: Named, split: Split, size: int) -> list[Form[Classes[Tensor]]]:
    def archived(place: Path) -> Classes[Tensor]:
        return _archived(ARCHIVE.check(place), data_set, split, size)

    def extracted(place: Path) -> Classes[Tensor]:
        contents = [one.read(place, LARGEST_MEMBER) for one in EXTRACTED]
        names = [f"{place}: {one.name}" for one in EXTRACTED]
        tables = [read_pickle(io.BytesIO(x), len(x), name) for x, name in zip(contents, names, strict=True)]
        return _chosen(tables, class_list(data_set, split), size, place)

    names = tuple(one.name for one in EXTRACTED)
    return [Form((ARCHIVE.name,), archived), Form(names, extracted, "the folder cifar-100-python extracted from it")]


@final
@dataclass(frozen=True, eq=False)
class CIFARFS(ClassificationSet[Tensor]):
    """The images of one split: 600 of each class, 32x32 in colour.

    The split is by class, at random: 64 classes for training, 16 for validation, 20 for testing, none in two of them.

    Read is the official ``cifar-100-python.tar.gz`` (169,001,437 bytes, SHA-256), or what was extracted of it (MD5).
    Takes some seconds, whatever the split: every split has images in both halves of CIFAR-100.

    Memory: 118 MB for the training split at 32x32 (a byte a value; floats are made of what is drawn only). While
    it is loaded, 0.6 GB. The images come without a licence; cite the report.

    Reference: split: Bertinetto, Henriques, Torr, Vedaldi (2019), "Meta-learning with differentiable closed-form
    solvers". Images: Krizhevsky (2009), "Learning multiple layers of features from tiny images".

    Attributes:
        images: uint8 RGB, ``[classes, 600, 3, size, size]``; :func:`diffopt.tasks.sample_episodes` draws few-shot
            tasks from them.
        class_names: for each class, its name in CIFAR-100; sorted.
        sources: the names of the files that were read.
    """

    _known = KnownSet("CIFAR-FS", 32, partial(_forms, "cifar-fs"), ORIGIN)

    @classmethod
    def from_archive(cls, path: str | Path, *, split: Split, size: int = 32) -> CIFARFS:
        """Read one split from an archive of the official layout, with any checksum and number of images.

        Raises:
            DataError: the split is unknown, or the archive does not hold what the layout promises.
            ProblemError: ``size`` is below 1.
        """
        images, names = _archived(expanded(path), "cifar-fs", split, size)
        return cls(images, names, (Path(path).name,))


@final
@dataclass(frozen=True, eq=False)
class FC100(ClassificationSet[Tensor]):
    """The images of one split: 600 of each class, 32x32 in colour.

    The split is by superclass, so that training and test classes differ more than those of CIFAR-FS: 12
    superclasses (60 classes) for training, 4 (20) for validation, 4 (20) for testing, none in two of them.

    Read is the official ``cifar-100-python.tar.gz`` (169,001,437 bytes, SHA-256), or what was extracted of it (MD5).
    Takes some seconds, whatever the split: every split has images in both halves of CIFAR-100.

    Memory: 111 MB for the training split at 32x32 (a byte a value; floats are made of what is drawn only). While
    it is loaded, 0.6 GB. The images come without a licence; cite the report.

    Reference: split: Oreshkin, Rodriguez, Lacoste (2018), "TADAM: Task dependent adaptive metric for improved few-shot
    learning".
    Images: Krizhevsky (2009), "Learning multiple layers of features from tiny images".

    Attributes:
        images: uint8 RGB, ``[classes, 600, 3, size, size]``; :func:`diffopt.tasks.sample_episodes` draws few-shot
            tasks from them.
        class_names: for each class, its name in CIFAR-100; sorted.
        sources: the names of the files that were read.
    """

    _known = KnownSet("FC100", 32, partial(_forms, "fc100"), ORIGIN)

    @classmethod
    def from_archive(cls, path: str | Path, *, split: Split, size: int = 32) -> FC100:
        """Read one split from an archive of the official layout, with any checksum and number of images.

        Raises:
            DataError: the split is unknown, or the archive does not hold what the layout promises.
            ProblemError: ``size`` is below 1.
        """
        images, names = _archived(expanded(path), "fc100", split, size)
        return cls(images, names, (Path(path).name,))


def _archived(path: Path, data_set: Named, split: Split, size: int) -> Classes[Tensor]:
    """The classes of a split in an archive of the official layout, with any checksum."""
    check_split(split)
    check_size(size)
    tables = archived_pickles(path, {one.name: LARGEST_MEMBER for one in EXTRACTED}, LARGEST_ARCHIVE)
    return _chosen([tables[one.name] for one in EXTRACTED], class_list(data_set, split), size, path)


def _chosen(tables: list[Any], names: tuple[str, ...], size: int, path: Path) -> Classes[Tensor]:
    """The images of the classes, those of the file ``train`` before those of ``test``."""
    meta, train, test = tables
    listed = entry(meta, "fine_label_names", f"{path}: meta")
    if not isinstance(listed, list):
        raise DataError(f"{path}: meta has fine_label_names as {type(listed).__name__}", "a list of names")
    official = [text(name) for name in listed[:100]]
    if len(listed) != 100 or sorted(official) != sorted(name for five in superclasses().values() for name in five):
        raise DataError(f"{path}: meta names {len(listed)} classes", "the hundred of CIFAR-100")
    halves = [_half(train, f"{path}: train"), _half(test, f"{path}: test")]
    pixels = np.concatenate([images for images, _ in halves])
    labels = np.concatenate([labels for _, labels in halves])
    rows = [np.flatnonzero(labels == official.index(name)) for name in names]
    counts = {len(places) for places in rows}
    if len(counts) > 1 or counts == {0}:
        raise DataError(f"the classes in {path} have {sorted(counts)} images", "as many (600) of each")
    pictures = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)[np.concatenate(rows)]
    return channels_first(pictures, len(pictures), size).reshape(len(names), -1, 3, size, size), names


def _half(table: Any, name: str) -> tuple[Array, Array]:
    """Pixels, uint8 ``[images, 3072]``, and labels of one of the two files."""
    pixels = array(entry(table, "data", name), f"{name}: data")
    labels = array(entry(table, "fine_labels", name), f"{name}: fine_labels")
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072:
        raise DataError(f"{name} has data {pixels.dtype} of shape {pixels.shape}", "uint8 [images, 3072]")
    if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(f"{name} has {len(pixels)} images and labels of shape {labels.shape}", "one label each")
    if len(labels) and not 0 <= labels.min() <= labels.max() < 100:
        raise DataError(f"{name} has labels from {labels.min()} to {labels.max()}", "0 to 99")
    return pixels, labels
