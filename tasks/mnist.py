"""MNIST: 70,000 handwritten digits."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor

from diffopt.tasks.archives import npz_arrays
from diffopt.tasks.classification import Form, KnownSet
from diffopt.tasks.data import KnownFile, Split, read_one_of, whole
from diffopt.tasks.errors import DataError
from diffopt.tasks.images import resized
from diffopt.tasks.pickled_arrays import Array
from diffopt.tasks.ragged import RaggedImages

SINGLE_FILES = (
    KnownFile("mnist.npz", 11_490_434, "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"),
    KnownFile("mnist.npz", 11_490_519, "06af5dfe73b70e3bc1c36439982b18a8d76803db9b544f6fdf838a37fbb01b64"),
)
"""The file that Keras downloads, and the same arrays packed again."""

OFFICIAL_TRAIN = (
    KnownFile("train-images-idx3-ubyte.gz", 9_912_422, md5="f68b3c2dcbeaaa9fbdd348bbdeb94873"),
    KnownFile("train-labels-idx1-ubyte.gz", 28_881, md5="d53e105ee54ea40749a09fcbcd1e9432"),
)
OFFICIAL_TEST = (
    KnownFile("t10k-images-idx3-ubyte.gz", 1_648_877, md5="9fb629c4189551a2d022fa330f9573f3"),
    KnownFile("t10k-labels-idx1-ubyte.gz", 4_542, md5="ec29112dd5afa0611ce80d1b7f02629c"),
)
ORIGIN = (
    "the first is at https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz, "
    "the others at https://ossci-datasets.s3.amazonaws.com/mnist/"
)
LARGEST = 60_000_000
"""Bytes, unpacked; the official files have 55 million in all."""
TRAINING = 50_000
"""How many of the official training images are for training; those behind them are for validation."""


def _forms(split: Split, size: int) -> list[Form[tuple[Tensor, Tensor]]]:
    half, official = ("test", OFFICIAL_TEST) if split == "test" else ("train", OFFICIAL_TRAIN)
    kept = {"train": slice(0, TRAINING), "validation": slice(TRAINING, None), "test": slice(0, None)}[split]

    def chosen(arrays: Iterable[Array], name: str) -> tuple[Tensor, Tensor]:
        images, labels = arrays
        if labels.shape != images.shape[:1] or images.shape[1:] != (28, 28) or (len(labels) and labels.max() > 9):
            got = f"{name} holds images {images.shape} with labels {labels.shape}"
            raise DataError(got, "[images, 28, 28] and as many labels, 0 to 9")
        images, labels = images[kept], labels[kept]
        brought = images.copy() if size == 28 else np.stack([resized(image, size) for image in images])
        return torch.from_numpy(brought), torch.from_numpy(labels.astype(np.int64))

    def single(place: Path) -> tuple[Tensor, Tensor]:
        name, expected = SINGLE_FILES[0].name, {f"x_{half}": ("u1", 3), f"y_{half}": ("u1", 1)}
        return chosen(npz_arrays(read_one_of(SINGLE_FILES, place), name, expected, LARGEST).values(), name)

    def pair(place: Path) -> tuple[Tensor, Tensor]:
        arrays = (idx_array(one.read(place), one.name, axes) for one, axes in zip(official, (3, 1), strict=True))
        return chosen(arrays, official[0].name)

    return [Form((SINGLE_FILES[0].name,), single), Form(tuple(one.name for one in official), pair)]


_KNOWN = KnownSet("MNIST", 28, _forms, ORIGIN)


@final
@dataclass(frozen=True, eq=False)
class MNIST:
    """The images of one split, 28x28 with ink 255 and paper 0.

    All ten digits are in every split: the first 50,000 of the official training images, the last 10,000 of them
    for validation, and the 10,000 official test images.

    Memory: 39 MB for the training split at 28x28 (a byte a value), twice that while it is loaded. Licence: CC BY-SA
    3.0.

    Reference: LeCun, Bottou, Bengio, Haffner (1998), "Gradient-based learning applied to document recognition".

    Attributes:
        images: uint8, ``[images, size, size]``.
        labels: int64, ``[images]``, the digits.
        sources: the names of the files that were read.
    """

    images: Tensor
    labels: Tensor
    sources: tuple[str, ...]

    @classmethod
    def load(cls, folder: str | Path | None = None, *, split: Split, size: int = 28) -> MNIST:
        """Read one split, from ``mnist.npz`` or the four official ``.gz`` files; sizes and checksums are checked.

        Args:
            folder: where to look; see :func:`diffopt.tasks.data_folder`.
            split: ``train`` (50,000 images), ``validation`` (10,000) or ``test`` (10,000).
            size: height and width to bring the images to, with Pillow's antialiased bilinear filter.

        Raises:
            DataError: the split is unknown, no usable file is there, or a file is not what its name says.
            ProblemError: ``size`` is below 1.
        """
        (images, labels), sources = _KNOWN.find(folder, split, size)
        return cls(images, labels, sources)

    def by_class(self) -> RaggedImages:
        """The images sorted by digit, to draw few-shot episodes from."""
        order = torch.sort(self.labels, stable=True).indices
        return RaggedImages(self.images[order], torch.bincount(self.labels))


def idx_array(content: bytes, name: str, axes: int) -> Array:
    """A gzipped array of the IDX form: two zeros, 8 for uint8, the number of axes, the shape, the values.

    Raises:
        DataError: it is not of that form, or its length is not what its shape says.
    """
    with (
        whole(f"{name} cannot be unpacked", "a whole file", (OSError, EOFError, zlib.error)),
        gzip.GzipFile(fileobj=io.BytesIO(content)) as file,
    ):
        unpacked = file.read(LARGEST + 1)
    start = 4 + 4 * axes
    if len(unpacked) < start or unpacked[:4] != bytes([0, 0, 8, axes]):
        raise DataError(f"{name} begins with {unpacked[:4].hex()}", f"000008{axes:02} (uint8, {axes} axes)")
    shape = tuple(int.from_bytes(unpacked[place : place + 4], "big") for place in range(4, start, 4))
    values = np.frombuffer(unpacked, dtype=np.uint8, offset=start)
    if int(np.prod(shape, dtype=object)) != len(values):
        raise DataError(f"{name} has {len(values):,} values", f"as many as its shape {shape} has")
    return values.reshape(shape)
