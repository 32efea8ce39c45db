"""The learning curve of a meta-training run, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from diffopt.experiments.framework.files import replacing

LABELS = {"accuracy": "query accuracy", "mse": "query mean squared error"}


def draw_curve(rows: Sequence[dict[str, Any]], metric: str, title: str, path: Path) -> None:
    """Draw the smoothed training metric and the evaluations with their 95 % confidence intervals.

    Args:
        rows: the lines of ``metrics.jsonl``.
        metric: ``accuracy`` or ``mse``.
        title: of the picture.
        path: where the PNG goes.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="meta-training iteration", ylabel=LABELS[metric], title=title)
    training = [row for row in rows if row["kind"] == "training"]
    if training:
        window = max(1, len(training) // 50)
        at = _smoothed([row["iteration"] for row in training], window)
        values = _smoothed([row[metric] for row in training], window)
        axes.plot(at, values, color="tab:blue", label=f"training episodes, mean of {window}")
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    if evaluations:
        axes.errorbar(
            [row["iteration"] for row in evaluations],
            [row[metric] for row in evaluations],
            yerr=[row["half_width"] for row in evaluations],
            color="tab:orange",
            marker="o",
            capsize=4,
            label=f"{evaluations[-1]['episodes']} evaluation episodes, 95 % confidence",
        )
    if metric == "mse":
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")


def _smoothed(values: Sequence[float], window: int) -> npt.NDArray[np.float64]:
    """The mean of every ``window`` successive values."""
    return np.convolve(np.asarray(values, dtype=np.float64), np.full(window, 1 / window), mode="valid")
