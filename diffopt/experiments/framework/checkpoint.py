"""The files that a run can be continued from: a checkpoint, and a log of metrics that is cut back to it.

# NOTE [why a run survives kill -9 at any moment]
A checkpoint replaces its predecessor in one step (``files.replacing``) after its bytes have reached the disk, so there
is always a whole one. The log has reached the disk before the checkpoint that counts its lines; lines after that belong
to iterations that are done again, and are cut off. So nothing is lost and nothing is doubled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, final

from torch import Tensor

from diffopt.experiments.framework.checkpoint_content import CheckpointError, check_content
from diffopt.experiments.framework.files import load_tensors, lock, save_tensors

FORMAT = 1


@final
@dataclass(frozen=True)
class Checkpoint:
    """All that decides how a run goes on.

    Attributes:
        problem: the name of the problem.
        options: the options that the run was started with.
        iteration: how many iterations are done.
        seconds: how long they took.
        lines: how many lines the log of metrics had.
        params: the parameters.
        optimizer: the state of the outer optimizer.
        generators: the state of every generator, by name.
        log: the checksum of these lines; empty if an earlier version of diffopt wrote the checkpoint.
    """

    problem: str
    options: dict[str, Any]
    iteration: int
    seconds: float
    lines: int
    params: dict[str, Tensor]
    optimizer: dict[str, Any]
    generators: dict[str, Tensor]
    log: str = ""

    def save(self, path: Path) -> None:
        """Replace the file at ``path`` in one step."""
        save_tensors({"format": FORMAT, **{item.name: getattr(self, item.name) for item in fields(self)}}, path)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a file that :meth:`save` wrote; its content is data only, no code is run.

        Raises:
            CheckpointError: there is none, it is damaged, or another version or program wrote it.
        """
        if not path.is_file():
            raise CheckpointError(f"there is no checkpoint {path}", "one", "check --out, or start without --resume")
        content = load_tensors(path)
        names = {item.name for item in fields(cls)}
        if not isinstance(content, dict) or "format" not in content:
            raise CheckpointError(f"{path} was not written by diffopt train", "one that was", "check --out")
        if content.pop("format") != FORMAT or {*content, "log"} != names:
            raise CheckpointError(
                f"{path} was written by another version of diffopt",
                f"format {FORMAT}",
                "resume with that version, or start without --resume in another --out",
            )
        check_content(path, content)
        return cls(**content)


@final
class MetricsLog:
    """A file of JSON lines that grows, its lines, and their checksum; one process at a time has it open."""

    def __init__(self, path: Path, *, new: bool) -> None:
        """Open the log and lock it; nothing in it is changed, and a ``new`` one has to be empty.

        Raises:
            CheckpointError: another process has it open, it is no plain file, or it is to be new and has lines.
        """
        self.path, self.rows = path, list[dict[str, Any]]()
        self._digest, self._end = hashlib.sha256(), 0
        if path.exists() and not path.is_file():  # to open a pipe would wait for ever
            raise CheckpointError(f"{path} is not a plain file", "the log of a run", "choose another --out")
        self._file = path.open("a+b" if new else "r+b")
        try:
            lock(self._file, path)
            if new and os.fstat(self._file.fileno()).st_size:
                raise left_over(path)
        except BaseException:
            self._file.close()
            raise

    def read(self, count: int | None = None, digest: str = "") -> None:
        """Read the first ``count`` lines, or all that have an end; :meth:`cut` takes what follows away.

        Raises:
            CheckpointError: it has fewer lines, other ones, or their checksum is not ``digest``.
        """
        self._file.seek(0)
        content = self._file.read()
        lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)[:count]
        mend = "restore it from a copy, or start again in another --out"
        if count is not None and len(lines) < count:
            raise CheckpointError(
                f"{self.path} has {len(lines)} lines", f"{count} as when the checkpoint beside it was written", mend
            )
        try:
            self.rows = [json.loads(line) for line in lines]
            if not all(isinstance(row, dict) for row in self.rows):
                raise ValueError("no dictionary")
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{self.path} has a line that is no JSON ({str(error)[:60]})", "the log of this run", mend
            ) from error
        kept = b"".join(lines)
        self._digest, self._end = hashlib.sha256(kept), len(kept)
        if digest not in ("", self.digest):
            raise CheckpointError(
                f"{self.path} has been changed since the checkpoint beside it was written", "the same lines", mend
            )

    def cut(self) -> None:
        """Take away what follows the lines that were read."""
        self._file.truncate(self._end)
        self._file.seek(0, os.SEEK_END)

    @property
    def digest(self) -> str:
        """The SHA-256 of all lines."""
        return self._digest.hexdigest()

    def append(self, row: dict[str, Any]) -> None:
        """Add one line.

        Raises:
            OSError: the disk is full; the line may be there in part, and is cut off when the run is resumed.
        """
        line = json.dumps(row).encode() + b"\n"
        with self._named_errors():
            self._file.write(line)
            self._file.flush()
        self.rows.append(row)
        self._digest.update(line)

    def sync(self) -> None:
        """Wait until all lines have reached the disk."""
        with self._named_errors():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with self._named_errors():
            self._file.close()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = str(self.path)
            raise


@final
class NoLog:
    """The log of a process that is not the one to write: it keeps the lines, for what is asked of them."""

    def __init__(self, rows: Sequence[dict[str, Any]] = ()) -> None:
        """Begin with the lines that were read of a run that goes on."""
        self.rows, self.digest = list(rows), ""

    def cut(self) -> None:
        """There is no file."""

    def append(self, row: dict[str, Any]) -> None:
        """Keep a line."""
        self.rows.append(row)

    def sync(self) -> None:
        """There is no file."""

    def close(self) -> None:
        """There is no file."""


def left_over(path: Path) -> CheckpointError:
    """The error where a new run would take the place of what is left of another."""
    return CheckpointError(
        f"{path} is left of a run that cannot be continued",
        "an unused folder, for nothing is overwritten",
        "choose another --out, or move it away",
    )
