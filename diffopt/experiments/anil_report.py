"""What the runs of ANIL say: tables, answers to the slides' claims, pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeAlias, final

from diffopt.experiments.framework.experiment import Cell, Claim, Results, Row, Summary, Table, verdict
from diffopt.experiments.framework.outer_loop import first_below, smoothed
from diffopt.experiments.framework.pictures import SEQUENCE, legend_below, panels, save

SLIDES = "slides, ANIL"
WINDOW = 15
TREND = 0.8
"""Rank correlation from which on a trend counts as one."""
NOTES = (
    "The slides train a four-block convolutional network on FC100 and miniImageNet; neither can be had here. Ours is "
    "a network of three linear layers (tanh between) on 14x14 drawings, small enough to follow many runs.",
    "By theory the rate for a non-convex inner loss suffers from N through powers of (1 + lr * curvature): so the "
    "inner step size decides whether it shows, and the slides do not name theirs. The theory of the strongly convex "
    "case wants lr * curvature below 1; training lets the features grow, and with them this number.",
    "The outer loss is compared after the same number of iterations and after the same processor time; the trend is "
    f"the rank correlation with N, counted from {TREND} on.",
)


@final
@dataclass(frozen=True)
class Convergence:
    """How the runs of one setting went, over the seeds.

    Attributes:
        final: mean outer loss of the last tenth of the iterations, infinite if a run diverged.
        iterations: to reach the target, median; infinite if most runs do not.
        seconds: processor seconds to reach it, likewise.
        per_iteration: processor seconds of one iteration.
        curvature: the inner step size times the largest curvature, at the end.
    """

    final: float
    iterations: float
    seconds: float
    per_iteration: float
    curvature: float


Group: TypeAlias = Mapping[int, Convergence]
"""By the number of inner steps."""


def summarise(settings: Any, results: Results) -> Summary:
    """Tables and claims."""
    groups = dict(_groups(settings, results))
    rows: list[tuple[Cell, ...]] = [
        (
            _layers(layers),
            f"{rate:g}",
            steps,
            *map(_finite, (c.final, c.iterations, c.seconds, 1e3 * c.per_iteration, c.curvature)),
        )
        for (layers, rate), group in groups.items()
        for steps, c in group.items()
    ]
    to_target = f"to loss {settings.target:g}"
    columns = ("adapted", "inner lr", "N", "final outer loss", f"iterations {to_target}", f"seconds {to_target}")
    trends: list[tuple[Cell, ...]] = [
        (
            _layers(layers),
            f"{rate:g}",
            *(_trend(group, key) for key in ("final", "iterations", "seconds")),
            _said(layers),
        )
        for (layers, rate), group in groups.items()
        if len(group) > 1
    ]
    tables = [
        Table(
            "Outer training loss against the number of inner steps",
            (*columns, "ms per iteration", "lr * curvature"),
            tuple(rows),
        ),
        Table(
            "Rank correlation with N (-1: more inner steps are better, +1: worse)",
            ("adapted", "inner lr", "final outer loss", "iterations to target", "seconds to target", "the slides"),
            tuple(trends),
        ),
    ]
    return Summary(tuple(table for table in tables if table.rows), tuple(_claims(groups)), NOTES)


def _claims(groups: Mapping[tuple[int, float], Group]) -> Iterator[Claim]:
    whole = {key: group for key, group in groups.items() if len(group) > 1}
    head = {rate: group for (layers, rate), group in whole.items() if layers == 1}
    several = {key: group for key, group in whole.items() if key[0] > 1}

    def told(found: Mapping[Any, float]) -> str:
        return "rank correlation with N: " + ", ".join(f"{value:+.2g} at {_where(key)}" for key, value in found.items())

    by_iterations = {rate: _trend(group, "final") for rate, group in head.items()}
    yield Claim(
        "strongly convex: more inner steps converge faster per iteration",
        SLIDES,
        *verdict([trend <= -TREND for trend in by_iterations.values()], told(by_iterations)),
    )
    gains = {rate: _gains(group) for rate, group in head.items() if len(group) > 2}
    yield Claim(
        "and then it saturates",
        SLIDES,
        *verdict(
            [last < first for first, last in gains.values()],
            "; ".join(
                f"lr {r:g}: the loss falls by {a:.2g} per step at first, {b:.2g} at last" for r, (a, b) in gains.items()
            ),
        ),
    )
    reached = {rate: group for rate, group in head.items() if any(math.isfinite(c.seconds) for c in group.values())}
    best = {rate: min(group, key=lambda n: group[n].seconds) for rate, group in reached.items()}
    inside = [min(head[rate]) < n < max(head[rate]) for rate, n in best.items()]
    yield Claim(
        "strongly convex: by running time a moderate N is best",
        SLIDES,
        *verdict(inside, ", ".join(f"N={n} at lr {rate:g}" for rate, n in best.items()) + " is the fastest"),
    )
    for key, words in (("final", "per iteration"), ("seconds", "by running time")):
        trends = {where: _trend(group, key) for where, group in several.items()}
        yield Claim(
            f"non-convex: more inner steps converge more slowly {words}",
            SLIDES,
            *verdict([trend >= TREND for trend in trends.values()], told(trends)),
        )
    opposite = {
        (layers, rate): by_iterations[rate] <= -TREND and _trend(group, "final") >= TREND
        for (layers, rate), group in several.items()
        if rate in by_iterations
    }
    shown = [_where(where) for where, yes in opposite.items() if yes]
    yield Claim(
        "so the two geometries have opposite trends, at one inner step size",
        SLIDES,
        *verdict(list(opposite.values()), f"opposite for: {', '.join(shown) or 'none'}; of {len(opposite)} settings"),
    )


def _groups(settings: Any, results: Results) -> Iterator[tuple[tuple[int, float], Group]]:
    for layers in settings.layers:
        for rate in settings.rates:
            found = {}
            for steps in settings.steps:
                names = (f"layers={layers} lr={rate:g} N={steps} seed={seed}" for seed in range(settings.seeds))
                rows = [results[name] for name in names if name in results]
                if rows:
                    found[steps] = _convergence(rows, settings.target)
            if found:
                yield (layers, rate), found


def _convergence(rows: Sequence[Row], target: float) -> Convergence:
    runs = [row for row in rows if "losses" in row]
    if len(runs) < len(rows):
        return Convergence(math.inf, math.inf, math.inf, math.inf, math.inf)
    curves = [(smoothed(row["losses"], WINDOW), row["seconds"]) for row in runs]
    iterations = [first_below(curve, target, list(map(float, range(1, len(curve) + 1)))) for curve, _ in curves]
    seconds = [first_below(curve, target, times) for curve, times in curves]
    return Convergence(
        fmean(fmean(row["losses"][-max(1, len(row["losses"]) // 10) :]) for row in runs),
        median(math.inf if at is None else at for at in iterations),
        median(math.inf if at is None else at for at in seconds),
        fmean(row["seconds"][-1] / len(row["seconds"]) for row in runs),
        max((row["curvature"] for row in runs if row["curvature"] is not None), default=math.inf),
    )


def _trend(group: Group, key: str) -> float:
    """Spearman's rank correlation of N with a figure; equal figures share their rank."""
    values = [getattr(convergence, key) for convergence in group.values()]
    steps, ranks = _ranks(list(group)), _ranks(values)
    mean = (len(values) - 1) / 2
    above = sum((a - mean) * (b - mean) for a, b in zip(steps, ranks, strict=True))
    below = math.sqrt(sum((a - mean) ** 2 for a in steps) * sum((b - mean) ** 2 for b in ranks))
    return above / below if below else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    return [order.index(value) + (order.count(value) - 1) / 2 for value in values]


