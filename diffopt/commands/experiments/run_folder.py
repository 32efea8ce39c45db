"""The folder of one run of an experiment: what it was started with, the rows of its finished units, its results.

# NOTE [why a reproduction survives kill -9 at any moment]
``run.json`` is written once, whole, before anything else, and says what the run computes; to resume under anything else
is an error. A finished unit is one line of ``metrics.jsonl``, written in one call and on the disk before the next unit
begins. A line without its end is the trace of a kill, and is cut off. So a unit is there whole or not at all, and what
is there is not computed again.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch

import diffopt
from diffopt.commands.checkpoint import MetricsLog, replacing
from diffopt.commands.checkpoint_content import CheckpointError
from diffopt.commands.experiments.contract import ExperimentError, Row
from diffopt.commands.experiments.work import store_name

FORMAT = 1


@final
@dataclass(frozen=True)
class Header:
    """All that decides the numbers of a run.

    Attributes:
        experiment: its name.
        scale: ``quick``, ``standard`` or ``full``: where the settings come from.
        changed: the settings given by ``--set``, as they were given.
        settings: all settings.
        seed: of all generators.
        device: as torch names it.
        device_name: as people name it.
        threads: CPU threads.
        torch: its version.
        diffopt: its version.
    """

    experiment: str
    scale: str
    changed: tuple[str, ...]
    settings: dict[str, Any]
    seed: int
    device: str
    device_name: str
    threads: int
    torch: str
    diffopt: str

    @classmethod
    def now(
        cls, experiment: str, scale: str, changed: tuple[str, ...], settings: Any, seed: int, device: str, threads: int
    ) -> Header:
        """The header of a run on this machine, with these versions."""
        plain = json.loads(json.dumps(asdict(settings)))
        versions = (torch.__version__, diffopt.__version__)
        return cls(experiment, scale, changed, plain, seed, device, device_name(device), threads, *versions)

    def command(self) -> str:
        """What to type to run this again."""
        words = ["diffopt", "reproduce", self.experiment]
        words += [] if self.scale == "standard" else [f"--{self.scale}"]
        words += [word for change in self.changed for word in ("--set", change)]
        words += ["--seed", str(self.seed), "--threads", str(self.threads)]
        return " ".join(words + ([] if self.device == "cpu" else ["--device", self.device]))


@final
class RunFolder:
    """The folder of one run and the names of its files."""

    def __init__(self, out: str) -> None:
        """Name the files; nothing is touched."""
        self.folder = Path(out).expanduser()
        self.header_path = self.folder / "run.json"
        self.metrics_path = self.folder / "metrics.jsonl"
        self.results_path = self.folder / "results.json"

    def start(self, header: Header) -> MetricsLog:
        """Begin a new run.

        Raises:
            CheckpointError: the folder already holds one.
        """
        if self.header_path.exists():
            raise CheckpointError(
                f"{self.folder} already holds a run: add --resume to continue it, or choose another --out"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        log = MetricsLog(self.metrics_path)  # before the header: a folder with a header has a log
        write_json({"format": FORMAT, **asdict(header)}, self.header_path)
        return log

    def header(self) -> Header:
        """What the run in the folder was started with.

        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        if not self.header_path.is_file():
            raise CheckpointError(f"there is no run in {self.folder}: check --out, or start without --resume")
        try:
            content = json.loads(self.header_path.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError("another format")
            content["changed"] = tuple(content["changed"])
            return Header(**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self.header_path} cannot be read by this version of diffopt ({error}): start again in another --out"
            ) from error

    def log(self, units: set[str]) -> MetricsLog:
        """The log of finished units, without a line that was cut short.

        Raises:
            CheckpointError: it is missing, damaged, or holds units that the experiment has not.
        """
        try:
            *lines, _ = self.metrics_path.read_bytes().split(b"\n")  # what follows the last end of line was cut short
            names = [json.loads(line)["unit"] for line in lines]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.metrics_path} is not a readable log of units ({error}): start again in another --out"
            ) from error
        if len(set(names)) < len(names) or not set(names) <= units:
            raise CheckpointError(
                f"{self.metrics_path} holds units twice or units that the experiment has not: another version of "
                "diffopt wrote it; start again in another --out"
            )
        return MetricsLog(self.metrics_path, keep=len(lines))

    def store(self, unit: str) -> Path:
        """The file for the state of an unfinished unit."""
        return self.folder / store_name(unit)


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
            f"the unit {unit} returned what JSON cannot hold ({error}); expected a dictionary of finite numbers, "
            "texts, lists and dictionaries"
        ) from error
    return same


def write_json(content: Any, path: Path) -> None:
    """Replace the file at ``path`` in one step."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


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
