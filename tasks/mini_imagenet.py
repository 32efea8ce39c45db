"""miniImageNet: a hundred classes of ImageNet at 84x84."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

from torch import Tensor

from diffopt.tasks.archives import tar_members
from diffopt.tasks.class_lists import class_list
from diffopt.tasks.data import KnownFile, Split, check_size, check_split, data_folder, is_there, missing
from diffopt.tasks.mini_imagenet_files import LARGEST_PICKLE, SHORT, listed_images, pickled_images
from diffopt.tasks.pickles import load_pickle, read_pickle

ARCHIVE = KnownFile("mini-imagenet.tar.gz", None, md5="b38f1eb4251fb9459ecc8e7febf9b2eb")
LARGEST_ARCHIVE = 3_000_000_000
ORIGIN = (
    "ImageNet's terms forbid passing the images on: ask at https://image-net.org, and make the set by the lists at "
    "https://github.com/twitter-research/meta-learning-lstm/tree/master/data/miniImagenet. Prepared pickles: "
    "https://github.com/renmengye/few-shot-ssl-public"
)


@final
@dataclass(frozen=True, eq=False)
class MiniImageNet:
    """The images of one split: 600 of each class, 84x84 in colour.

    The split is that of Ravi and Larochelle, by class: 64 for training, 16 for validation, 20 for testing, no class
    in two of them. Vinyals et al. chose other classes; figures on the two are not comparable.
    :func:`diffopt.tasks.sample_episodes` draws few-shot tasks from ``images``.

    Memory: 813 MB for the training split at 84x84 (a byte a value; floats are made of what is drawn only), 118 MB
    at 32x32. While a pickle is loaded, 1.6 GB at the peak. Licence: ImageNet's terms of access; research only.

    Reference: Vinyals et al. (2016), "Matching networks for one shot learning"; the split: Ravi, Larochelle (2017),
    "Optimization as a model for few-shot learning"; the images: Russakovsky et al. (2015), "ImageNet large scale
    visual recognition challenge".

    Attributes:
        images: uint8 RGB, ``[classes, 600, 3, size, size]``.
        class_names: for each class, its WordNet identifier, such as ``n01532829``; sorted.
        sources: the names of the files that were read.
    """

    images: Tensor
    class_names: tuple[str, ...]
    sources: tuple[str, ...]

    @classmethod
    def load(cls, folder: str | Path | None = None, *, split: Split, size: int = 84) -> MiniImageNet:
        """Read one split from the first of the forms that is there, in ``folder`` or in its ``mini-imagenet``.

        - ``mini-imagenet-cache-train.pkl``, ``-val.pkl`` (or ``-validation.pkl``), ``-test.pkl``: dictionaries of
          ``image_data``, uint8 ``[images, 84, 84, 3]``, and ``class_dict``, the places of each class's images.
        - ``train.csv``, ``val.csv``, ``test.csv`` of Ravi and Larochelle (``filename,label``) beside the pictures,
          JPEG or PNG of any size: ``images/NAME``, or in class folders, ``LABEL/NAME``, ``images/LABEL/NAME`` or
          ``train/LABEL/NAME`` (``val``, ``test``). Takes minutes where the pictures are ImageNet's own.
        - ``mini-imagenet.tar.gz``, the archive of those pickles; checked by MD5.

        Pickles and lists have no checksum of their own: classes, numbers and shapes are checked instead. Nothing
        in a pickle can run.

        Args:
            folder: where to look; see :func:`diffopt.tasks.data_folder`.
            split: ``train`` (64 classes), ``validation`` (16) or ``test`` (20).
            size: height and width to bring the images to, with Pillow's antialiased bilinear filter.

        Raises:
            DataError: the split is unknown, no usable file is there, or a file is not what its name says.
            ProblemError: ``size`` is below 1.
        """
        check_split(split)
        check_size(size)
        names = class_list("mini-imagenet", split)
        places = [data_folder(folder) / "mini-imagenet", data_folder(folder)]
        pickles = [f"mini-imagenet-cache-{one}.pkl" for one in dict.fromkeys((SHORT[split], split))]
        for place in places:
            for name in pickles:
                if is_there(place / name):
                    table = load_pickle(place / name, LARGEST_PICKLE)
                    return cls(pickled_images(table, str(place / name), split, size), names, (name,))
            csv = place / f"{SHORT[split]}.csv"
            if is_there(csv):
                return cls(listed_images(csv, split, size), names, (csv.name,))
            if is_there(place / ARCHIVE.name):
                path = ARCHIVE.check(place)
                (table,) = (
                    read_pickle(member.stream, member.size, f"{path}: {member.name}")
                    for member in tar_members(path, {pickles[0]: LARGEST_PICKLE}, LARGEST_ARCHIVE)
                )
                return cls(pickled_images(table, f"{path}: {pickles[0]}", split, size), names, (ARCHIVE.name,))
        accepted = f"{' or '.join(pickles)}, or {SHORT[split]}.csv beside the pictures, or {ARCHIVE.name}"
        raise missing(f"miniImageNet data for split {split!r}", places, accepted, ORIGIN)
