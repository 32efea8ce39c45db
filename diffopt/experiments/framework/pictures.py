"""How the experiments' pictures look: one colour and marker for each estimator, told apart by colour-blind readers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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
