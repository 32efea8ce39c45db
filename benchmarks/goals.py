"""What each cell should reach, in one table, and whether it did."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from benchmarks.measure import Measurement, Result, Role

PEERS = (Role.PEER, Role.LOOP_PEER)
LOOPS = (Role.LOOP_PEER,)
JAX = (Role.JAX,)
ALL = (*PEERS, *JAX)
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
        why: the key of the sentence in :data:`benchmarks.reasons.REASONS` that says what limits it.
    """

    cell: str
    method: str
    quantity: str
    limit: float
    against: tuple[Role, ...] | str = PEERS
    why: str = ""


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
        missing: why it was not measured.
    """

    goal: Goal
    against: str
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    by_hand: float | None = None
    missing: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal was reached; ``None``: not measured."""
        return None if self.measured is None else self.measured <= self.goal.limit


def _both(cell: str, method: str, time: float, memory: float, why: str) -> list[Goal]:
    return [Goal(cell, method, "time", time, PEERS, why), Goal(cell, method, "memory", memory, PEERS, why)]


W2_GRAPHS = "ours, graphs, chunks of 2"
HYPERTORCH, TORCHOPT_CG, FUNCTORCH = "hypertorch style CG", "TorchOpt CG", "functorch, backward outside"
CONV_GPU, SINE_GPU = "GPU Conv4-64 T=8 B=32", "GPU sinusoid T=5 B=1024"
PROGRAM, COMPILED, SQRT_COMPILED = "ours, compiled program", "ours, compile=True", "ours, compile=True, checkpoints"

EAGER = {(5, 4): 0.95, (5, 25): 0.95, (5, 100): 1.0, (20, 4): 0.80, (20, 25): 0.85, (20, 100): 0.97, (1, 4): 1.3}
"""W1 by steps and tasks: eager, beside the fastest peer of torch's."""

COMPILED_W1 = {
    PROGRAM: {(5, 4): 1.1, (5, 25): 0.8, (5, 100): 0.7, (20, 4): 1.0, (20, 25): 0.70, (20, 100): 0.62},
    COMPILED: {(20, 4): 1.8, (20, 25): 0.80, (20, 100): 0.65},
}
"""W1 by steps and tasks: compiled, beside the fastest of all peers."""

GOALS: tuple[Goal, ...] = (
    *(
        Goal(f"W1 T={t} B={b}", name, "time", x, ALL, name)
        for name, m in COMPILED_W1.items()
        for (t, b), x in m.items()
    ),
    Goal("W1 T=20 B=100", PROGRAM, "time", 1 / 0.45, "matrix products alone", "arithmetic"),
    Goal("W1 T=100 B=25", SQRT_COMPILED, "time", 0.9, "JAX, remat", "compiled checkpoints"),
    Goal("W1 T=100 B=25", SQRT_COMPILED, "memory", 0.15, FUNCTORCH, "compiled checkpoints"),
    Goal("W4 reverse T=100", PROGRAM, "time", 1.0, ALL, "W4"),
    Goal("W4 CG(20)", "ours, CG, compiled program", "time", 1.0, ALL, "CG, compiled"),
    *(Goal(f"W5 T={steps}", PROGRAM, "time", 0.95, ALL, "W5") for steps in (10, 50)),
    *(Goal(f"W1 T={t} B={b}", "ours, graphs", "time", limit, PEERS, "eager") for (t, b), limit in EAGER.items()),
    *(Goal(f"W1 T={t} B={b}", "ours, graphs", "memory", 1.5) for t, b in EAGER if t > 1),
    *(Goal(f"W1 T={steps} B=25", "ours, graphs", "time", 0.10, LOOPS, "eager") for steps in (5, 20)),
    *_both("W1 T=100 B=25", "ours, checkpoints", 1.0, 0.25, "checkpoints"),
    Goal("Leaves T=6, 300 leaves", "ours, loop, graphs", "time", 1.05, "plain loop", "leaves"),
    *_both("W2 T=5 B=8", W2_GRAPHS, 0.95, 2.0, "convolutions"),
    *_both("W2 T=16 B=8", W2_GRAPHS, 0.90, 2.0, "convolutions"),
    *_both("W2 T=5 B=8", "ours, loop, states", 1.20, 0.65, "convolutions"),
    *_both("W2 T=16 B=8", "ours, loop, checkpoints", 1.20, 0.65, "convolutions"),
    *_both("W3 T=5 B=2", "ours, loop, graphs", 1.05, 1.05, "convolutions"),
    *_both("W3 T=5 B=2", "ours, loop, states", 1.25, 0.66, "convolutions"),
    *_both("W4 reverse T=100", "ours, loop, graphs", 1.05, 1.0, "W4 eager"),
    Goal("W4 reverse T=100", "ours, loop, checkpoints", "memory", 0.35, "hypertorch style, states", "W4 eager"),
    Goal("W4 CG(20)", "ours, CG", "time", 1.0, HYPERTORCH, "CG"),
    Goal("W4 CG(20) n=50", "ours, CG", "time", 1.5, HYPERTORCH, "CG"),
    Goal("W4 CG(20)", "ours, CG", "time", 0.70, TORCHOPT_CG, "CG"),
    Goal("W4 CG(20)", "ours, CG", "memory", 0.6, HYPERTORCH, "CG"),
    Goal("W4 16 at once T=100", "ours, graphs", "time", 0.40, "plain loop", "W4 eager"),
    *_both("W5 T=10", "ours, loop, graphs", 1.05, 0.95, "W5 eager"),
    *_both("W5 T=50", "ours, loop, graphs", 1.03, 0.95, "W5 eager"),
    Goal("Binomial T=100 B=4", "ours, Binomial(3)", "time", 0.60, "ours, states", "binomial"),
    Goal("Long T=1000, 199,809 params", "ours, loop, checkpoints", "time", 2.0, "plain loop", "long"),
    Goal("Long T=1000, 199,809 params", "ours, loop, checkpoints", "memory", 160, MEGABYTES, "long"),
    Goal(CONV_GPU, "ours, graphs, chunks of 32", "time", 0.2, "higher", "GPU"),
    Goal(CONV_GPU, "ours, states, chunks of 32", "memory", 0.5, "higher", "GPU"),
    Goal(SINE_GPU, "ours, graphs", "time", 0.02, "higher", "GPU"),
)


def judge(results: Sequence[Result]) -> list[Verdict]:
    """Every goal whose cell was measured."""
    cells = {f"{result.workload} {result.setting}": result for result in results}
    return [_verdict(goal, cells[goal.cell]) for goal in GOALS if goal.cell in cells]


def _verdict(goal: Goal, result: Result) -> Verdict:
    own = result.of(goal.method)
    if goal.against == MEGABYTES:
        return Verdict(goal, "", None if own is None or own.peak is None else own.peak / 1e6)
    if goal.against == ALL and result.fastest(JAX) is None:
        return Verdict(goal, "", missing="JAX is not installed")
    other = result.of(goal.against) if isinstance(goal.against, str) else result.fastest(goal.against)
    if own is None or other is None or not own.times or not other.times:
        return Verdict(goal, "" if other is None else other.method, missing=own.missing if own else "")
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
