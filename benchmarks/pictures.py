"""The pictures: time and memory against steps and tasks, and error against time for every estimator."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

from benchmarks.measure import Measurement, Result, Role
from benchmarks.report import Report

OURS, PEERS = ("#0b5fa5", "#1f9e89", "#7b3fa0", "#d1495b"), ("#7a7a7a", "#b08900", "#a0a0a0", "#5d4037", "#bdbdbd")
FAMILIES = (*OURS, "#333333", "#e08214", "#5d4037", "#3b8ed0", "#888800", "#c2185b")
AROUND = ((8, -6), (-8, -6), (0, 7), (0, -21), (8, 6), (-8, 6), (8, -19), (-8, -19), (14, 18), (-14, 18), (14, -32))
BELOW = ((0, -22), (0, -36), (0, -50), (0, -64))
"""Where a name may stand from its point, in pixels; the first that is free is taken."""

ROUND_OFF = 1e-12
LABELS = {
    "Steps": ("inner steps, 25 tasks at once", "Sinusoid MAML, MLP 1-40-40-1: against the number of inner steps"),
    "Tasks": ("tasks, 5 inner steps", "Sinusoid MAML, MLP 1-40-40-1: against the number of tasks"),
    "GPU steps": ("inner steps, 1,000,000 params", "On the GPU: against the number of inner steps"),
    "GPU params": ("params, 10 inner steps", "On the GPU: against the number of params"),
}


def draw(report: Report, folder: Path) -> list[Path]:
    """Draw every picture that the report has numbers for."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for workload, (label, title) in LABELS.items():
        results = report.cells(workload)
        if len(results) > 1:
            drawn.append(_save(_growth(results, label, title), folder / f"{workload.lower().replace(' ', '-')}.png"))
    for number, (title, rows) in enumerate(report.errors.items(), 1):
        drawn.append(_save(_errors(title, rows), folder / f"errors-{number}.png"))
    return drawn


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path


def _growth(results: Sequence[Result], label: str, title: str) -> Figure:
    """Two panels, time and memory, one line per method, named at its end."""
    figure = Figure(figsize=(11.5, 4.6), layout="constrained")
    figure.suptitle(title, fontsize=12)
    panels: list[tuple[str, Callable[[Measurement], float | None]]] = [
        ("time [s]", lambda m: m.seconds if m.times else None),
        ("peak memory above start [MB]", lambda m: None if m.peak is None else m.peak / 1e6),
    ]
    for axes, (unit, value) in zip(figure.subplots(1, 2), panels, strict=True):
        ends = []
        for method, role, color in _colored(results):
            points = [(r.x, value(m)) for r in results if (m := r.of(method)) and r.x]
            kept = [(x, y) for x, y in points if y]
            if kept:
                width = 2.2 if role is Role.OURS else 1.2
                axes.plot(*zip(*kept, strict=True), color=color, linewidth=width, marker="o", markersize=4)
                ends.append((*kept[-1], method, color))
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel=unit)
        _tidy(axes)
        axes.xaxis.set_major_locator(FixedLocator([r.x for r in results if r.x]))
        _name_ends(axes, ends)
    return figure


def _colored(results: Sequence[Result]) -> Iterator[tuple[str, Role, str]]:
    ours, peers = itertools.cycle(OURS), itertools.cycle(PEERS)
    for m in results[0].measurements:
        yield m.method, m.role, next(ours if m.role is Role.OURS else peers)


def _tidy(axes: Axes) -> None:
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,), numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}" if value < 1e6 else f"{value:.0e}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _name_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names to the right of the lines' ends, pushed apart where they would overlap."""
    to_axes = axes.transData + axes.transAxes.inverted()
    height = -1.0
    for x, y, name, color in sorted(ends, key=lambda end: end[1]):
        height = max(to_axes.transform((x, y))[1], height + 0.055)
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3}
        place = {"xytext": (1.03, height), "textcoords": "axes fraction", "va": "center"}
        axes.annotate(name, (x, y), color=color, fontsize=8.5, arrowprops=line, **place)


def _errors(title: str, rows: Sequence[dict[str, Any]]) -> Figure:
    """Every estimator's error against its time; the members of a family are joined, exact ones stand on the line."""
    figure = Figure(figsize=(11.5, 6), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log", title=f"Error of every estimator: {title}")
    biased = [row["relative_error"] for row in rows if row["relative_error"] > ROUND_OFF]
    exact = min(biased, default=1.0) / 10
    axes.axhline(exact, color="0.75", linewidth=1, zorder=0)
    colors = dict(zip(dict.fromkeys(row["family"] for row in rows), itertools.cycle(FAMILIES), strict=False))
    points = {family: [row for row in rows if row["family"] == family] for family in colors}
    for family, members in points.items():
        xs, ys = [row["seconds"] for row in members], [max(row["relative_error"], exact) for row in members]
        style = "" if ys[0] == exact else "-"
        axes.plot(xs, ys, color=colors[family], marker="o", markersize=6, linewidth=1.2, linestyle=style)
    axes.set(xlabel="processor time [s]", ylabel="relative error of the hypergradient")
    axes.margins(x=0.12)
    axes.set_ylim(exact / 30, axes.get_ylim()[1])
    _tidy(axes)
    axes.yaxis.set_major_locator(FixedLocator([exact, *(10.0**k for k in range(-12, 9) if 10.0**k > 2 * exact)]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: "exact" if y == exact else f"{y:g}"))
    axes.set_ylim(exact / 30, axes.get_ylim()[1])
    FigureCanvasAgg(figure).draw()
    taken = [axes.transData.transform((row["seconds"], max(row["relative_error"], exact))) for row in rows]
    boxes = [(x - 4, y - 4, x + 4, y + 4) for x, y in taken]
    for family, members in points.items():
        for i, row in enumerate(members):
            last = i == len(members) - 1 or family == "Reverse"
            text = f"{family} {row['member']}".strip() if last else row["member"]
            at = (row["seconds"], max(row["relative_error"], exact))
            _name_point(axes, at, text, colors[family], boxes, BELOW if at[1] == exact else AROUND)
    return figure


def _name_point(
    axes: Axes,
    at: tuple[float, float],
    text: str,
    color: str,
    boxes: list[tuple[float, float, float, float]],
    places: Sequence[tuple[int, int]],
) -> None:
    """A name beside a point, where it covers the least of the points and names that are there."""
    x, y = axes.transData.transform(at)
    width, height = 5.6 * len(text) * 1.3, 13

    def box(place: tuple[int, int]) -> tuple[float, float, float, float]:
        left, bottom = x + place[0] - (width if place[0] < 0 else width / 2 if place[0] == 0 else 0), y + place[1]
        return left, bottom, left + width, bottom + height

    def covered(place: tuple[int, int]) -> float:
        a = box(place)
        return sum(
            max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1])) for b in boxes
        )

    best = min(places, key=covered)
    boxes.append(box(best))
    align = "right" if best[0] < 0 else "center" if best[0] == 0 else "left"
    scale = 72 / axes.figure.dpi
    offset = {"xytext": (best[0] * scale, best[1] * scale), "textcoords": "offset points", "ha": align}
    halo = [withStroke(linewidth=2.5, foreground="white")]
    axes.annotate(text, at, color=color, fontsize=8.5, va="bottom", path_effects=halo, **offset)
