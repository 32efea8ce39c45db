"""The frame of ``diffopt train`` and ``diffopt reproduce``: units of work, a budget, Ctrl-C, and how to go on."""

from __future__ import annotations

import shlex
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from diffopt.experiments.framework.checkpoint import Checkpoint, MetricsLog
from diffopt.experiments.framework.experiment import Row, Unit
from diffopt.experiments.framework.flags import RunOptions
from diffopt.experiments.framework.interrupt import Interrupt
from diffopt.experiments.framework.progress import Reporter, reporter
from diffopt.experiments.framework.ranks import ALONE, Ranks
from diffopt.experiments.framework.run_folder import RunFolder
from diffopt.experiments.framework.unit_context import OutOfTime, Work

INTERRUPTED = 130


class Run(ABC):
    """One call of a command that computes units and can be resumed: all that changes while it goes on.

    Attributes:
        log: the log of the folder; on ranks that do not write it, one in memory.
        report: where to tell how it goes.
        finished: how many units are.
    """

    log: MetricsLog
    report: Reporter

    def __init__(
        self,
        command: str,
        options: RunOptions,
        folder: RunFolder,
        ranks: Ranks = ALONE,
        *,
        size: tuple[int, str, int],
        run: str = "",
    ) -> None:
        """Say what is run; nothing is touched.

        Args:
            command: what to type, without its options.
            options: of the command line.
            folder: of the run.
            ranks: the processes that do it together; the first one writes the folder.
            size: how much there is to do, what is counted, and how much of it a unit is.
            run: the fingerprint of the run, which the states of its units carry.
        """
        self.command, self.options, self.folder, self.ranks = command, options, folder, ranks
        self.size, self.fingerprint = size, run
        self.interrupt, self.started, self.finished = Interrupt(), time.monotonic(), 0

    @abstractmethod
    def begin(self, resume: bool) -> None:
        """Write what a new run is, or look at what the folder holds of it, now that no other process can write."""

    @abstractmethod
    def left(self) -> Iterator[tuple[Unit, Path | Checkpoint | None]]:
        """The units to run now, as far as the budget goes, each with the file for its state."""

    @abstractmethod
    def keep(self, unit: Unit, row: Row, seconds: tuple[float, float]) -> None:
        """Write what a finished unit has returned, and how long it took."""

    @abstractmethod
    def finish(self) -> None:
        """Tell the results."""

    @abstractmethod
    def safe(self) -> str | None:
        """What of the run is safe, in words, for who has pressed Ctrl-C; ``None``: nothing."""

    def run(self, resume: bool) -> int:
        """Begin the run or go on with the one in the folder, as far as the budget goes; then tell the results.

        Returns:
            The exit code: 0, or 130 after Ctrl-C.

        Raises:
            CheckpointError: the folder holds another run, a damaged one, or none.
        """
        self.log = self.ranks.on_first(lambda: self.folder.opened(resume)) or MetricsLog(None, new=True)
        try:
            self.begin(resume)
            torch.set_num_threads(self.options.threads or torch.get_num_threads())
            total, counted, _ = self.size
            with self.interrupt, reporter(total, counted, silent=not self.ranks.writes) as self.report:
                for unit, store in self.left():
                    self.run_unit(unit, store)
                    self.interrupt.check()
            self.finish()
            return 0
        except KeyboardInterrupt:
            safe, data = self.safe(), asdict(self.options).get("data_dir")
            if safe is None:
                raise
            again = ["diffopt", *self.command.split(), "--out", str(self.folder.folder), "--resume"]
            again += [] if data is None else ["--data-dir", data]
            print(f"diffopt: interrupted; {safe}; continue with: {shlex.join(again)}", file=sys.stderr)
            return INTERRUPTED
        finally:
            self.log.close()

    def run_unit(self, unit: Unit, store: Path | Checkpoint | None) -> None:
        """Run one unit and keep its row; if it runs out of time, it has saved its state."""
        options, parts = self.options, self.size[2]

        def tell(share: float, text: str) -> None:
            self.report.update((self.finished + share) * parts, f"{unit.name}: {text}")

        tell(0, "begins")
        work = Work(
            options.seed,
            options.device,
            asdict(options).get("data_dir"),
            unit=unit.name,
            store=store,
            deadline=self.deadline(),
            save_every=options.save_every,
            tell=tell,
            interrupt=self.interrupt,
            run=self.fingerprint,
            ranks=self.ranks,
        )
        try:
            row = unit.run(work)
        except OutOfTime:
            return
        self.keep(unit, row, work.seconds)
        self.finished += 1

    def deadline(self) -> float | None:
        """When the last unit must have stopped; some time is kept for the pictures."""
        if self.options.minutes is None:
            return None
        seconds = 60 * self.options.minutes
        return self.started + seconds - min(5.0, 0.2 * seconds)
