"""The folder of one run of an experiment: what it was started with, the rows of its finished units, its results.

# NOTE [why a reproduction survives kill -9 at any moment]
``run.json`` is written once, whole, before anything else, and says what the run computes; to resume under anything else
is an error. A finished unit is one line of ``metrics.jsonl``, written in one call and on the disk before the next unit
begins; its checksum is bound to ``run.json``. A line without its end is the trace of a kill, and is cut off. So a unit
is there whole or not at all, and what is there is not computed again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch

import diffopt
from diffopt.experiments.framework.checkpoint import MetricsLog, left_over
from diffopt.experiments.framework.checkpoint_content import CheckpointError
from diffopt.experiments.framework.experiment import ExperimentError, Row
from diffopt.experiments.framework.files import checksum, write_json
from diffopt.experiments.framework.options import MOST_THREADS, device, expanded, whole
from diffopt.experiments.framework.unit_context import store_name

FORMAT = 1
SCALES = ("quick", "standard", "full")


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

    def check(self) -> None:
        """Look at what a file said of a run.

        Raises:
            ValueError: a field cannot be.
        """
        texts = (self.experiment, self.device, self.device_name, self.torch, self.diffopt)
        if not all(isinstance(text, str) for text in texts) or not isinstance(self.settings, dict):
            raise ValueError("a field is of another kind, expected texts and a dictionary of settings")
        try:
            for count, parse in ((self.seed, whole(0)), (self.threads, whole(1, MOST_THREADS))):
                if type(count) is not int:
                    raise ValueError(f"{str(count)[:20]!r} is no integer")
                parse(str(count))
            device(self.device)
        except argparse.ArgumentTypeError as error:
            raise ValueError(str(error)) from error
        if self.scale not in SCALES or not all(isinstance(change, str) for change in self.changed):
            raise ValueError(f"scale or changed is none that can be, such as {SCALES[0]} and no changes")

    def fingerprint(self) -> str:
        """A checksum of all this; it goes into what is computed under this header."""
        return checksum(asdict(self))

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
        self.folder = expanded(out)
        self.header_path = self.folder / "run.json"
        self.metrics_path = self.folder / "metrics.jsonl"
        self.results_path = self.folder / "results.json"

    def check_unused(self) -> None:
        """Refuse to start a new run over another, or over what is left of one.

        Raises:
            CheckpointError: there is a run in it, the log of one, or its results.
        """
        if self.header_path.exists():
            raise CheckpointError(
                f"{self.folder} already holds a run",
                "an unused folder",
                "add --resume to continue it, or choose another --out",
            )
        for path in (self.metrics_path, self.results_path):
            if path.is_file() and path.stat().st_size:
                raise left_over(path)

    def start(self, header: Header) -> MetricsLog:
        """Begin a new run.

        Raises:
            CheckpointError: the folder already holds one, or another process has begun one.
        """
        self.check_unused()
        self.folder.mkdir(parents=True, exist_ok=True)
        log = MetricsLog(self.metrics_path, new=True)  # before the header: a folder with a header has a log
        try:
            self.check_unused()  # once more, now that no other process can write
            write_json({"format": FORMAT, **asdict(header), "checksum": header.fingerprint()}, self.header_path)
        except BaseException:
            log.close()
            raise
        return log

    def header(self) -> Header:
        """What the run in the folder was started with; :meth:`log` looks at its checksum.

        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        return self._stored()[0]

    def log(self, header: Header, units: set[str]) -> MetricsLog:
        """The log of finished units, without a line that was cut short.

        Args:
            header: of the run, as it is in the folder.
            units: the names of the experiment's units.

        Raises:
            CheckpointError: it is missing, damaged, holds units that the experiment has not, or units that were
                computed under another header; or another process writes it.
        """
        _, digest = self._stored()
        mend = "restore it from a copy, or start again in another --out"
        if digest not in (None, header.fingerprint()):
            raise CheckpointError(
                f"{self.header_path} has been changed since the run was started", "one that fits its checksum", mend
            )
        if not self.metrics_path.is_file():
            raise CheckpointError(f"there is no {self.metrics_path}", "the log of finished units", mend)
        log = MetricsLog(self.metrics_path, new=False)
        try:
            log.read()
            for number, row in enumerate(log.rows, start=1):
                fingerprint = header.fingerprint() if digest or "checksum" in row else None
                _check_row(row, fingerprint, f"{self.metrics_path}, line {number},", mend)
            names = [row["unit"] for row in log.rows]
            if len(set(names)) < len(names) or not set(names) <= units:
                raise CheckpointError(
                    f"{self.metrics_path} holds units twice, or units that the experiment has not",
                    "some of its units, each once",
                    "another version of diffopt wrote it: start again in another --out",
                )
            log.cut()
        except BaseException:
            log.close()
            raise
        return log

    def _stored(self) -> tuple[Header, str | None]:
        """The header and its checksum, which those of diffopt 0.1 have not."""
        if not self.header_path.is_file():
            raise CheckpointError(
                f"there is no run in {self.folder}", "one to resume", "check --out, or start without --resume"
            )
        try:
            content = json.loads(self.header_path.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError("another format")
            digest = content.pop("checksum", None)
            content["changed"] = tuple(content["changed"])
            header = Header(**content)
            header.check()
            return header, digest
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{self.header_path} cannot be read by this version of diffopt ({str(error)[:80]})",
                "one that it wrote",
                "start again in another --out",
            ) from error

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
            f"the unit {unit} returned what JSON cannot hold ({error})",
            "a dictionary of finite numbers, texts, lists and dictionaries",
        ) from error
    return same


def log_row(unit: str, times: dict[str, float], values: Row, header: Header) -> dict[str, Any]:
    """The line of a finished unit; its checksum says under which header it was computed."""
    row = {"unit": unit, **times, "values": values}
    return {**row, "checksum": checksum([header.fingerprint(), row])}


def _check_row(row: dict[str, Any], fingerprint: str | None, where: str, mend: str) -> None:
    """Refuse a line that is not one of :func:`log_row`; without a ``fingerprint`` it needs no checksum."""
    numbers = [row.get(name) for name in ("seconds", "processor_seconds")]
    plain = all(isinstance(number, int | float) for number in numbers) and isinstance(row.get("values"), dict)
    if not plain or not isinstance(row.get("unit"), str):
        raise CheckpointError(f"{where} is no finished unit", "its name, its times and its values", mend)
    content = {key: value for key, value in row.items() if key != "checksum"}
    if fingerprint and row.get("checksum") != checksum([fingerprint, content]):
        raise CheckpointError(
            f"{where} has another checksum: it was changed, or computed under another run.json",
            "the line that was written",
            mend,
        )


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
