"""``diffopt reproduce`` in the frame: a line for every finished unit, and at the end what they say."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

from diffopt.experiments.framework.checkpoint import MetricsLog
from diffopt.experiments.framework.experiment import Experiment, ExperimentError, Row, Unit
from diffopt.experiments.framework.files import CheckpointError, checksum, write_json
from diffopt.experiments.framework.flags import to_store
from diffopt.experiments.framework.report import results_file, show
from diffopt.experiments.framework.run_folder import AGAIN, FORMAT, Header, RunFolder, json_row
from diffopt.experiments.framework.runner import Run
from diffopt.experiments.framework.unit_context import store_name


@final
class Reproduction(Run):
    """A run of an experiment."""

    def __init__(self, experiment: Experiment[Any], settings: Any, header: Header, folder: RunFolder) -> None:
        """Say what is run, under which header.

        Raises:
            ExperimentError: two units have one name.
        """
        self.units = tuple(experiment.units(settings))
        size = len(self.units), "unit", 1
        super().__init__(f"reproduce {experiment.name}", header, folder, size=size, run=header.fingerprint())
        self.experiment, self.settings, self.header = experiment, settings, header
        if not self.units or len({unit.name for unit in self.units}) < len(self.units):
            got = f"the experiment {experiment.name} has no units, or two of one name"
            raise ExperimentError(got, "one or more, of different names")

    def begin(self, resume: bool) -> None:
        """Write the header, or look at it and at the lines of finished units, without one that was cut short."""
        path = self.folder.head_path
        if not resume:
            write_json({"format": FORMAT, **to_store(self.header), "checksum": self.fingerprint}, path)
            return
        _, digest = self.folder.header()
        if digest not in (None, self.fingerprint):
            got = f"{path} has been changed since the run was started"
            raise CheckpointError(got, "one that fits its checksum", AGAIN)
        self.log.read()
        check_rows(self.log, {unit.name for unit in self.units}, self.fingerprint, sealed=digest is not None)
        self.log.cut()
        self.finished = len(self.log.rows)
        for name in self.rows():
            self.store(name).unlink(missing_ok=True)  # of a unit that was killed after its line was written

    def left(self) -> Iterator[tuple[Unit, Path]]:
        """Those that are not finished and have the time they need, judged by the slowest that is finished."""
        costs = {unit.name: unit.cost for unit in self.units}
        for unit in self.units:
            slowest = max((row["seconds"] / costs[row["unit"]] for row in self.log.rows), default=0.0)
            needs, deadline = 0.0 if unit.resumable else slowest * unit.cost, self.deadline()
            if unit.name not in self.rows() and (deadline is None or deadline - time.monotonic() > needs):
                yield unit, self.store(unit.name)

    def keep(self, unit: Unit, row: Row, seconds: tuple[float, float]) -> None:
        """Write the line of a unit; after it the state is not needed: see the note of run_folder."""
        self.log.append(log_row(unit.name, seconds, json_row(unit.name, row), self.fingerprint))
        self.log.sync()
        self.store(unit.name).unlink(missing_ok=True)

    def finish(self) -> None:
        """Write ``results.json`` and the pictures; show the tables, what was left out, and where the files are."""
        rows, folder = self.rows(), self.folder.folder
        summary = self.experiment.summarise(self.settings, rows)
        pictures = [path.name for path in self.experiment.draw(self.settings, rows, folder)]
        left_out = [unit.name for unit in self.units if unit.name not in rows]
        minutes = {
            f"{name}minutes": round(sum(row[f"{name}seconds"] for row in self.log.rows) / 60, 2)
            for name in ("", "processor_")
        }
        results = results_file(self.experiment, self.header, summary, minutes, left_out, pictures)
        write_json(results, self.folder.results_path)
        show(results, folder)

    def safe(self) -> str:
        """The units."""
        return f"{len(self.log.rows)} of {len(self.units)} units are finished"

    def rows(self) -> dict[str, Row]:
        """The rows of the finished units, in the order of the units."""
        found = {row["unit"]: row["values"] for row in self.log.rows}
        return {unit.name: found[unit.name] for unit in self.units if unit.name in found}

    def store(self, unit: str) -> Path:
        """The file for the state of an unfinished unit."""
        return self.folder.folder / store_name(unit)


def log_row(unit: str, seconds: tuple[float, float], values: Row, fingerprint: str) -> dict[str, Any]:
    """The line of a finished unit; its checksum says under which header it was computed."""
    clock, processor = (round(number, 3) for number in seconds)
    row = {"unit": unit, "seconds": clock, "processor_seconds": processor, "values": values}
    return {**row, "checksum": checksum([fingerprint, row])}


def check_rows(log: MetricsLog, units: set[str], fingerprint: str, sealed: bool) -> None:
    """Refuse lines that :func:`log_row` did not write; only where the header is ``sealed`` all need checksums.

    Raises:
        CheckpointError: names the first line that is none, or was changed, or computed under another header; or there
            are units twice, or that the experiment has not.
    """
    for number, row in enumerate(log.rows, start=1):
        where = f"{log.path}, line {number},"
        numbers = [row.get(name) for name in ("seconds", "processor_seconds")]
        plain = all(isinstance(number, int | float) for number in numbers) and isinstance(row.get("values"), dict)
        if not plain or not isinstance(row.get("unit"), str):
            raise CheckpointError(f"{where} is no finished unit", "its name, its times and its values", AGAIN)
        content = {key: value for key, value in row.items() if key != "checksum"}
        if (sealed or "checksum" in row) and row.get("checksum") != checksum([fingerprint, content]):
            got = f"{where} has another checksum: it was changed, or computed under another run.json"
            raise CheckpointError(got, "the line that was written", AGAIN)
    names = [row["unit"] for row in log.rows]
    if len(set(names)) < len(names) or not set(names) <= units:
        raise CheckpointError(
            f"{log.path} holds units twice, or units that the experiment has not",
            "some of its units, each once",
            "another version of diffopt wrote it: start again in another --out",
        )
