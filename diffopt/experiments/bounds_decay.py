r"""How fast the errors decay in the level ``L``: super-exponentially means faster than any ``q**L``.

With ``m = L + 1``, the bound (12c) is at most ``(e K x / m)**m``, whose logarithm is ``a m - m log m``: beside the
exponential part there is a part in ``m log m``, of slope -1. The slope is fitted to measured errors,
``log error = a + b m + slope * m log m`` by least squares, for ``m`` up to half of the steps; a bound or an error that
decays exponentially has the slope zero.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

import diffopt
from diffopt.experiments.framework.claims import Finished, Frame
from diffopt.experiments.framework.experiment import Row, Table
from diffopt.experiments.framework.tables import listed
from diffopt.experiments.framework.unit_context import Work

LEAST = 1e-13
"""Errors below it are round-off."""
BEND = -0.5
"""A slope below it counts as super-exponential: half of what (12c) has."""
NAMES = ("binomial", "truncated")


def measure(
    steps: int,
    x: float,
    hessians: Callable[[torch.Generator], Tensor],
    errors: Callable[[Tensor, int], Mapping[str, Tensor]],
    work: Work,
) -> Row:
    """Median errors over random convex sequences at the levels up to half of the steps, and (12c)."""
    sequences = hessians(work.generator(f"decay {steps}"))
    levels = range(steps // 2 + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", diffopt.EstimateWarning)  # where K x is large: that is what is measured
        found = [errors(sequences, level) for level in levels]
    medians = {name: [float(each[name].median()) for each in found] for name in NAMES}
    return {**medians, "(12c)": [math.comb(steps, level + 1) * x ** (level + 1) for level in levels]}


def slope(errors: Sequence[float]) -> float | None:
    """The slope of the logarithm of errors at ``L = 0, 1, ...`` against ``m log m``; ``None``: fewer than four left."""
    kept = [(level + 1.0, error) for level, error in enumerate(errors) if error > LEAST]
    if len(kept) < 4:
        return None
    m, error = torch.tensor(kept, dtype=torch.float64).unbind(1)
    columns = torch.stack([torch.ones_like(m), m, m * m.log()], dim=1)
    return float(torch.linalg.lstsq(columns, error.log()[:, None]).solution[2, 0])


def decays_of(done: Finished) -> Frame:
    """One row per number of steps and ``x``: the slopes, and the level of binomial's largest error."""

    def records(row: Row) -> Iterator[Row]:
        slopes = {name: slope(row[name]) for name in (*NAMES, "(12c)")}
        worst = max(row["binomial"])
        yield {**slopes, "level": row["binomial"].index(worst), "there": worst}

    return done.table(records, theorem="decay")


def table(decays: Frame) -> tuple[Table, ...]:
    """The slopes, and where the largest error is."""
    slopes = "the slope of the median error's logarithm against (L + 1) log(L + 1)"
    title = f"Decay in L on random convex sequences: {slopes}"
    values = {"binomial": "binomial", "truncated": "truncated", "bound (12c)": "(12c)"}
    largest = {"binomial's error is largest at L =": "level", "there": "there"}
    return listed(title, decays, {"K": "K", "x": "x"}, {**values, **largest})
