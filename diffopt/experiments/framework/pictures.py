"""How the experiments' pictures look: one colour and marker for each estimator, told apart by colour-blind readers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from diffopt.experiments.framework.claims import Frame
from diffopt.experiments.framework.files import replacing

STYLES: dict[str, dict[str, Any]] = {
    "exact": {"color": "#000000", "marker": "x", "linestyle": "-"},
    "first-order": {"color": "#7F7F7F", "marker": "v", "linestyle": ":"},
    "truncated": {"color": "#E69F00", "marker": "s", "linestyle": "--"},
    "binomial": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "binomial, scale L/K": {"color": "#56B4E9", "marker": "P", "linestyle": "-."},
    "hybrid": {"color": "#009E73", "marker": "^", "linestyle": "-"},
    "krylov": {"color": "#D55E00", "marker": "D", "linestyle": "-"},
    "multi-step": {"color": "#CC79A7", "marker": "*", "linestyle": "-"},
    "implicit": {"color": "#8C6D00", "marker": "X", "linestyle": "--"},
    "reptile": {"color": "#BDBDBD", "marker": "<", "linestyle": ":"},
}
"""Line styles by what is drawn; the colours are those of Okabe and Ito (2008), with greys."""

SEQUENCE = ("#440154", "#3B528B", "#21918C", "#5EC962", "#C8A800")
"""Colours for ordered things, such as numbers of steps: dark to light, told apart in grey too."""
MOST_MARKED = 50
"""Points of a line that are marked; more of them would cover each other."""


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """A figure of ``rows`` times ``columns`` panels of so many inches each."""
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    return figure, [[grid[i, j] for j in range(columns)] for i in range(rows)]


def legend_below(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """One legend for all panels, below them, where it covers nothing."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize="small")


def save(figure: Figure, path: Path) -> Path:
    """Write the picture."""
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")
    return path


def curves(
    data: Frame,
    path: Path,
    *,
    x: str | Sequence[str],
    y: str | Sequence[str],
    hue: str,
    panel: str = "",
    wrap: int = 0,
    style: Callable[[Any], Mapping[str, Any]] | None = None,
    over: str = "",
    labels: Mapping[str, str] | None = None,
    scales: Mapping[str, str] | None = None,
    size: tuple[float, float] = (3.6, 3.2),
    legend: int = 4,
    finish: Callable[[Axes, Any], object] = lambda axes, where: None,
) -> list[Path]:
    """Lines over ``x``, one for each value of ``hue``, and the range of the starts around each; none without rows.

    Args:
        data: the long table.
        path: of the picture.
        x: the columns along the axis; several make several rows of panels, or columns where there is no ``panel``.
        y: as many columns, or one.
        hue: the column that tells lines apart.
        panel: the column that tells panels apart.
        wrap: panels in a row, where there is one pair of ``x`` and ``y``; 0: all.
        style: of a line, given its value of ``hue``; else colours in order.
        over: the column that says which points of different starts belong together, if it is not ``x``.
        labels: of the axes, by column.
        scales: ``log`` or others, by column.
        size: of a panel in inches.
        legend: columns of the legend.
        finish: does what else is to be done to a panel, given its value of ``panel``.
    """
    if not len(data):
        return []
    sides, labels, scales = _sides(x, y), labels or {}, scales or {}
    places = list(dict.fromkeys(data[panel])) if panel else [None]
    count = len(sides) * len(places)
    columns = wrap or (len(places) if panel else len(sides))
    figure, grid = panels(-(-count // columns), columns, *size)
    hues, spare = list(dict.fromkeys(data[hue])), [axes for row in grid for axes in row]
    for across, up in sides:
        for place in places:
            axes, rows = spare.pop(0), data if place is None else data[data[panel] == place]
            for k, value in enumerate(hues):
                line = rows[rows[hue] == value].dropna(subset=[across, up])
                look = style(value) if style else {"color": SEQUENCE[k % len(SEQUENCE)], "marker": ""}
                draw_line(axes, line, across, up, over or across, {"label": _named(hue, value), **look})
            axes.set(xlabel=labels.get(across, across), ylabel=labels.get(up, up))
            axes.set(xscale=scales.get(across, "linear"), yscale=scales.get(up, "linear"))
            axes.set_title("" if place is None else _named(panel, place), fontsize="medium")
            axes.grid(alpha=0.3)
            finish(axes, place)
    for axes in spare:
        axes.set_axis_off()
    fullest = max((axes for row in grid for axes in row), key=lambda axes: len(axes.get_legend_handles_labels()[0]))
    legend_below(figure, fullest, legend)
    return [save(figure, path)]


def draw_line(axes: Axes, rows: Frame, x: str, y: str, over: str, look: Mapping[str, Any]) -> None:
    """The mean over starts and draws at each place, and their range where there are several."""
    if not len(rows):
        return
    found = rows.groupby(over, sort=True).agg(x=(x, "mean"), mean=(y, "mean"), low=(y, "min"), high=(y, "max"))
    marker = {"marker": ""} if len(found) > MOST_MARKED else {}
    axes.plot(found["x"], found["mean"], **{"markersize": 4, **look, **marker})
    if len(found) == 1:
        axes.vlines(found["x"], found["low"], found["high"], color=look["color"], alpha=0.5)
    else:
        axes.fill_between(found["x"], found["low"], found["high"], color=look["color"], alpha=0.12, linewidth=0)


def _named(column: str, value: Any) -> str:
    """A value as it is; a number with the name of its column."""
    return value if isinstance(value, str) else f"{column}={value:g}"


def _sides(x: str | Sequence[str], y: str | Sequence[str]) -> list[tuple[str, str]]:
    xs, ys = ([side] if isinstance(side, str) else list(side) for side in (x, y))
    count = max(len(xs), len(ys))
    return list(zip(xs * (count // len(xs)), ys * (count // len(ys)), strict=True))
