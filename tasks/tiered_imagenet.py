"""tieredImageNet: 608 classes of ImageNet at 84x84, split by the categories above them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from diffopt.tasks.classification import Classes, ClassificationSet, Form, KnownSet
from diffopt.tasks.data import KnownFile, Split
from diffopt.tasks.errors import DataError
from diffopt.tasks.images import channels_first, decoded
from diffopt.tasks.pickled_arrays import Array, PickledArray, text
from diffopt.tasks.pickles import archived_pickles, array, entry, load_pickle
from diffopt.tasks.ragged import RaggedImages

ARCHIVE = KnownFile("tiered-imagenet.tar", None, md5="e07e811b9f29362d159a9edd0d838c62")
LARGEST_IMAGES, LARGEST_LABELS, LARGEST_ARCHIVE = 12_000_000_000, 50_000_000, 16_000_000_000
SHORT = {"train": "train", "validation": "val", "test": "test"}
SIZES = {"train": (351, 448_695), "validation": (97, 124_261), "test": (160, 206_209)}
"""Classes[RaggedImages] and images of each split."""
ORIGIN = (
    "ImageNet's terms forbid passing the images on: ask at https://image-net.org. Prepared files (12.9 GB): "
    "https://github.com/renmengye/few-shot-ssl-public"
)


def _forms(split: Split, size: int) -> list[Form[Classes[RaggedImages]]]:
    pair = (f"{SHORT[split]}_images_png.pkl", f"{SHORT[split]}_labels.pkl")

    def of_pickles(prefix: str) -> Form[Classes[RaggedImages]]:
        images, labels = (prefix + name for name in pair)

        def read(place: Path) -> Classes[RaggedImages]:
            # The labels first: they are small, and tell a wrong file at once.
            marked = _labels(load_pickle(place / labels, LARGEST_LABELS), str(place / labels), split)
            return _decoded(load_pickle(place / images, LARGEST_IMAGES), *marked, str(place / images), size)

        return Form((images, labels), read, " and ".join(pair))

    def of_archive(place: Path) -> Classes[RaggedImages]:
        path = ARCHIVE.check(place)
        wanted = dict(zip(pair, (LARGEST_IMAGES, LARGEST_LABELS), strict=True))
        tables = archived_pickles(path, wanted, LARGEST_ARCHIVE)
        marked = _labels(tables[pair[1]], f"{path}: {pair[1]}", split)
        return _decoded(tables.pop(pair[0]), *marked, f"{path}: {pair[0]}", size)

    return [of_pickles(""), of_pickles("tiered-imagenet-"), Form((ARCHIVE.name,), of_archive)]


@final
@dataclass(frozen=True, eq=False)
class TieredImageNet(ClassificationSet[RaggedImages]):
    """The images of one split, 84x84 in colour, classes of unequal size.

    The split is by category, each of 10 to 30 classes, so that training and test classes differ more than those of
    miniImageNet: 20 categories (351 classes, 448,695 images) for training, 6 (97; 124,261) for validation, 8 (160;
    206,209) for testing, none in two of them.

    Read are the files of Ren et al., in the data folder or in its ``tiered-imagenet``: ``train_images_png.pkl`` (a
    list of encoded pictures) and ``train_labels.pkl`` (``val``, ``test``), each also with ``tiered-imagenet-`` before
    its name; or else the archive of them, ``tiered-imagenet.tar``, checked by MD5. Pickles have no checksum of their
    own: numbers and shapes are checked instead. Decoding takes minutes for the training split.

    Memory: 9.5 GB for the training split at 84x84 (a byte a value; floats are made of what is drawn only), 1.4 GB
    at 32x32; while it is loaded, the encoded pictures besides, some 7 GB. Licence: ImageNet's terms of access;
    research only.

    Reference: Ren et al. (2018), "Meta-learning for semi-supervised few-shot classification"; the images:
    Russakovsky et al. (2015), "ImageNet large scale visual recognition challenge".

    Attributes:
        images: uint8 RGB; ``images.flat`` is ``[images, 3, size, size]``. :func:`diffopt.tasks.sample_episodes`
            draws few-shot tasks from them.
        class_names: for each class, its name in words, in the order of the file; two classes may share one.
        sources: the names of the files that were read.
    """

    _known = KnownSet("tieredImageNet", 84, _forms, ORIGIN, folder="tiered-imagenet")


def _labels(table: Any, name: str, split: Split) -> tuple[Array, tuple[str, ...]]:
    """The label of each image, and the classes' names."""
    classes, images = SIZES[split]
    labels = array(entry(table, "label_specific", name), f"{name}: label_specific")
    names = entry(table, "label_specific_str", name)
    if not isinstance(names, list) or len(names) != classes:
        count = len(names) if isinstance(names, list) else type(names).__name__
        raise DataError(f"{name} has label_specific_str of {count}", f"the names of {classes} classes of {split!r}")
    if labels.shape != (images,) or labels.dtype.kind not in "iu":
        raise DataError(f"{name} has labels {labels.dtype} of shape {labels.shape}", f"{images:,} integers")
    if labels.min() < 0 or labels.max() >= classes or len(np.unique(labels)) != classes:
        raise DataError(f"{name} has labels from {labels.min()} to {labels.max()}", f"all of 0 to {classes - 1}")
    return labels.astype(np.int64), tuple(text(one) for one in names)


def _decoded(encoded: Any, labels: Array, names: tuple[str, ...], name: str, size: int) -> Classes[RaggedImages]:
    """The pictures, sorted by class, and the classes' names."""
    if not isinstance(encoded, list) or len(encoded) != len(labels):
        count = f"a list of {len(encoded):,}" if isinstance(encoded, list) else f"a {type(encoded).__name__}"
        raise DataError(f"{name} holds {count}", f"a list of {len(labels):,} encoded pictures")

    def pictures() -> Iterator[Array]:
        for place in np.argsort(labels, kind="stable"):
            item = encoded[place]
            content = array(item, f"{name}: picture {place}").tobytes() if isinstance(item, PickledArray) else item
            if not isinstance(content, bytes):
                raise DataError(f"{name}: picture {place} is of {type(item).__name__}", "an encoded picture")
            yield decoded(content, f"{name}: picture {place}", size=size)

    flat = channels_first(pictures(), len(labels), size)
    return RaggedImages(flat, torch.from_numpy(np.bincount(labels, minlength=len(names)))), names
