"""The folder of one run of ``diffopt train``: what may be begun in it, and what can be gone on with."""

from __future__ import annotations

from typing import Any, NamedTuple, final

from diffopt.experiments.framework.checkpoint import Checkpoint, MetricsLog, NoLog, left_over
from diffopt.experiments.framework.checkpoint_content import CheckpointError
from diffopt.experiments.framework.options import expanded
from diffopt.experiments.framework.ranks import Ranks


class Stopped(NamedTuple):
    """A run to go on with: its checkpoint, and its log, which ``train`` closes."""

    checkpoint: Checkpoint
    log: MetricsLog | NoLog


@final
class RunFolder:
    """The folder of one run and the names of its files."""

    def __init__(self, out: str) -> None:
        """Name the files; nothing is touched."""
        self.folder = expanded(out)
        self.metrics_path = self.folder / "metrics.jsonl"
        self.curve_path = self.folder / "curve.png"
        self.checkpoint_path = self.folder / "checkpoint.pt"

    def check_unused(self) -> None:
        """Refuse to start a new run over another, or over what is left of one.

        Raises:
            CheckpointError: there is a run in it, or a log without a checkpoint.
        """
        if self.checkpoint_path.exists():
            raise CheckpointError(
                f"{self.folder} already holds a run",
                "an unused folder",
                "add --resume to continue it, or choose another --out",
            )
        if self.metrics_path.is_file() and self.metrics_path.stat().st_size:
            raise left_over(self.metrics_path)

    def start(self) -> MetricsLog:
        """Make the folder and the log of a new run.

        Raises:
            CheckpointError: the folder holds a run, or another process has begun one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        log = MetricsLog(self.metrics_path, new=True)
        try:
            self.check_unused()  # once more, now that no other process can write
        except BaseException:
            log.close()
            raise
        return log

    def start_on(self, ranks: Ranks) -> MetricsLog | NoLog:
        """:meth:`start` on the first rank, which writes the log; the others keep its lines to themselves."""
        logs: list[MetricsLog] = []
        ranks.of_first(lambda: logs.append(self.start()))
        return logs[0] if logs else NoLog()

    def stopped_on(self, ranks: Ranks, problem: str) -> Stopped:
        """:meth:`stopped` on the first rank; the others are told what it has read."""
        found: list[Stopped] = []

        def told() -> tuple[Checkpoint, list[dict[str, Any]]]:
            found.append(self.stopped(problem))
            return found[0].checkpoint, found[0].log.rows

        checkpoint, rows = ranks.of_first(told)
        return found[0] if found else Stopped(checkpoint, NoLog(rows))

    def stopped(self, problem: str) -> Stopped:
        """The run to continue; its log is locked, and nothing is changed yet.

        Raises:
            CheckpointError: there is none, it cannot be read, it is of another problem, or another process writes it.
        """
        if not self.checkpoint_path.is_file():
            Checkpoint.load(self.checkpoint_path)  # says what is missing
        log = MetricsLog(self.metrics_path, new=False)
        try:
            checkpoint = Checkpoint.load(self.checkpoint_path)
            if checkpoint.problem != problem:
                raise CheckpointError(
                    f"{self.checkpoint_path} is of diffopt train {checkpoint.problem[:20]}", problem, "check --out"
                )
            log.read(checkpoint.lines, checkpoint.log)
        except BaseException:
            log.close()
            raise
        return Stopped(checkpoint, log)
