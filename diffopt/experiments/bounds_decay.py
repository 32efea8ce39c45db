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
from typing import Any

import torch
from torch import Tensor

import diffopt
from diffopt.experiments.framework.experiment import Cell, Claim, Results, Row, Table, verdict
from diffopt.experiments.framework.unit_context import Work

LEAST = 1e-13
"""Errors below it are round-off."""
BEND = -0.5
"""A slope below it counts as super-exponential: half of what (12c) has."""
PREFIX = "decay "
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


def table(results: Results) -> Table:
    """The slopes, and the level of the largest error."""
    rows: list[tuple[Cell, ...]] = []
    for name, row in _rows(results):
        largest = row["binomial"].index(max(row["binomial"]))
        slopes = (slope(row[each]) for each in (*NAMES, "(12c)"))
        rows.append((name, *slopes, largest, row["binomial"][largest]))
    columns = ("K, x", "binomial", "truncated", "bound (12c)", "binomial's error is largest at L =", "there")
    return Table(
        "Decay in L on random convex sequences: the slope of the median error's logarithm against (L + 1) log(L + 1)",
        columns,
        tuple(rows),
    )


def claims(results: Results) -> Iterator[Claim]:
    """Whether the decay is super-exponential, and whether truncation's is not."""
    for name, text, bends in (
        ("binomial", "binomial's error decays super-exponentially in L", True),
        ("truncated", "truncation's does not", False),
    ):
        slopes = [value for _, row in _rows(results) if (value := slope(row[name])) is not None]
        flags = [(value < BEND) == bends for value in slopes]
        told = f"slope against (L + 1) log(L + 1): {min(slopes):.2f} to {max(slopes):.2f}" if slopes else ""
        evidence = f"{told}; exponential decay has 0, (12c) tends to -1; counted below {BEND:g}"
        yield Claim(text, "binomial paper, theorems 3.8 and 3.10", *verdict(flags, evidence))


def _rows(results: Results) -> list[tuple[str, dict[str, Any]]]:
    return [(name.removeprefix(PREFIX), row) for name, row in results.items() if name.startswith(PREFIX)]
