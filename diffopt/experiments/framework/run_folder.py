"""The folder of one run: what it was started with, its log of metrics, and what is not overwritten.

# NOTE [why a reproduction survives kill -9 at any moment]
``run.json`` is written once, whole, before anything else, and says what the run computes; to resume under anything else
is an error. A finished unit is one line of ``metrics.jsonl``, written in one call and on the disk before the next unit
begins; its checksum is bound to ``run.json``. A line without its end is the trace of a kill, and is cut off. So a unit
is there whole or not at all, and what is there is not computed again.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch

import diffopt
from diffopt.experiments.framework.checkpoint import MetricsLog, left_over
from diffopt.experiments.framework.experiment import ExperimentError, Row
from diffopt.experiments.framework.files import CheckpointError, checksum
from diffopt.experiments.framework.flags import RunOptions, check_stored, to_store
from diffopt.experiments.framework.options import MOST_THREADS, OptionError, expanded, option, real, whole

FORMAT = 1
AGAIN = "restore it from a copy, or start again in another --out"


@dataclass(frozen=True)
class ReproduceOptions(RunOptions):
    """The options of ``diffopt reproduce``."""

    experiment: str = option("", "the experiment", None)
    scale: str = option("standard", "the scale", None, ("quick", "standard", "full"))
    changed: tuple[str, ...] = option((), "--set", None)
    out: str = option("", "folder of the run (default: runs/reproduce/NAME)")
    minutes: float | None = option(None, "stop in time to be done after so many minutes of this call", real(0))
    threads: int = option(1, "CPU threads", whole(1, MOST_THREADS))
    data_dir: str | None = option(None, "where the data is; default: $DIFFOPT_DATA, else the user's cache")


@final
@dataclass(frozen=True)
class Header(ReproduceOptions):
    """The options of a run, and what else decides its numbers: all settings, the machine and the versions."""

    settings: Mapping[str, Any] = option(None, "settings", None)
    device_name: str = option("", "device_name", None)
    torch: str = option("", "torch", None)
    diffopt: str = option("", "diffopt", None)

    @classmethod
    def now(cls, options: ReproduceOptions, settings: Any) -> Header:
        """The header of a run on this machine, with these versions."""
        plain, name = json.loads(json.dumps(asdict(settings))), device_name(options.device)
        found = {"settings": plain, "device_name": name, "torch": torch.__version__, "diffopt": diffopt.__version__}
        return cls(**{**vars(options), **found})

    @classmethod
    def of(cls, content: dict[str, Any]) -> Header:
        """The header that a file holds.

        Raises:
            ValueError: a field is missing, unknown, or not what the command line can make it.
        """
        stored = {**content, "changed": tuple(content["changed"])}
        check_stored(cls, stored)
        if not all(isinstance(change, str) for change in stored["changed"]):
            raise ValueError("changed is no list of texts")
        return cls(**stored)

    def check_same(self, stored: Header) -> None:
        """Refuse to go on with a run of other settings, versions or devices: its numbers would be of two kinds.

        Raises:
            OptionError: names the first difference.
        """
        for name, there in to_store(stored).items():
            if (here := getattr(self, name)) != there:
                fix = "start a new run in another --out"
                raise OptionError(f"{name} is {here} here", f"{there} as in the run to resume", fix)

    def fingerprint(self) -> str:
        """A checksum of all that is stored; it goes into what is computed under this header."""
        return checksum(to_store(self))

    def command(self) -> str:
        """What to type to run this again."""
        words = ["diffopt", "reproduce", self.experiment]
        words += [] if self.scale == "standard" else [f"--{self.scale}"]
        words += [word for change in self.changed for word in ("--set", change)]
        words += ["--seed", str(self.seed), "--threads", str(self.threads)]
        return " ".join(words + ([] if self.device == "cpu" else ["--device", self.device]))


@final
class RunFolder:
    """The folder of one run: the file by which it is known, ``metrics.jsonl``, and perhaps results."""

    def __init__(
        self, out: str, head: str = "run.json", kept: Sequence[str] = ("metrics.jsonl", "results.json")
    ) -> None:
        """Name the files, of which those that are ``kept`` are no new run's to overwrite; nothing is touched."""
        self.folder = expanded(out)
        self.head_path = self.folder / head
        self.metrics_path = self.folder / "metrics.jsonl"
        self.results_path = self.folder / "results.json"
        self._kept = [self.folder / name for name in kept]

    def check_unused(self) -> None:
        """Refuse to start a new run over another, or over what is left of one.

        Raises:
            CheckpointError: there is a run in it, the log of one, or its results.
        """
        if self.head_path.exists():
            raise CheckpointError(
                f"{self.folder} already holds a run",
                "an unused folder",
                "add --resume to continue it, or choose another --out",
            )
        for path in self._kept:
            if path.is_file() and path.stat().st_size:
                raise left_over(path)

    def opened(self, resume: bool) -> MetricsLog:
        """The log, locked: of a new run, for which the folder is made, or of that to go on with, as it was left.

        Raises:
            CheckpointError: the folder of a new run holds one, or another process writes in it.
            OSError: there is no log to go on with.
        """
        if resume:
            return MetricsLog(self.metrics_path, new=False)
        self.check_unused()
        self.folder.mkdir(parents=True, exist_ok=True)
        log = MetricsLog(self.metrics_path, new=True)  # before the head: a folder with a head has a log
        try:
            self.check_unused()  # once more, now that no other process can write
        except BaseException:
            log.close()
            raise
        return log

    def header(self) -> tuple[Header, str | None]:
        """What the reproduction in the folder was started with, and the checksum of it, which that of 0.1 has not.

        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        if not self.head_path.is_file():
            got, fix = f"there is no run in {self.folder}", "check --out, or start without --resume"
            raise CheckpointError(got, "one to resume", fix)
        try:
            content = json.loads(self.head_path.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError("another format")
            digest = content.pop("checksum", None)
            return Header.of(content), digest
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            got = f"{self.head_path} cannot be read by this version of diffopt ({str(error)[:80]})"
            raise CheckpointError(got, "one that it wrote", "start again in another --out") from error


def json_row(unit: str, row: Row) -> Row:
    """What JSON makes of a unit's row, so that a resumed run sees the same as an uninterrupted one.

    Raises:
        ExperimentError: JSON has no way to write it: a number that is not finite, a tensor.
    """
    try:
        if not isinstance(row, dict):
            raise TypeError(f"{type(row).__name__} is no dictionary")
        same: Row = json.loads(json.dumps(row, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ExperimentError(
            f"the unit {unit} returned what JSON cannot hold ({error})",
            "a dictionary of finite numbers, texts, lists and dictionaries",
        ) from error
    return same


def device_name(device: str) -> str:
    """The name of a device for people."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = os.cpu_count() or 1
    return f"{models[0] if models else platform.machine()}, {cores} core{'s' if cores > 1 else ''}"
