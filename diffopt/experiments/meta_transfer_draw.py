"""The pictures of meta-transfer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffopt.experiments.framework.claims import Finished
from diffopt.experiments.framework.experiment import Row
from diffopt.experiments.framework.pictures import STYLES, curves, panels, save
from diffopt.experiments.meta_transfer_problem import BASELINE, FIRST_ORDER, FIXED, KINDS, SCRATCH
from diffopt.experiments.meta_transfer_report import DIFFERENCES, WINDOW, costs_of, differences_of, pairs_of


def _style(name: str) -> dict[str, Any]:
    """One for every method, windows from light to dark."""
    known = {
        BASELINE: STYLES["exact"],
        FIRST_ORDER: STYLES["first-order"],
        SCRATCH: {"color": STYLES["truncated"]["color"], "marker": "s", "linestyle": "--"},
        FIXED: {"color": STYLES["hybrid"]["color"], "marker": "^", "linestyle": "--"},
        "multi-step 2": {"color": "#E39AC6", "marker": "*", "linestyle": "-"},
        "multi-step 3": {"color": "#CC78AF", "marker": "*", "linestyle": "-"},
        "multi-step 4": {"color": "#B5528F", "marker": "*", "linestyle": "-"},
        "multi-step 8": {"color": "#6F2355", "marker": "*", "linestyle": "-"},
    }
    return known.get(name, {"color": STYLES["binomial"]["color"], "marker": "o", "linestyle": "-."})


def pictures(settings: Any, done: Finished, folder: Path) -> list[Path]:
    """``training.png``, ``differences.png`` (Fig. 1), ``pairs.png`` (what goes where), ``costs.png`` (over T)."""

    def accuracies(row: Row) -> Iterator[Row]:
        for after, accuracy in zip(row["after"], row["accuracy"], strict=True):
            yield {"after": after, "accuracy": accuracy}

    labels = {"after": "outer iteration", "accuracy": "test accuracy [%]", "T": "steps T on the transfer loss"}
    labels |= {"seconds": "processor time [s]", "ratio": "time / baseline's", "error": "error of the hypergradient"}
    labels |= {"value": "change of the inner gradient"}
    look: dict[str, Any] = {"labels": labels, "panel": "kind", "size": (4.2, 3.2)}
    runs = done.table(accuracies, part="learn")
    found = curves(runs, folder / "training.png", x="after", y="accuracy", hue="estimator", style=_style, **look)
    changes, path = differences_of(settings, done), folder / "differences.png"
    if len(changes):
        changes = changes.melt(["seed", "kind", "after"], list(DIFFERENCES), "normalised", "value")
    found += curves(changes, path, x="after", y="value", hue="normalised", scales={"value": "log"}, **look)
    found += _draw_pairs(settings, done, folder)
    costs = costs_of(done)
    if len(costs):
        shown = (costs["error"] != 0) | (costs["estimator"] == BASELINE)
        twice = costs["estimator"].str.startswith(("one step, 2", "one step, 3", "one step, 4", "one step, 8", WINDOW))
        costs = costs[shown & ~twice]
        costs = costs.assign(error=costs["error"].where(costs["error"] > 0))
    sides: dict[str, Any] = {
        "x": "T",
        "y": ("seconds", "ratio", "error"),
        "hue": "estimator",
        "scales": {"error": "log"},
    }

    def paper(axes: Any, kind: Any) -> None:
        if axes.get_ylabel() == labels["ratio"]:
            axes.axhline(0.65, color="0.5", linewidth=0.8, linestyle=":")
            place = {"xycoords": ("axes fraction", "data"), "ha": "right", "fontsize": "small"}
            axes.annotate("the paper, T=2", (0.98, 0.66), **place)

    return found + curves(costs, folder / "costs.png", **sides, style=_style, finish=paper, **look)


def _draw_pairs(settings: Any, done: Finished, folder: Path) -> list[Path]:
    """The weights of the pairs of stages that the baseline ends with, means over the starts."""
    data = pairs_of(done)
    data = data[data["estimator"] == BASELINE] if len(data) else data
    if not len(data):
        return []
    figure, (grid,) = panels(1, len(KINDS), 4.2, 3.2)
    for axes, kind in zip(grid, KINDS, strict=True):
        means = data[data["kind"] == kind].groupby(["source", "target"])["weight"].mean()
        sides = range(len(settings.source_channels)), range(len(settings.target_channels))
        matrix = [[means.get((m, n), math.nan) for n in sides[1]] for m in sides[0]]
        figure.colorbar(axes.imshow(matrix, vmin=0, cmap="viridis"), ax=axes, label="weight of the pair", shrink=0.8)
        axes.set(xticks=sides[1], yticks=sides[0], title=f"{kind}: the baseline, in the end")
        axes.set(xlabel="target's stage", ylabel="source's stage")
    return [save(figure, folder / "pairs.png")]
