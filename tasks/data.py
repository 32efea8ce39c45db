"""Where data lies, whether a file is the one it claims to be, and what to say when it is not there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias, final, get_args

from diffopt.tasks.errors import DataError, ProblemError
from diffopt.tree import describe

Split: TypeAlias = Literal["train", "validation", "test"]

ENVIRONMENT_VARIABLE = "DIFFOPT_DATA"
HOW_TO_SET = f"set --data-dir, `folder` or {ENVIRONMENT_VARIABLE} to where the data is"
CHUNK = 1 << 20


def data_folder(folder: str | Path | None = None) -> Path:
    """The folder that data is read from; nothing is created and nothing is downloaded.

    The first of: ``folder``; the environment variable ``DIFFOPT_DATA`` if it is set and not empty;
    ``diffopt`` in the user's cache directory (``XDG_CACHE_HOME``, else ``~/.cache``). A leading ``~`` is
    expanded.
    """
    if folder is not None:
        if not isinstance(folder, str | Path):
            raise DataError(f"folder is {describe(folder)}; expected a path, a str or a Path")
        return Path(folder).expanduser()
    if chosen := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffopt"


def check_split(split: str) -> None:
    """Refuse what is not one of the three splits.

    Raises:
        DataError: it is not.
    """
    if split not in get_args(Split):
        raise DataError(f"split is {split!r}; expected one of {', '.join(get_args(Split))}")


def check_size(size: int) -> None:
    """Refuse images without pixels.

    Raises:
        ProblemError: ``size`` is below 1.
    """
    if size < 1:
        raise ProblemError(f"size is {size}; expected the height and width of the images, 1 or more")


def missing(what: str, places: Sequence[Path], accepted: str, origin: str) -> DataError:
    """The error to raise where none of the accepted files of a data set is there.

    Args:
        what: the data set and the split, in words.
        places: where it was looked for.
        accepted: the names of the files, in words.
        origin: how to obtain them, in words.
    """
    there = [place for place in places if place.is_dir()]
    state = "it has none of the accepted files" if there else "there is no such folder"
    return DataError(
        f"no {what} in {' or '.join(map(str, places))}: {state}. Put there {accepted}; {origin}. Or {HOW_TO_SET}"
    )


@final
@dataclass(frozen=True)
class KnownFile:
    """A file whose every byte is known.

    Attributes:
        name: the file's name, or its path within the data folder.
        size: in bytes; ``None`` if not known.
        sha256: in hexadecimal; empty if not known.
        md5: in hexadecimal; looked at only where SHA-256 is not known.
    """

    name: str
    size: int | None
    sha256: str = ""
    md5: str = ""

    def read(self, folder: Path) -> bytes:
        """The content of this file in ``folder``, once its size and checksum are found right.

        Raises:
            DataError: the file is not there or cannot be read, or its size or checksum is wrong.
        """
        path = self._sized(folder)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise unreadable(path, error) from error
        digest = self._hash()
        digest.update(content)
        self._compare(path, digest.hexdigest())
        return content

    def check(self, folder: Path) -> Path:
        """Where this file is in ``folder``, once its size and checksum are found right; for files beyond memory.

        Raises:
            DataError: as :meth:`read`.
        """
        path = self._sized(folder)
        digest = self._hash()
        try:
            with path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
        except OSError as error:
            raise unreadable(path, error) from error
        self._compare(path, digest.hexdigest())
        return path

    def _sized(self, folder: Path) -> Path:
        path = folder / self.name
        try:
            size = path.stat().st_size
        except OSError as error:
            raise unreadable(path, error) from error
        if self.size is not None and size != self.size:
            raise DataError(f"{path} has {size:,} bytes; expected {self.size:,}. {_DAMAGED}")
        return path

    def _hash(self) -> hashlib._Hash:
        return hashlib.sha256() if self.sha256 else hashlib.md5(usedforsecurity=False)

    def _compare(self, path: Path, digest: str) -> None:
        name, expected = ("SHA-256", self.sha256) if self.sha256 else ("MD5", self.md5)
        if digest != expected:
            raise DataError(f"{path} has {name} {digest}; expected {expected}. {_DAMAGED}")


def read_one_of(alternatives: Sequence[KnownFile], folder: Path) -> bytes:
    """The content of a file that is known in several forms, of one name and different sizes.

    Raises:
        DataError: as :meth:`KnownFile.read`; the size is that of none of them.
    """
    path = folder / alternatives[0].name
    try:
        size = path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from error
    for known in alternatives:
        if known.size == size:
            return known.read(folder)
    expected = " or ".join(f"{known.size:,}" for known in alternatives)
    raise DataError(f"{path} has {size:,} bytes; expected {expected}. {_DAMAGED}")


def open_file(path: Path) -> tuple[BinaryIO, int]:
    """A file opened for reading, and its size in bytes.

    Raises:
        DataError: it is not there, or cannot be read.
    """
    try:
        file = path.open("rb")
        return file, os.fstat(file.fileno()).st_size
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> DataError:
    """The error to raise where the system will not let a file be read."""
    return DataError(f"{path} cannot be read: {error.strerror}; expected a file: {HOW_TO_SET}")


_DAMAGED = "The download was cut short or this is another file: delete it and download it again"
