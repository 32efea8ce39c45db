"""Sets of images in classes: the entry of one (name, splits, forms of its files), and what one split holds."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar, final

from diffopt.tasks.data import Split, check_size, check_split, data_folder, is_there, missing

Content = TypeVar("Content")
Name = TypeVar("Name", bound=str)
Images = TypeVar("Images")
Loaded = TypeVar("Loaded", bound="ClassificationSet[Any]")
Classes: TypeAlias = tuple[Images, tuple[str, ...]]
"""The images of some classes, and their names."""


@final
@dataclass(frozen=True)
class Form(Generic[Content]):
    """One of the forms in which people have a split.

    Attributes:
        files: their names; the form is there where all of them lie in one folder.
        read: what they hold, read from that folder.
        shown: how a message names them, if not by their names.
    """

    files: tuple[str, ...]
    read: Callable[[Path], Content]
    shown: str = ""


@final
@dataclass(frozen=True)
class KnownSet(Generic[Name, Content]):
    """A data set: the entry by which it is found and read.

    Attributes:
        name: in words.
        size: height and width of its images.
        forms: ``forms(split, size)``; the first that is there is read.
        origin: how to obtain the files, in words.
        folder: where else in the data folder they may lie, and are looked for first.
        splits: their names.
    """

    name: str
    size: int
    forms: Callable[[Name, int], Sequence[Form[Content]]]
    origin: str
    folder: str = ""
    splits: tuple[str, ...] = ("train", "validation", "test")

    def find(self, folder: str | Path | None, split: Name, size: int | None = None) -> tuple[Content, tuple[str, ...]]:
        """What the files of a split hold, and their names.

        Raises:
            DataError: the split is unknown, no form of it is there, or a file is not what its name says.
            ProblemError: ``size`` is below 1.
        """
        check_split(split, self.splits)
        size = self.size if size is None else size
        check_size(size)
        root = data_folder(folder)
        places = [root / self.folder, root] if self.folder else [root]
        forms = self.forms(split, size)
        for place in places:
            for form in forms:
                if all(is_there(place / name) for name in form.files):
                    return form.read(place), form.files
        accepted = " or ".join(dict.fromkeys(form.shown or " and ".join(form.files) for form in forms))
        raise missing(f"{self.name} data for split {split!r}", places, accepted, self.origin)


@dataclass(frozen=True, eq=False)
class ClassificationSet(ABC, Generic[Images]):
    """The images of one split of a data set, by class; the data sets are its subclasses.

    Attributes:
        images: uint8 RGB; :func:`diffopt.tasks.sample_episodes` draws few-shot tasks from them.
        class_names: for each class, its name.
        sources: the names of the files that were read.
    """

    images: Images
    class_names: tuple[str, ...]
    sources: tuple[str, ...]
    _known: ClassVar[KnownSet[Any, Any]]

    @classmethod
    def load(cls: type[Loaded], folder: str | Path | None = None, *, split: Split, size: int | None = None) -> Loaded:
        """Read one split from the first of its forms that is there; nothing in a file can run.

        Args:
            folder: where to look; see :func:`diffopt.tasks.data_folder`.
            split: ``train``, ``validation`` or ``test``.
            size: height and width to bring the images to, with Pillow's antialiased bilinear filter; by default
                those of the data set.

        Raises:
            DataError: the split is unknown, no usable file is there, or a file is not what its name says.
            ProblemError: ``size`` is below 1.
        """
        (images, names), sources = cls._known.find(folder, split, size)
        return cls(images, names, sources)
