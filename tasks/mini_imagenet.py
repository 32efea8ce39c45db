"""miniImageNet: a hundred classes of ImageNet at 84x84, from pickles or from lists and pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final, get_args

import numpy as np
from torch import Tensor

from diffopt.tasks.class_lists import class_list
from diffopt.tasks.classification import Classes, ClassificationSet, Form, KnownSet
from diffopt.tasks.data import KnownFile, Split, open_file
from diffopt.tasks.errors import DataError
from diffopt.tasks.images import channels_first, decoded
from diffopt.tasks.pickled_arrays import Array, text
from diffopt.tasks.pickles import archived_pickles, array, entry, load_pickle

ARCHIVE = KnownFile("mini-imagenet.tar.gz", None, md5="b38f1eb4251fb9459ecc8e7febf9b2eb")
SHORT = {"train": "train", "validation": "val", "test": "test"}
IMAGES_PER_CLASS = 600
LARGEST_PICKLE, LARGEST_LIST, LARGEST_PICTURE, LARGEST_ARCHIVE = 1_000_000_000, 10_000_000, 50_000_000, 3_000_000_000
"""Bytes; the training split has 813 million in images."""
ORIGIN = (
    "ImageNet's terms forbid passing the images on: ask at https://image-net.org, and make the set by the lists at "
    "https://github.com/twitter-research/meta-learning-lstm/tree/master/data/miniImagenet. "
    "Prepared pickles: https://github.com/renmengye/few-shot-ssl-public"
)


def _forms(split: Split, size: int) -> list[Form[Classes[Tensor]]]:
    names = class_list("mini-imagenet", split)
    pickles = [f"mini-imagenet-cache-{one}.pkl" for one in dict.fromkeys((SHORT[split], split))]
    listed = f"{SHORT[split]}.csv"

    def of_pickle(name: str) -> Form[Classes[Tensor]]:
        def read(place: Path) -> Classes[Tensor]:
            table = load_pickle(place / name, LARGEST_PICKLE)
            return pickled_images(table, str(place / name), split, size), names

        return Form((name,), read)

    def of_archive(place: Path) -> Classes[Tensor]:
        path = ARCHIVE.check(place)
        (table,) = archived_pickles(path, {pickles[0]: LARGEST_PICKLE}, LARGEST_ARCHIVE).values()
        return pickled_images(table, f"{path}: {pickles[0]}", split, size), names

    def of_list(place: Path) -> Classes[Tensor]:
        return listed_images(place / listed, split, size), names

    return [
        *map(of_pickle, pickles),
        Form((listed,), of_list, f"{listed} beside the pictures"),
        Form((ARCHIVE.name,), of_archive),
    ]


@final
@dataclass(frozen=True, eq=False)
class MiniImageNet(ClassificationSet[Tensor]):
    """The images of one split: 600 of each class, 84x84 in colour.

    The split is that of Ravi and Larochelle, by class: 64 for training, 16 for validation, 20 for testing, no class
    in two of them. Vinyals et al. chose other classes; figures on the two are not comparable.

    Read is the first of these that is there, in the data folder or in its ``mini-imagenet``:

    - ``mini-imagenet-cache-train.pkl``, ``-val.pkl`` (or ``-validation.pkl``), ``-test.pkl``: dictionaries of
      ``image_data``, uint8 ``[images, 84, 84, 3]``, and ``class_dict``, the places of each class's images.
    - ``train.csv``, ``val.csv``, ``test.csv`` of Ravi and Larochelle (``filename,label``) beside the pictures,
      JPEG or PNG of any size: ``images/NAME``, or in class folders, ``LABEL/NAME``, ``images/LABEL/NAME`` or
      ``train/LABEL/NAME`` (``val``, ``test``). Takes minutes where the pictures are ImageNet's own.
    - ``mini-imagenet.tar.gz``, the archive of those pickles; checked by MD5.

    Pickles and lists have no checksum of their own: classes, numbers and shapes are checked instead.

    Memory: 813 MB for the training split at 84x84 (a byte a value; floats are made of what is drawn only), 118 MB
    at 32x32. While a pickle is loaded, 1.6 GB at the peak. Licence: ImageNet's terms of access; research only.

    Reference: Vinyals et al. (2016), "Matching networks for one shot learning"; the split: Ravi, Larochelle (2017),
    "Optimization as a model for few-shot learning"; the images: Russakovsky et al. (2015), "ImageNet large scale
    visual recognition challenge".

    Attributes:
        images: uint8 RGB, ``[classes, 600, 3, size, size]``; :func:`diffopt.tasks.sample_episodes` draws few-shot
            tasks from them.
        class_names: for each class, its WordNet identifier, such as ``n01532829``; sorted.
        sources: the names of the files that were read.
    """

    _known = KnownSet("miniImageNet", 84, _forms, ORIGIN, folder="mini-imagenet")


def pickled_images(table: Any, name: str, split: Split, size: int) -> Tensor:
    """The images of a pickled split by class, uint8 ``[classes, 600, 3, size, size]``; classes sorted by name.

    Raises:
        DataError: the table is of another form, or does not hold exactly the split's classes, 600 images of each.
    """
    pixels = array(entry(table, "image_data", name), f"{name}: image_data")
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (84, 84, 3):
        raise DataError(f"{name} has image_data {pixels.dtype} of shape {pixels.shape}", "uint8 [images, 84, 84, 3]")
    classes = entry(table, "class_dict", name)
    if not isinstance(classes, dict):
        raise DataError(f"{name} has class_dict as {type(classes).__name__}", "a dictionary of places by class")
    listed = {text(label): places for label, places in classes.items()}
    _check_classes(set(listed), split, name)
    rows = {}
    for label in listed:
        # One by one: a file that names one long array for every class would take the memory of all.
        rows[label] = places = array(listed[label], f"{name}: class_dict")
        _check_count(len(places) if places.ndim == 1 else 0, label, name)
        if places.dtype.kind not in "iu" or places.min() < 0 or places.max() >= len(pixels):
            got = f"{name} places images of class {label} beyond the last"
            raise DataError(got, f"places among the {len(pixels)} images there are")
    order = np.concatenate([rows[label] for label in sorted(rows)])
    if len(np.unique(order)) != len(order):
        raise DataError(f"{name} counts one image twice", "each once", "its class_dict is damaged: obtain it again")
    images = channels_first((pixels[place] for place in order), len(order), size)
    return images.reshape(len(rows), -1, 3, size, size)


def listed_images(path: Path, split: Split, size: int) -> Tensor:
    """The pictures that a list names, by class, uint8 ``[classes, 600, 3, size, size]``; classes sorted by name.

    Raises:
        DataError: the list is of another form or does not name exactly the split's classes, 600 pictures of each;
            or a picture is missing or damaged.
    """
    names: dict[str, list[str]] = {}
    for line, (name, label) in enumerate(_rows(path), start=2):
        # A list says which picture, never where: no name may lead out of the folder.
        if name in ("", ".", "..") or any(mark in name for mark in "/\\:\0"):
            raise DataError(f"{path}, line {line}, names {name[:60]!r}", "a file name such as n0153282900000005.jpg")
        names.setdefault(label, []).append(name)
    _check_classes(set(names), split, str(path))
    for label, pictures in names.items():
        _check_count(len(set(pictures)), label, str(path))
    first = sorted(names)[0]
    parent = _parent(path.parent, first, names[first][0], SHORT[split])
    wanted = [Path(str(parent).format(label=label)) / name for label in sorted(names) for name in names[label]]
    images = channels_first((_picture(one, size) for one in wanted), len(wanted), size)
    return images.reshape(len(names), -1, 3, size, size)


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    """File name and label of each line."""
    with open_file(path, LARGEST_LIST, "this is no list")[0] as file:
        content = file.read(LARGEST_LIST).decode("utf-8", errors="replace")
    rows = csv.reader(io.StringIO(content, newline=""))
    try:
        if next(rows, None) != ["filename", "label"]:
            raise DataError(f"{path} begins with another line", "'filename,label'", "this is another list")
        for row in rows:
            if row:
                if len(row) != 2:
                    raise DataError(f"{path}, line {rows.line_num}, has {len(row)} fields", "filename and label")
                yield row[0], row[1]
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}, cannot be read ({error})", "a file name and a label") from error


def _parent(folder: Path, label: str, name: str, short: str) -> Path:
    """In which folder pictures lie, with ``{label}`` for the class: found by one of them."""
    escaped = str(folder).replace("{", "{{").replace("}", "}}")
    forms = [Path(escaped) / one for one in ("images", "{label}", "images/{label}", short + "/{label}", short)]
    for form in forms:
        if (Path(str(form).format(label=label)) / name).is_file():
            return form
    tried = ", ".join(str(Path(str(form).format(label=label)).relative_to(folder) / name) for form in forms)
    raise DataError(f"the pictures are not beside the list in {folder}", f"one of {tried}")


def _picture(path: Path, size: int) -> Array:
    with open_file(path, LARGEST_PICTURE, "")[0] as file:
        return decoded(file.read(LARGEST_PICTURE), str(path), size=size, formats=("JPEG", "PNG"))


def _check_classes(found: set[str], split: Split, name: str) -> None:
    if found == set(class_list("mini-imagenet", split)):
        return
    for other in get_args(Split):
        if found == set(class_list("mini-imagenet", other)):
            fix = "the file has the wrong name: rename it"
            raise DataError(f"{name} holds the classes of split {other!r}", f"those of {split!r}", fix)
    expected = len(class_list("mini-imagenet", split))
    strangers = sorted(found - set(class_list("mini-imagenet", split)))
    foreign = f", {len(strangers)} of them foreign, such as {strangers[0][:20]!r}" if strangers else ""
    raise DataError(f"{name} holds {len(found)} classes{foreign}", f"the {expected} of split {split!r}")


def _check_count(count: int, label: str, name: str) -> None:
    if count != IMAGES_PER_CLASS:
        raise DataError(f"{name} has {count} images of class {label}", f"{IMAGES_PER_CLASS}", "it was cut short")