def _gains(group: Group) -> tuple[float, float]:
    """How much the final loss falls per inner step between the two smallest, and the two largest, N."""
    steps = sorted(group)
    slopes = [(group[a].final - group[b].final) / (b - a) for a, b in (steps[:2], steps[-2:])]
    return slopes[0], slopes[1]


def _layers(number: int) -> str:
    return "head (strongly convex)" if number == 1 else f"{number} layers (non-convex)"


def _said(layers: int) -> str:
    return "negative" if layers == 1 else "positive"


def _where(key: Any) -> str:
    return f"{key[0]} layers, lr {key[1]:g}" if isinstance(key, tuple) else f"lr {key:g}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def draw(settings: Any, results: Results, folder: Path) -> list[Path]:
    """``convergence.png``: the outer loss over iterations and over processor time."""
    if not results:
        return []
    groups = [(layers, rate) for layers in settings.layers for rate in settings.rates]
    figure, grid = panels(2, len(groups), 3.2, 2.9)
    for column, (layers, rate) in enumerate(groups):
        for i, steps in enumerate(settings.steps):
            names = (f"layers={layers} lr={rate:g} N={steps} seed={seed}" for seed in range(settings.seeds))
            runs = [results[name] for name in names if "losses" in results.get(name, {})]
            if runs:  # the means over the seeds
                curve, seconds = (
                    [fmean(values) for values in zip(*(run[key] for run in runs), strict=True)]
                    for key in ("losses", "seconds")
                )
                style: dict[str, Any] = {"color": SEQUENCE[i % len(SEQUENCE)], "label": f"N={steps}"}
                grid[0][column].plot(range(1, len(curve) + 1), smoothed(curve, WINDOW), **style)
                grid[1][column].plot(seconds, smoothed(curve, WINDOW), **style)
        top, bottom = grid[0][column], grid[1][column]
        top.set(title=f"{_layers(layers)}\nlr {rate:g}", xlabel="outer iteration")
        top.title.set_fontsize("medium")
        bottom.set(xlabel="processor time [s]")
        for axes in (top, bottom):
            axes.set(yscale="log")
            axes.axhline(settings.target, color="0.6", linewidth=0.8, linestyle=":")
            axes.grid(alpha=0.3)
    for row in grid:
        low, high = min(axes.get_ylim()[0] for axes in row), min(10.0, max(axes.get_ylim()[1] for axes in row))
        for axes in row:
            axes.set_ylim(low, high)
        row[0].set_ylabel("outer training loss")
    legend_below(figure, grid[0][0], len(settings.steps))
    return [save(figure, folder / "convergence.png")]
