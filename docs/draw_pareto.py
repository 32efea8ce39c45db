"""The pictures of the page "Choosing an estimator": error over time and over memory, and the front nothing beats."""

from __future__ import annotations

import re

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

import diffopt
from diffopt.comparing.compare import Row

EXACT = 1e-11
"""Errors below it are round-off; they are drawn there."""


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points than which none is both cheaper and more accurate, from cheap to accurate."""
    best: list[tuple[float, float]] = []
    for cost, error in sorted(points):
        if not best or error < best[-1][1]:
            best.append((cost, error))
    return best


def _short(call: str) -> str:
    """``Truncated(steps=5)`` as ``Truncated(5)``, and the like."""
    call = re.sub(r"(checkpoint|steps|order|window|solver|directions|radius|max_iterations)=", "", call)
    return call.replace("ConjugateGradient", "CG").replace(", throw=False", "")


def _panel(axes: Axes, rows: list[Row], name: str, label: str, factor: float) -> None:
    points = [(factor * getattr(row, name), max(row.relative_error, EXACT)) for row in rows]
    costs, errors = zip(*front(points), strict=True)
    axes.step([*costs, 3 * max(x for x, _ in points)], [*errors, errors[-1]], where="post", color="0.75", zorder=0)
    for i, (row, point) in enumerate(zip(rows, points, strict=True)):
        axes.scatter(*point, color=f"C{i % 10}", marker="os^vD"[i // 10], s=45, label=_short(row.estimator))
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    axes.set(xscale="log", yscale="log", xlabel=label, xlim=(low / 1.4, high * 1.4), ylim=(EXACT / 4, 30))
    ticks = [m * 10.0**e for e in range(-4, 6) for m in (1, 2, 5) if low / 1.4 <= m * 10.0**e <= high * 1.4]
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)


def pareto(comparison: diffopt.Comparison) -> Figure:
    """Both panels, with one legend."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5.2), sharey=True, layout="constrained")
    rows = list(comparison.complete())
    _panel(left, rows, "seconds", "processor time [ms]", 1e3)
    _panel(right, rows, "megabytes", "peak memory above the start [MB]", 1.0)
    left.set_ylabel("relative error (bottom: round-off)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return figure
