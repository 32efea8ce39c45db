"""The frame of ``diffopt reproduce``: run an experiment's units within a budget, resume them, and tell the results."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any, final

import torch

from diffopt.experiments.framework.checkpoint import MetricsLog
from diffopt.experiments.framework.experiment import Experiment, ExperimentError, Row, Unit
from diffopt.experiments.framework.files import write_json
from diffopt.experiments.framework.interrupt import Interrupt
from diffopt.experiments.framework.progress import Reporter, reporter
from diffopt.experiments.framework.report import results_file, show
from diffopt.experiments.framework.run_folder import Header, RunFolder, json_row, log_row
from diffopt.experiments.framework.unit_context import OutOfTime, Work

INTERRUPTED = 130


@final
class Runner:
    """One run of an experiment: all that changes while it goes on."""

    def __init__(
        self,
        experiment: Experiment[Any],
        settings: Any,
        header: Header,
        folder: RunFolder,
        *,
        resume: bool,
        data_dir: str | None,
        minutes: float | None,
        save_every: float,
    ) -> None:
        """Begin a run in ``folder`` or open the one that is there.

        Raises:
            ExperimentError: two units have one name.
            CheckpointError: see :class:`RunFolder`.
        """
        self.experiment, self.settings, self.header, self.folder = experiment, settings, header, folder
        self.data_dir, self.minutes, self.save_every = data_dir, minutes, save_every
        self.units: Sequence[Unit] = tuple(experiment.units(settings))
        names = {unit.name for unit in self.units}
        if not self.units or len(names) < len(self.units):
            raise ExperimentError(
                f"the experiment {experiment.name} has no units, or two of one name", "one or more, of different names"
            )
        self.interrupt, self.started = Interrupt(), time.monotonic()
        self.log: MetricsLog = folder.log(header, names) if resume else folder.start(header)

    def run(self) -> int:
        """Run what is not finished, as far as the budget goes; then tell the results.

        Returns:
            The exit code: 0, or 130 after Ctrl-C.
        """
        try:
            torch.set_num_threads(self.header.threads)
            for name in self.finished():
                self.folder.store(name).unlink(missing_ok=True)  # of a unit that was killed after its line was written
            with self.interrupt, reporter(len(self.units), len(self.log.rows), "unit") as report:
                for unit in self.units:
                    if unit.name not in self.finished() and self.fits(unit):
                        self.run_unit(unit, report)
                    self.interrupt.check()
            self.finish()
            return 0
        except KeyboardInterrupt:
            data = "" if self.data_dir is None else f" --data-dir {self.data_dir}"
            again = f"diffopt reproduce {self.experiment.name} --out {self.folder.folder} --resume{data}"
            done = f"{len(self.log.rows)} of {len(self.units)} units are finished"
            print(f"diffopt: interrupted; {done}; continue with: {again}", file=sys.stderr)
            return INTERRUPTED
        finally:
            self.log.close()

    def finished(self) -> dict[str, Row]:
        """The rows of the finished units, in the order of the units."""
        found = {row["unit"]: row["values"] for row in self.log.rows}
        return {unit.name: found[unit.name] for unit in self.units if unit.name in found}

    def run_unit(self, unit: Unit, report: Reporter) -> None:
        """Run one unit and write its line; if it runs out of time, it has saved its state."""
        done, store = len(self.log.rows), self.folder.store(unit.name)
        report.update(done, unit.name)
        work = Work(
            self.header.seed,
            self.header.device,
            self.data_dir,
            unit=unit.name,
            store=store,
            deadline=self.deadline(),
            save_every=self.save_every,
            tell=lambda share, text: report.update(done + share, f"{unit.name}: {text}"),
            interrupt=self.interrupt,
            run=self.header.fingerprint(),
        )
        try:
            values = json_row(unit.name, unit.run(work))
        except OutOfTime:
            return
        seconds, processor_seconds = (round(number, 3) for number in work.seconds)
        times = {"seconds": seconds, "processor_seconds": processor_seconds}
        self.log.append(log_row(unit.name, times, values, self.header))
        self.log.sync()
        store.unlink(missing_ok=True)  # after the line: see the note of run_folder
        report.update(done + 1, unit.name)

    def deadline(self) -> float | None:
        """When the last unit must have stopped; some time is kept for the pictures."""
        if self.minutes is None:
            return None
        seconds = 60 * self.minutes
        return self.started + seconds - min(5.0, 0.2 * seconds)

    def fits(self, unit: Unit) -> bool:
        """Whether the time left is enough for a unit, judged by the slowest that is finished."""
        deadline = self.deadline()
        if deadline is None:
            return True
        left = deadline - time.monotonic()
        costs = {each.name: each.cost for each in self.units}
        slowest = max((row["seconds"] / costs[row["unit"]] for row in self.log.rows), default=0.0)
        return left > (0.0 if unit.resumable else slowest * unit.cost)

    def finish(self) -> None:
        """Write ``results.json`` and the pictures; show the tables, what was left out, and where the files are."""
        rows = self.finished()
        summary = self.experiment.summarise(self.settings, rows)
        pictures = [path.name for path in self.experiment.draw(self.settings, rows, self.folder.folder)]
        left_out = [unit.name for unit in self.units if unit.name not in rows]
        minutes = {
            f"{name}minutes": round(sum(row[f"{name}seconds"] for row in self.log.rows) / 60, 2)
            for name in ("", "processor_")
        }
        results = results_file(self.experiment, self.header, summary, minutes, left_out, pictures)
        write_json(results, self.folder.results_path)
        show(results, self.folder.folder)
