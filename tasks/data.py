"""Where data lies, whether a file is the one it claims to be, and what to say when it is not there."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias, final, get_args

from diffopt.tasks.errors import DataError, ProblemError
from diffopt.tensors.tree import describe

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
            raise DataError(f"folder is {describe(folder)}", "a path, a str or a Path")
        return expanded(folder)
    if chosen := os.environ.get(ENVIRONMENT_VARIABLE):
        return expanded(chosen)
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "diffopt"


def expanded(path: str | Path) -> Path:
    """A path with its leading ``~`` replaced.

    Raises:
        DataError: the system knows no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(f"{path} cannot be read ({error})", "a path", "write it without ~") from error


def check_split(split: str, splits: Sequence[str] = get_args(Split)) -> None:
    """Refuse what is not one of the splits.

    Raises:
        DataError: it is not.
    """
    if split not in splits:
        raise DataError(f"split is {split!r}", f"one of {', '.join(splits)}")


def check_size(size: int) -> None:
    """Refuse images without pixels.

    Raises:
        ProblemError: ``size`` is below 1.
    """
    if size < 1:
        raise ProblemError(f"size is {size}", "the height and width of the images, 1 or more")


def missing(what: str, places: Sequence[Path], accepted: str, origin: str) -> DataError:
    """The error to raise where none of the accepted files of a data set is there.

    Args:
        what: the data set and the split, in words.
        places: where it was looked for.
        accepted: the names of the files, in words.
        origin: how to obtain them, in words.
    """
    there = [place for place in places if is_there(place) and place.is_dir()]
    state = "it has none of the accepted files" if there else "there is no such folder"
    return DataError(
        f"no {what} in {' or '.join(map(str, places))}: {state}", accepted, f"put it there ({origin}), or {HOW_TO_SET}"
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

    def read(self, folder: Path, limit: int | None = None) -> bytes:
        """The content of this file in ``folder``, once its size and checksum are found right.

        Args:
            folder: where it lies.
            limit: the largest size in bytes, where the size is not known.

        Raises:
            DataError: the file is not there or cannot be read, or its size or checksum is wrong.
        """
        path, file = self._opened(folder, limit)
        with reading(path), file:
            content = file.read()
        self._compare(path, [content])
        return content

    def check(self, folder: Path) -> Path:
        """Where this file is in ``folder``, once its size and checksum are found right; for files beyond memory.

        Raises:
            DataError: as :meth:`read`.
        """
        path, file = self._opened(folder, None)
        with reading(path), file:
            self._compare(path, iter(partial(file.read, CHUNK), b""))
        return path

    def _opened(self, folder: Path, limit: int | None) -> tuple[Path, BinaryIO]:
        path = folder / self.name
        file, size = open_file(path, limit, _DAMAGED)
        if self.size not in (None, size):
            file.close()
            raise DataError(f"{path} has {size:,} bytes", f"{self.size:,}", _DAMAGED)
        return path, file

    def _compare(self, path: Path, content: Iterable[bytes]) -> None:
        digest = hashlib.sha256() if self.sha256 else hashlib.md5(usedforsecurity=False)
        for part in content:
            digest.update(part)
        name, expected = ("SHA-256", self.sha256) if self.sha256 else ("MD5", self.md5)
        if digest.hexdigest() != expected:
            raise DataError(f"{path} has {name} {digest.hexdigest()}", expected, _DAMAGED)


def read_one_of(alternatives: Sequence[KnownFile], folder: Path) -> bytes:
    """The content of a file that is known in several forms, of one name and different sizes.

    Raises:
        DataError: as :meth:`KnownFile.read`; the size is that of none of them.
    """
    path = folder / alternatives[0].name
    file, size = open_file(path)
    file.close()
    for known in alternatives:
        if known.size == size:
            return known.read(folder)
    expected = " or ".join(f"{known.size:,}" for known in alternatives)
    raise DataError(f"{path} has {size:,} bytes", expected, _DAMAGED)


def open_file(path: Path, limit: int | None = None, fix: str = "this is another file") -> tuple[BinaryIO, int]:
    """A file opened for reading, and its size in bytes.

    Raises:
        DataError: it is not there, cannot be read, is larger than ``limit`` bytes, or is no plain file: to open a pipe
            would wait for ever, and a device may have no end.
    """
    with reading(path):
        plain_size(path)
        file = path.open("rb")
        size = os.fstat(file.fileno()).st_size
    if limit is not None and size > limit:
        file.close()
        raise DataError(f"{path} has {size:,} bytes", f"{limit:,} at most", fix)
    return file, size


def plain_size(path: Path) -> int:
    """The size of a file in bytes, looked at before it is opened.

    Raises:
        DataError: it is a pipe or a device; of a folder the system says so itself, when it is opened.
        OSError: it is not there.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise DataError(f"{path} cannot be read: it is a pipe or a device", "a file", HOW_TO_SET)
    return found.st_size


def is_there(path: Path) -> bool:
    """Whether there is anything at ``path``.

    Raises:
        DataError: the system will not say, such as of a name that is too long or a folder that is closed.
    """
    with reading(path):
        return path.exists()


@contextmanager
def whole(got: str, expected: str, broken: tuple[type[Exception], ...], fix: str = "") -> Iterator[None]:
    """Within it, what the standard library raises on a damaged file is a :class:`DataError`."""
    try:
        yield
    except DataError:
        raise
    except broken as error:
        usual = "the download was cut short or damaged: download it again"
        raise DataError(f"{got} ({str(error)[:100]})", expected, fix or usual) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within it, what the system says where it will not let a file be read is a :class:`DataError`."""
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise DataError(f"{str(path)[:200]} cannot be read: {reason}", "a file", HOW_TO_SET) from error


_DAMAGED = "the download was cut short or this is another file: delete it and download it again"
