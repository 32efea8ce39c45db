"""Files that are there whole or not at all: written in one step with a checksum, and believed only if it fits.

# NOTE [how a file is sealed]
A checkpoint is a zip, and torch does not look at the checksums of its members: a flipped bit would be computed with. So
the SHA-256 of all bytes before it is written into the comment at the zip's end, where it does not keep torch from
reading the file. What JSON holds has the checksum of its own canonical form beside it, under ``checksum``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from diffopt.errors import DiffoptError

if sys.platform != "win32":
    import fcntl

SEAL = b"diffopt sha256 "
_DIGITS = 64
MEND = "restore it from a copy, or start without --resume in another --out"


class CheckpointError(DiffoptError, ValueError):
    """A checkpoint or the log beside it is missing, damaged, or of another kind."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write; when all of it has reached the disk, it takes the place of ``path`` in one step.

    Raises:
        OSError: it cannot be written; what was at ``path`` is there still.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.unlink(missing_ok=True)  # of a run that was killed
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk is met while writing, where the system does not know the name
        raise
    _sync_folder(path.parent)


def save_tensors(content: dict[str, Any], path: Path) -> None:
    """Replace the file at ``path`` in one step by tensors, numbers, texts, lists and dictionaries of them, sealed."""
    packed = io.BytesIO()  # not the file: where the disk is full, torch tells it as a defect of its own
    torch.save(content, packed)
    with replacing(path) as file:
        file.write(sealed(packed.getvalue()))


def load_tensors(path: Path, mend: str = MEND) -> Any:
    """Read a file that :func:`save_tensors` wrote, once its checksum is found right; no code of it is run.

    Raises:
        CheckpointError: it is damaged, or would run code.
    """
    try:
        content = path.read_bytes()
        check_seal(content)
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever a damaged or foreign file makes it meet
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:60]}"
        raise CheckpointError(f"{path} is not a readable checkpoint ({reason})", "a whole one", mend) from error


def sealed(archive: bytes) -> bytes:
    """A zip without a comment, with its checksum as comment."""
    length = len(SEAL) + _DIGITS
    marked = archive[:-2] + length.to_bytes(2, "little") + SEAL
    return marked + hashlib.sha256(marked).hexdigest().encode()


def check_seal(archive: bytes) -> None:
    """Refuse a zip that is not as it was written; one without a seal is judged by its members' own checksums.

    Raises:
        ValueError: says what is wrong.
        BadZipFile: it is no zip.
    """
    marked, digest = archive[:-_DIGITS], archive[-_DIGITS:]
    if marked.endswith(SEAL):
        if hashlib.sha256(marked).hexdigest().encode() != digest:
            raise ValueError("its checksum does not fit")
        return
    with zipfile.ZipFile(io.BytesIO(archive)) as members:  # diffopt 0.1 wrote no seal
        entries, stored = members.infolist(), zipfile.ZIP_STORED
        if not _ends_without_comment(archive) or any(entry.compress_type != stored for entry in entries):
            raise ValueError("torch did not write this zip")
        if sum(entry.file_size for entry in entries) > len(archive) or members.testzip() is not None:
            raise ValueError("the checksum of a member does not fit")


def _ends_without_comment(archive: bytes) -> bool:
    end = archive[-22:]  # the length of a zip's last record, and of its comment in the last two bytes
    return end.startswith(b"PK\5\6") and end.endswith(b"\0\0")


def write_json(content: Any, path: Path) -> None:
    """Replace the file at ``path`` in one step."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def checksum(content: Any) -> str:
    """The SHA-256 of what JSON makes of ``content``, however it is laid out in a file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


def lock(file: BinaryIO, path: Path) -> None:
    """Keep other processes from writing the run that ``file`` is part of, until it is closed or this process ends.

    The system holds the lock, not a file: after a kill there is none to clean up. Windows, and file systems that know
    no locks, go without.

    Raises:
        CheckpointError: another process holds it.
    """
    if sys.platform != "win32":
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"another process is writing {path}",
                "one at a time",
                "wait until it has ended, or choose another --out",
            ) from error
        except OSError:
            pass


def check_alone() -> None:
    """Refuse to write the folder that another process of the same job writes too.

    Raises:
        CheckpointError: the environment says that this is not the first process of its job.
    """
    rank = os.environ.get("RANK", "")
    if rank.isdecimal() and int(rank) > 0:
        raise CheckpointError(
            f"RANK is {rank[:20]}: this command is one process of several, which would write one folder",
            "one process",
            "start it without torchrun, or unset RANK",
        )


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened, and the rename is on its way to the disk anyhow
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
