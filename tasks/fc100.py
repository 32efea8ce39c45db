"""FC100: the hundred classes of CIFAR-100 split by superclass into 60, 20 and 20."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import final

from torch import Tensor

from diffopt.tasks.cifar100 import archive_classes, load_classes
from diffopt.tasks.class_lists import class_list
from diffopt.tasks.data import Split, check_split, expanded


@final
@dataclass(frozen=True, eq=False)
class FC100:
    """The images of one split: 600 of each class, 32x32 in colour.

    The split is by superclass, so that training and test classes differ more than those of CIFAR-FS: 12
    superclasses (60 classes) for training, 4 (20) for validation, 4 (20) for testing, none in two of them.
    :func:`diffopt.tasks.sample_episodes` draws few-shot tasks from ``images``.

    Memory: 111 MB for the training split at 32x32 (a byte a value; floats are made of what is drawn only). While
    it is loaded, 0.6 GB. The images come without a licence; cite the report.

    Reference: split: Oreshkin, Rodriguez, Lacoste (2018), "TADAM: Task dependent adaptive metric for improved
    few-shot learning". Images: Krizhevsky (2009), "Learning multiple layers of features from tiny images".

    Attributes:
        images: uint8 RGB, ``[classes, 600, 3, size, size]``.
        class_names: for each class, its name in CIFAR-100; sorted.
        sources: the names of the files that were read.
    """

    images: Tensor
    class_names: tuple[str, ...]
    sources: tuple[str, ...]

    @classmethod
    def load(cls, folder: str | Path | None = None, *, split: Split, size: int = 32) -> FC100:
        """Read one split from the official ``cifar-100-python.tar.gz``, or from what was extracted of it.

        The files are checked (the archive: 169,001,437 bytes and SHA-256; extracted: MD5), and nothing in them
        can run. Takes some seconds, whatever the split: every split has images in both halves of CIFAR-100.

        Args:
            folder: where to look; see :func:`diffopt.tasks.data_folder`.
            split: ``train`` (60 classes), ``validation`` (20) or ``test`` (20).
            size: height and width to bring the images to, with Pillow's antialiased bilinear filter.

        Raises:
            DataError: the split is unknown, no usable file is there, or a file is not what its name says.
            ProblemError: ``size`` is below 1.
        """
        check_split(split)
        names = class_list("fc100", split)
        images, sources = load_classes(folder, names, size, f"FC100 data for split {split!r}")
        return cls(images, names, sources)

    @classmethod
    def from_archive(cls, path: str | Path, *, split: Split, size: int = 32) -> FC100:
        """Read one split from an archive of the official layout, with any checksum and number of images.

        Raises:
            DataError: the split is unknown, or the archive does not hold what the layout promises.
            ProblemError: ``size`` is below 1.
        """
        check_split(split)
        names = class_list("fc100", split)
        images, sources = archive_classes(expanded(path), names, size)
        return cls(images, names, sources)
