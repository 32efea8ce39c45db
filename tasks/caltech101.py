"""Caltech-101 at 32x32: colour images for few-shot learning where CIFAR-FS cannot be had."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch

from diffopt.tasks.archives import npz_arrays
from diffopt.tasks.classification import Classes, ClassificationSet, Form, KnownSet
from diffopt.tasks.data import KnownFile, Split
from diffopt.tasks.errors import DataError
from diffopt.tasks.images import channels_first
from diffopt.tasks.ragged import RaggedImages

SINGLE_FILE = KnownFile(
    "caltech101_32.npz", 16_497_180, "3a2e9a8fbf03daf56a6ade525a4b28726d61f21fac21140201f57ef4c71fd86f"
)
ORIGIN = (
    "it is made from the images at https://data.caltech.edu/records/mzrjq-6wc02, resized to 32x32: arrays `images` "
    "uint8 [images, 32, 32, 3], `labels` sorted, `class_names`, `class_split` (0 train, 1 validation, 2 test)"
)
EXPECTED = {"images": ("u1", 4), "labels": ("i", 1), "class_names": ("U", 1), "class_split": ("i", 1)}
LARGEST = 30_000_000
CODES = ("train", "validation", "test")


def _forms(split: Split, size: int) -> list[Form[Classes[RaggedImages]]]:
    def read(place: Path) -> Classes[RaggedImages]:
        arrays = npz_arrays(SINGLE_FILE.read(place), SINGLE_FILE.name, EXPECTED, LARGEST)
        images, labels, codes = arrays["images"], arrays["labels"], arrays["class_split"]
        classes = len(arrays["class_names"])
        if images.shape[1:] != (32, 32, 3) or labels.shape != images.shape[:1] or codes.shape != (classes,):
            shapes = f"images {images.shape}, labels {labels.shape}, class_split {codes.shape}, {classes} names"
            raise DataError(f"{SINGLE_FILE.name} holds {shapes}", "[images, 32, 32, 3] and what belongs to it")
        counts = np.bincount(labels, minlength=classes) if len(labels) and labels.min() >= 0 else np.zeros(0)
        if len(counts) != classes or (np.diff(labels) < 0).any():
            got = f"{SINGLE_FILE.name} has labels that are not sorted, or miss a class"
            raise DataError(got, f"all of 0 to {classes - 1}, sorted")
        chosen = codes == CODES.index(split)
        pictures = images[chosen[labels]]
        flat = channels_first(pictures, len(pictures), size)
        names = tuple(arrays["class_names"][chosen].tolist())
        return RaggedImages(flat, torch.from_numpy(counts[chosen])), names

    return [Form((SINGLE_FILE.name,), read)]


@final
@dataclass(frozen=True, eq=False)
class Caltech101(ClassificationSet[RaggedImages]):
    """The images of one split, 32x32 in colour, classes of unequal size.

    A stand-in for small colour images, and no more: these are not CIFAR-FS's images, the split is our own, and no
    figure on them may be compared with one on CIFAR-FS. 99 of the 101 categories (both faces are left out, as is
    the clutter), at most 200 images of each, at least 31: 64 classes for training (4,421 images), 16 for validation
    (1,016), 19 for testing (1,133).

    Read is ``caltech101_32.npz``, checked by size and SHA-256.

    Memory: 14 MB for the training split at 32x32 (a byte a value), 50 MB while it is loaded. Licence: CC BY
    4.0 by a secondary source; the images were collected from the web.

    Reference: Fei-Fei, Fergus, Perona (2004), "Learning generative visual models from few training examples".

    Attributes:
        images: uint8 RGB; ``images.flat`` is ``[images, 3, size, size]``. :func:`diffopt.tasks.sample_episodes`
            draws few-shot tasks from them.
        class_names: for each class, its name in Caltech-101.
        sources: the names of the files that were read.
    """

    _known = KnownSet("Caltech-101", 32, _forms, ORIGIN)
