"""The file that keeps what each training measured, with which a run that was killed goes on."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO, final

import torch
from torch import Tensor

from diffopt.errors import HyperparameterError, RandomnessError
from diffopt.tensors.leaves import all_finite

FORMAT = 1


@final
class RetrainingFile:
    """Lines of JSON: what the trainings belong to, and one line for each that is done.

    # NOTE [why a file of trainings survives a kill]
    A line has reached the disk before the next training is waited for. What follows the last end of a line was being
    written when the process ended: it is cut off, and that training is done again.
    """

    def __init__(self, path: Path, header: dict[str, Any], base: Tensor, slack: float) -> None:
        """Begin the file, or read what is there.

        Args:
            path: of the file.
            header: what the trainings belong to; has to be that of the file.
            base: what is measured of the training with all examples.
            slack: by how much that may differ from what the file has.

        Raises:
            HyperparameterError: the file is another call's, or none of trainings.
            RandomnessError: the training is not the one that the file was begun with.
        """
        self.path, self.known = path, dict[int, Tensor]()
        header = {"retrainings": FORMAT, **header}
        content = path.read_bytes() if path.exists() else b""
        lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
        if content and not lines and not content.startswith(b'{"retrainings"'):
            raise self._foreign(content)
        if lines:
            self._compare(lines[0], header, base, slack)
            self.known = dict(self._row(line, base) for line in lines[1:])
        self._file: BinaryIO = path.open("r+b" if path.exists() else "xb")
        self._file.truncate(sum(map(len, lines)))
        self._file.seek(0, os.SEEK_END)
        if not lines:
            self._write({**header, "base": base.tolist()})

    def add(self, number: int, measured: Tensor) -> None:
        """Write what was measured without subset ``number``."""
        self.known[number] = measured
        self._write({"subset": number, "measured": measured.tolist()})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _compare(self, line: bytes, header: dict[str, Any], base: Tensor, slack: float) -> None:
        found = _parsed(line)
        if "retrainings" not in found:
            raise self._foreign(line)
        stored = _numbers(found.pop("base", None))
        differ = [name for name in header if found.get(name) != header[name]]
        if stored is None or stored.shape != base.shape:
            differ.append("metric")
        if differ:
            raise HyperparameterError(
                f"datamodeling_score: {self.path} was begun with another {' and another '.join(differ)}",
                "the trainings of the same call",
                "give another path, or the arguments that it was begun with",
            )
        assert stored is not None
        distance = float((stored - base).abs().max())
        if not distance <= slack:
            raise RandomnessError(
                f"datamodeling_score: the metric of the training with all examples has moved by {distance:.2g} since "
                f"{self.path} was begun",
                "the same training",
                "undo what has changed (the program, its seeds, the number of threads), or give another path",
            )

    def _row(self, line: bytes, base: Tensor) -> tuple[int, Tensor]:
        row = _parsed(line)
        number, measured = row.get("subset"), _numbers(row.get("measured"))
        if not isinstance(number, int) or number < 0 or measured is None or measured.shape != base.shape:
            raise self._foreign(line)
        return number, measured

    def _foreign(self, line: bytes) -> HyperparameterError:
        return HyperparameterError(
            f"datamodeling_score: {self.path} has the line {line[:40]!r}",
            "a file that this function wrote",
            "give another path: nothing is overwritten",
        )


def fingerprint(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's shape and numbers."""
    content = tensor.detach().to("cpu", torch.float64).contiguous().numpy().tobytes()
    return hashlib.sha256(f"{tuple(tensor.shape)}".encode() + content).hexdigest()


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _numbers(value: Any) -> Tensor | None:
    try:
        found = torch.tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        return None
    return found if all_finite([found]) else None
