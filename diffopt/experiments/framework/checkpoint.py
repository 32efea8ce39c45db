"""The files that a run can be continued from: a checkpoint, and a log of metrics that is cut back to it.

# NOTE [why a run survives kill -9 at any moment]
A checkpoint replaces its predecessor in one step (``files.replacing``) after its bytes have reached the disk, so there
is always a whole one. The log has reached the disk before the checkpoint that counts its lines; lines after that belong
to iterations that are done again, and are cut off. So nothing is lost and nothing is doubled.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, final

import torch
from torch import Tensor

from diffopt.experiments.framework.files import MEND, CheckpointError, load_tensors, lock, save_tensors
from diffopt.tensors.plain_numbers import is_integer
from diffopt.tensors.tree import describe

FORMAT = 1
KINDS: dict[str, type[Any] | tuple[type[Any], ...]] = {
    "problem": str,
    "options": dict,
    "seconds": (int, float),
    "params": dict,
    "optimizer": dict,
    "generators": dict,
    "log": str,
    "iteration": int,
    "lines": int,
}
"""What a checkpoint holds; ``log`` is the checksum of the log's lines, which that of diffopt 0.1 has not."""


@final
class Checkpoint:
    """The state of a training between two iterations, in a file beside its log; ``iteration`` is that of the file."""

    def __init__(self, path: Path, problem: str, options: dict[str, Any], log: MetricsLog) -> None:
        """Name the file and what it says of the run: the problem, and the options that a resumed run has to share."""
        self.path, self.problem, self.options, self.log = path, problem, options, log
        self.iteration: int | None = None

    def write(self, state: dict[str, Any], seconds: tuple[float, float]) -> None:
        """Replace the file in one step by ``state``: ``iteration``, ``params``, ``optimizer``, ``generators``."""
        self.log.sync()
        head = {"format": FORMAT, "problem": self.problem, "options": self.options, "seconds": seconds[0]}
        save_tensors({**head, "lines": len(self.log.rows), "log": self.log.digest, **state}, self.path)
        self.iteration = state["iteration"]

    def read(self) -> tuple[dict[str, Any], tuple[float, float]] | None:
        """The state and the seconds that it took, the log being read so far as it belongs to it; ``None`` at a start.

        Raises:
            CheckpointError: the file or the log is damaged, or one is not of the other.
        """
        if not self.path.is_file():
            return None
        content = load_checkpoint(self.path, self.problem)
        self.log.read(content["lines"], content.get("log", ""))
        self.iteration = content["iteration"]
        return content, (content["seconds"], 0.0)


def load_checkpoint(path: Path, problem: str) -> dict[str, Any]:
    """Read a file that :class:`Checkpoint` wrote; its content is data only, no code is run.

    Raises:
        CheckpointError: there is none, it is damaged, or another problem's, version's or program's.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}", "one", "check --out, or start without --resume")
    content = load_tensors(path)
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{path} was not written by diffopt train", "one that was", "check --out")
    if content.pop("format") != FORMAT or {*content, "log"} != set(KINDS):
        fix = "resume with that version, or start without --resume in another --out"
        raise CheckpointError(f"{path} was written by another version of diffopt", f"format {FORMAT}", fix)
    for name, value in content.items():
        _check_part(path, name, value)
    if content["problem"] != problem:
        raise CheckpointError(f"{path} is of diffopt train {content['problem'][:20]}", problem, "check --out")
    return content


def _check_part(path: Path, name: str, value: Any) -> None:
    """Refuse a part of a checkpoint that is not of its kind."""
    kind = KINDS[name]
    if kind is int and not (is_integer(value) and value >= 0):
        raise wrong(path, name, describe(value), "an integer, 0 or more")
    if not isinstance(value, kind):
        raise wrong(path, name, describe(value), f"a {getattr(kind, '__name__', 'number')}")
    if name == "optimizer" and set(value) != {"state", "param_groups"}:
        raise wrong(path, name, describe(value), "the state_dict of an optimizer")
    for part in ("episodes", "torch") if name == "generators" else ():
        state = value.get(part)
        if not isinstance(state, Tensor) or state.dtype != torch.uint8:
            raise wrong(path, f"generators[{part!r}]", describe(state), "the state of a generator")


def check_params(path: Path, found: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Refuse parameters that are not those of this run.

    Raises:
        CheckpointError: names the first parameter that is missing, unknown, of another shape or dtype, or not finite.
    """
    for name in [*expected, *found]:
        own, other = expected.get(name), found.get(name)
        here = f"params[{name!r}]"
        if own is None or other is None:
            raise wrong(path, here, "missing" if other is None else "unknown", f"those of {len(expected)} parameters")
        if not isinstance(other, Tensor) or (other.shape, other.dtype) != (own.shape, own.dtype):
            raise wrong(path, here, describe(other), f"{own.dtype} of shape {tuple(own.shape)}")
        if not bool(other.isfinite().all()):
            raise wrong(path, here, "NaN or infinite", "finite numbers")


def wrong(path: Path, part: str, got: str, expected: str) -> CheckpointError:
    """The error for a part of a checkpoint."""
    return CheckpointError(f"{path}: its {part} is {got}", expected, MEND)


@final
class MetricsLog:
    """A file of JSON lines that grows, its lines, and their checksum; one process at a time has it open."""

    def __init__(self, path: Path | None, *, new: bool) -> None:
        """Open the log and lock it; nothing in it is changed, and a ``new`` one has to be empty.

        Without a path there is no file, as on a rank that is not the one to write.

        Raises:
            CheckpointError: another process has it open, it is no plain file, or it is to be new and has lines.
        """
        self.path, self.rows = path, list[dict[str, Any]]()
        self._digest, self._end = hashlib.sha256(), 0
        self._file: BinaryIO = io.BytesIO()
        if path is None:
            return
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


def left_over(path: Path) -> CheckpointError:
    """The error where a new run would take the place of what is left of another."""
    return CheckpointError(
        f"{path} is left of a run that cannot be continued",
        "an unused folder, for nothing is overwritten",
        "choose another --out, or move it away",
    )
