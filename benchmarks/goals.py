"""What each cell should reach, in one table, and whether it did."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from benchmarks.measure import Measurement, Result, Role

PEERS = (Role.PEER, Role.LOOP_PEER)
LOOPS = (Role.LOOP_PEER,)
MEGABYTES = "megabytes"


@final
@dataclass(frozen=True)
class Goal:
    """One entry of the table: ``method`` takes at most ``limit`` times what ``against`` takes.

    Attributes:
        cell: workload and setting, such as ``"W1 T=20 B=25"``.
        method: which of ours.
        quantity: ``"time"`` or ``"memory"``.
        limit: the largest ratio, or number of megabytes.
        against: the fastest method with one of these roles, the method of this name, or :data:`MEGABYTES`.
    """

    cell: str
    method: str
    quantity: str
    limit: float
    against: tuple[Role, ...] | str = PEERS


@final
@dataclass(frozen=True)
class Verdict:
    """A goal and what was measured.

    Attributes:
        goal: the goal.
        against: the name of the method compared with.
        measured: the ratio (of a time: the median over rounds), or the megabytes; ``None``: not measured.
        low: the lower quartile of the ratio over rounds; ``None`` for memory, which repeats to a per cent.
        high: the upper quartile.
        by_hand: the same ratio, for the method that writes out the arithmetic only, where the cell has one.
    """

    goal: Goal
    against: str
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    by_hand: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the goal was reached; ``None``: not measured."""
        return None if self.measured is None else self.measured <= self.goal.limit


def _both(cell: str, method: str, time: float, memory: float) -> list[Goal]:
    return [Goal(cell, method, "time", time), Goal(cell, method, "memory", memory)]


W2_GRAPHS = "ours, graphs, chunks of 2"
HYPERTORCH, TORCHOPT_CG = "hypertorch style CG", "TorchOpt CG"
CONV_GPU, SINE_GPU = "GPU Conv4-64 T=8 B=32", "GPU sinusoid T=5 B=1024"

GOALS: tuple[Goal, ...] = (
    *(
        goal
        for steps in (5, 20)
        for tasks in (4, 25, 100)
        for goal in _both(f"W1 T={steps} B={tasks}", "ours, graphs", 0.80, 1.5)
    ),
    *(Goal(f"W1 T={steps} B=25", "ours, graphs", "time", 0.10, LOOPS) for steps in (5, 20)),
    *_both("W1 T=20 B=4", "ours, compiled", 0.25, 0.8),
    *_both("W1 T=20 B=25", "ours, compiled", 0.35, 0.8),
    *_both("W1 T=20 B=100", "ours, compiled", 0.45, 0.8),
    *_both("W1 T=100 B=25", "ours, checkpoints", 1.0, 0.25),
    *_both("W1 T=100 B=25", "ours, compiled checkpoints", 1.0, 0.25),
    *_both("W2 T=5 B=8", W2_GRAPHS, 0.95, 2.0),
    *_both("W2 T=16 B=8", W2_GRAPHS, 0.90, 2.0),
    *_both("W2 T=5 B=8", "ours, loop, states", 1.20, 0.65),
    *_both("W2 T=16 B=8", "ours, loop, checkpoints", 1.20, 0.65),
    *_both("W3 T=5 B=2", "ours, loop, graphs", 1.05, 1.05),
    *_both("W3 T=5 B=2", "ours, loop, states", 1.25, 0.66),
    *_both("W4 reverse T=100", "ours, loop, graphs", 1.05, 1.0),
    Goal("W4 reverse T=100", "ours, loop, checkpoints", "memory", 0.35, "hypertorch style, states"),
    Goal("W4 CG(20)", "ours, CG", "time", 0.95, HYPERTORCH),
    Goal("W4 CG(20)", "ours, CG", "time", 0.70, TORCHOPT_CG),
    Goal("W4 CG(20)", "ours, CG", "memory", 0.6, HYPERTORCH),
    Goal("W4 16 at once T=100", "ours, graphs", "time", 0.40, "plain loop"),
    *(goal for steps in (10, 50) for goal in _both(f"W5 T={steps}", "ours, loop, graphs", 1.03, 0.95)),
    Goal("Binomial T=100 B=4", "ours, Binomial(3)", "time", 0.60, "ours, states"),
    Goal("Long T=1000, 199,809 params", "ours, loop, checkpoints", "time", 2.0, "plain loop"),
    Goal("Long T=1000, 199,809 params", "ours, loop, checkpoints", "memory", 160, MEGABYTES),
    Goal(CONV_GPU, "ours, graphs, chunks of 32", "time", 0.2, "higher"),
    Goal(CONV_GPU, "ours, states, chunks of 32", "memory", 0.5, "higher"),
    Goal(SINE_GPU, "ours, graphs", "time", 0.02, "higher"),
)


def judge(results: Sequence[Result]) -> list[Verdict]:
    """Every goal whose cell was measured."""
    cells = {f"{result.workload} {result.setting}": result for result in results}
    return [_verdict(goal, cells[goal.cell]) for goal in GOALS if goal.cell in cells]


def _verdict(goal: Goal, result: Result) -> Verdict:
    own = result.of(goal.method)
    if goal.against == MEGABYTES:
        return Verdict(goal, "", None if own is None or own.peak is None else own.peak / 1e6)
    other = result.of(goal.against) if isinstance(goal.against, str) else result.fastest(goal.against)
    if own is None or other is None or not own.times or not other.times:
        return Verdict(goal, "" if other is None else other.method)
    bare = result.fastest([Role.LIMIT])
    if goal.quantity == "time":
        middle, low, high = ratio(own, other)
        return Verdict(goal, other.method, middle, low, high, ratio(bare, other)[0] if bare else None)
    measured = own.peak / other.peak if own.peak and other.peak else None
    by_hand = bare.peak / other.peak if bare and bare.peak and other.peak else None
    return Verdict(goal, other.method, measured, by_hand=by_hand)


def ratio(one: Measurement, other: Measurement) -> tuple[float, float, float]:
    """The median and the quartiles, over rounds, of the ratio of two methods' times in the same round."""
    ratios = [a / b for a, b in zip(one.times, other.times, strict=True)]
    low, high = (ratios * 2)[:2] if len(ratios) == 1 else statistics.quantiles(ratios, n=4, method="inclusive")[::2]
    return statistics.median(ratios), low, high
