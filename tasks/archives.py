"""Reading members of archives where they lie: nothing is ever extracted, and no size is believed."""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple, final

import numpy as np

from diffopt.tasks.data import open_file, whole
from diffopt.tasks.errors import DataError
from diffopt.tasks.pickled_arrays import Array

_BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, ValueError, OverflowError)
BROKEN_ZIP = (*_BROKEN, zipfile.BadZipFile, KeyError, MemoryError, NotImplementedError, RuntimeError)
"""What the standard library raises on a zip that is damaged, encrypted, or packed in a way it does not know."""
_GZIP = b"\x1f\x8b"


class Member(NamedTuple):
    """One file of an archive, to be read before the next is asked for.

    Attributes:
        name: as it was asked for.
        stream: its content.
        size: in bytes.
    """

    name: str
    stream: BinaryIO
    size: int


def tar_members(path: Path, wanted: Mapping[str, int], limit: int) -> Iterator[Member]:
    """Files of a tar, plain or gzipped, in the order they are stored.

    The archive is read as a stream, once, up to the last wanted file. Only plain files are looked at: links,
    devices and sparse files are passed over, and paths serve for nothing but comparison.

    Args:
        path: the archive.
        wanted: the ends of the paths in the archive, and the largest size in bytes that each may have.
        limit: how many bytes may come out of the archive before the last wanted file is found. A small file
            that decompresses to more is refused there and then.

    Raises:
        DataError: the archive is missing, no tar or cut short, lacks a wanted file or holds one twice, or a
            size is above its limit.
    """
    left = dict(wanted)
    file, _ = open_file(path)
    with file:
        zipped = file.read(2) == _GZIP
        file.seek(0)
        unpacked = gzip.GzipFile(fileobj=file) if zipped else file
        bounded = _Bounded(unpacked, limit, str(path))  # type: ignore[arg-type]
        with (
            whole(f"{path} cannot be read as a tar", "a whole archive", _BROKEN),
            tarfile.open(fileobj=bounded, mode="r|") as archive,
        ):
            for entry in archive:
                # NOTE [why sizes are looked at before the next header]
                # A negative size would send the reader back to where it was, for ever; a huge one would have it
                # skip beyond the end, block by block.
                if not 0 <= entry.size <= limit:
                    got = f"{path} claims a file of {entry.size:,} bytes"
                    raise DataError(got, f"0 to {limit:,}", "the archive is damaged: download it again")
                yield from _member(archive, entry, left, wanted, path)
                if not left:
                    return
    fix = "this is another archive, or it was cut short"
    raise DataError(f"{path} has no file {' or '.join(sorted(left))}", "an archive with it", fix)


def _member(
    archive: tarfile.TarFile, entry: tarfile.TarInfo, left: dict[str, int], wanted: Mapping[str, int], path: Path
) -> Iterator[Member]:
    """The entry, if it is wanted; refused if it is wanted and not as expected."""
    name = next((one for one in wanted if f"/{entry.name}".endswith(f"/{one}")), None)
    if name is None or entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or entry.issparse():
        return
    if name not in left:
        raise DataError(f"{path} holds {name} twice", "it once", "this is another archive")
    if entry.size > left.pop(name):
        raise DataError(f"{path} holds {name} with {entry.size:,} bytes", f"{wanted[name]:,} at most")
    stream = archive.extractfile(entry)  # opens the member for reading; writes nothing
    assert stream is not None
    yield Member(name, stream, entry.size)  # type: ignore[arg-type]


@final
class _Bounded(io.RawIOBase):
    """A stream that refuses to give more than ``limit`` bytes."""

    def __init__(self, stream: BinaryIO, limit: int, name: str) -> None:
        super().__init__()
        self._stream, self._left, self._limit, self._name = stream, limit, limit, name

    def read(self, size: int = -1) -> bytes:
        """The next bytes, as many as asked for if there are."""
        content = self._stream.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(content)
        if self._left < 0:
            got = f"{self._name} unpacks to more bytes than there may be"
            raise DataError(got, f"{self._limit:,} at most", "this is no archive of this data")
        return content


def npz_arrays(content: bytes, name: str, expected: Mapping[str, tuple[str, int]], limit: int) -> dict[str, Array]:
    """Arrays of a numpy ``.npz``, read with ``allow_pickle=False``.

    Args:
        content: the file.
        name: its name, for messages.
        expected: for each array, its dtype's kind and size, such as ``u1``, or only its kind, such as ``U``;
            and its number of axes.
        limit: the largest size in bytes of all arrays together.

    Raises:
        DataError: the file is no ``.npz`` or is damaged, lacks an array, or one is larger or other than expected.
    """
    with whole(f"{name} cannot be read as .npz", "a whole file", BROKEN_ZIP):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            total = sum(entry.file_size for entry in archive.infolist())
        if total > limit:
            raise DataError(f"{name} unpacks to {total:,} bytes", f"{limit:,} at most")
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            if lacking := sorted(expected.keys() - set(file.files)):
                found = ", ".join(map(repr, file.files[:8])) or "nothing"
                raise DataError(f"{name} holds {found}", f"{', '.join(lacking)} too", "this is another file")
            arrays = {key: file[key] for key in expected}
    for key, (kind, axes) in expected.items():
        one = arrays[key]
        if not one.dtype.str[1:].startswith(kind) or one.ndim != axes:
            raise DataError(f"{name} holds {key} as {one.dtype} of shape {one.shape}", f"{axes} axes of {kind}")
    return arrays
