"""Reading the official CIFAR-100 archive, from which CIFAR-FS and FC100 are made."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from diffopt.tasks.archives import Member, tar_members
from diffopt.tasks.class_lists import superclasses
from diffopt.tasks.data import KnownFile, check_size, data_folder, is_there, missing
from diffopt.tasks.errors import DataError
from diffopt.tasks.images import channels_first
from diffopt.tasks.pickled_arrays import Array, text
from diffopt.tasks.pickles import array, entry, read_pickle

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


class ClassImages(NamedTuple):
    """The images of some classes of CIFAR-100.

    Attributes:
        images: uint8 RGB, ``[classes, examples, 3, size, size]``.
        sources: the names of the files that were read.
    """

    images: Tensor
    sources: tuple[str, ...]


def load_classes(folder: str | Path | None, names: tuple[str, ...], size: int, what: str) -> ClassImages:
    """The images of the classes ``names``, from the archive or from what was extracted of it, checksums checked.

    Raises:
        DataError: neither is there, or a file is not what its name says.
        ProblemError: ``size`` is below 1.
    """
    check_size(size)
    place = data_folder(folder)
    if is_there(place / ARCHIVE.name):
        ARCHIVE.check(place)
        return archive_classes(place / ARCHIVE.name, names, size)
    if all(is_there(place / one.name) for one in EXTRACTED):
        contents = [(one.name, one.read(place, LARGEST_MEMBER)) for one in EXTRACTED]
        members = (Member(name, io.BytesIO(content), len(content)) for name, content in contents)
        return ClassImages(_chosen(members, names, size, place), tuple(one.name for one in EXTRACTED))
    accepted = f"{ARCHIVE.name}, or the folder cifar-100-python extracted from it"
    raise missing(what, [place], accepted, ORIGIN)


def archive_classes(path: Path, names: tuple[str, ...], size: int) -> ClassImages:
    """The images of the classes ``names`` in an archive of the official layout, with any checksum.

    Raises:
        DataError: the archive cannot be read or does not hold what the layout promises.
        ProblemError: ``size`` is below 1.
    """
    check_size(size)
    wanted = {one.name: LARGEST_MEMBER for one in EXTRACTED}
    return ClassImages(_chosen(tar_members(path, wanted, LARGEST_ARCHIVE), names, size, path), (path.name,))


def _chosen(members: Iterator[Member], names: tuple[str, ...], size: int, path: Path) -> Tensor:
    """The images of the classes, those of the file ``train`` before those of ``test``."""
    tables = {member.name: read_pickle(member.stream, member.size, f"{path}: {member.name}") for member in members}
    meta, train, test = (tables[one.name] for one in EXTRACTED)
    listed = _listed(meta, "fine_label_names", f"{path}: meta")
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
    return channels_first(pictures, len(pictures), size).reshape(len(names), -1, 3, size, size)


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


def _listed(table: Any, key: str, name: str) -> list[Any]:
    found = entry(table, key, name)
    if not isinstance(found, list):
        raise DataError(f"{name} has {key} as {type(found).__name__}", "a list of names")
    return found
