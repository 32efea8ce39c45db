"""The files that a run can be continued from: a checkpoint, and a log of metrics that is cut back to it.

# NOTE [why a run survives kill -9 at any moment]
A checkpoint replaces its predecessor in one step (``os.replace``) after its bytes have reached the disk, so there is
always a whole one. The log has reached the disk before the checkpoint that counts its lines; lines after that belong
to iterations that are done again, and are cut off. So nothing is lost and nothing is doubled.
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, final

import torch
from torch import Tensor

from diffopt.commands.checkpoint_content import CheckpointError, check_content

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
    """

    problem: str
    options: dict[str, Any]
    iteration: int
    seconds: float
    lines: int
    params: dict[str, Tensor]
    optimizer: dict[str, Any]
    generators: dict[str, Tensor]

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
            raise CheckpointError(
                f"there is no checkpoint {path}, expected one: check --out, or start without --resume"
            )
        content = load_tensors(path)
        names = {item.name for item in fields(cls)}
        if not isinstance(content, dict) or "format" not in content:
            raise CheckpointError(f"{path} was not written by diffopt train, expected one that was: check --out")
        if content.pop("format") != FORMAT or set(content) != names:
            raise CheckpointError(
                f"{path} was written by another version of diffopt, expected format {FORMAT}: "
                "resume with that version, or start without --resume in another --out"
            )
        check_content(path, content)
        return cls(**content)


@final
class MetricsLog:
    """A file of JSON lines that grows, and its lines."""

    def __init__(self, path: Path, keep: int = 0) -> None:
        """Open the log, cut back to its first ``keep`` lines; 0 makes it anew.

        Raises:
            CheckpointError: it has fewer lines, or other ones.
        """
        lines = path.read_bytes().splitlines(keepends=True)[:keep] if keep else []
        if len(lines) < keep or not all(line.endswith(b"\n") for line in lines):
            raise CheckpointError(
                f"{path} has {len(lines)} lines, expected {keep} as when the checkpoint beside it was written: "
                "restore it from a copy, or start again in another --out"
            )
        try:
            self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        except ValueError as error:
            raise CheckpointError(
                f"{path} has a line that is no JSON ({str(error)[:60]}), expected the log of this run: restore it from "
                "a copy, or start again in another --out"
            ) from error
        self._file = path.open("r+b" if keep else "wb")
        self._file.truncate(sum(len(line) for line in lines))
        self._file.seek(0, os.SEEK_END)

    def append(self, row: dict[str, Any]) -> None:
        """Add one line."""
        self.rows.append(row)
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until all lines have reached the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def save_tensors(content: dict[str, Any], path: Path) -> None:
    """Replace the file at ``path`` in one step by tensors, numbers, texts, lists and dictionaries of them."""
    with replacing(path) as file:
        torch.save(content, file)


def load_tensors(path: Path) -> Any:
    """Read a file that :func:`save_tensors` wrote; its content is data only, no code is run.

    Raises:
        CheckpointError: it is damaged, or would run code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} is not a readable checkpoint ({type(error).__name__}), expected a whole one: "
            "restore it from a copy, or delete it and start without --resume"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write; when all of it has reached the disk, it takes the place of ``path`` in one step."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened, and the rename is on its way to the disk anyhow
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
