"""Pictures of meta-transfer."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from diffopt.experiments.framework.experiment import Results, Row
from diffopt.experiments.framework.pictures import SEQUENCE, STYLES, legend_below, panels, save
from diffopt.experiments.meta_transfer_curves import difference_curve
from diffopt.experiments.meta_transfer_problem import BASELINE, FIRST_ORDER, FIXED, KINDS, SCRATCH, methods


def draw(settings: Any, results: Results, folder: Path) -> list[Path]:
    """``training.png``: accuracy, gradient difference, weights of the pairs; ``costs.png``: time and error over T."""
    paths = []
    runs = {
        (name, kind): [
            results[unit]
            for unit in (f"{name}, {kind}, seed {seed}" for seed in range(settings.seeds))
            if unit in results
        ]
        for kind in KINDS
        for name in methods(settings.steps)
    }
    runs = {key: rows for key, rows in runs.items() if rows}
    if runs:
        paths.append(_draw_training(settings, runs, folder / "training.png"))
    costs = {
        kind: {
            steps: results[f"cost T={steps} {kind}"]["methods"]
            for steps in settings.cost_steps
            if f"cost T={steps} {kind}" in results
        }
        for kind in KINDS
    }
    if any(costs.values()):
        paths.append(_draw_costs(costs, folder / "costs.png"))
    return paths


def _style(name: str) -> dict[str, Any]:
    """One for every method, windows from light to dark."""
    known = {
        BASELINE: STYLES["exact"],
        FIRST_ORDER: STYLES["first-order"],
        SCRATCH: {"color": STYLES["truncated"]["color"], "marker": "s", "linestyle": "--"},
        FIXED: {"color": STYLES["hybrid"]["color"], "marker": "^", "linestyle": "--"},
        "multi-step 2": {"color": "#E39AC6", "marker": "*", "linestyle": "-"},
        "multi-step 4": {"color": "#B5528F", "marker": "*", "linestyle": "-"},
        "multi-step 8": {"color": "#6F2355", "marker": "*", "linestyle": "-"},
    }
    return known.get(name, {"color": STYLES["binomial"]["color"], "marker": "o", "linestyle": "-."})


def _mean(rows: list[Row], key: str) -> list[float]:
    return [fmean(values) for values in zip(*(row[key] for row in rows), strict=True)]


def _draw_training(settings: Any, runs: dict[tuple[str, str], list[Row]], path: Path) -> Path:
    sources, targets = len(settings.source_channels), len(settings.target_channels)
    figure, grid = panels(len(KINDS), 3, 4.2, 3.2)
    for (left, middle, right), kind in zip(grid, KINDS, strict=True):
        for (name, k), rows in runs.items():
            if k == kind:
                left.plot(rows[0]["after"], _mean(rows, "accuracy"), **_style(name), markersize=4, label=name)
        left.set(title=kind, xlabel="outer iteration", ylabel="test accuracy [%]")
        baseline = runs.get((BASELINE, kind), [])
        if baseline:
            at = baseline[0]["after"][: len(baseline[0]["difference"])]
            for key, colour in (("difference", 0), ("relative difference", 2), ("per step size", 3)):
                curves = [difference_curve(row, key, settings.iterations) for row in baseline]
                mean = [fmean(values) for values in zip(*curves, strict=True)]
                middle.plot(at, mean, color=SEQUENCE[colour], marker=".", label=key)
            middle.legend(fontsize="small")
            pairs = {place: fmean(row["pairs"][place] for row in baseline) for place in baseline[0]["pairs"]}
            matrix = [[pairs.get(f"{m}-{n}", 0.0) for n in range(targets)] for m in range(sources)]
            shown = right.imshow(matrix, vmin=0, cmap="viridis")
            figure.colorbar(shown, ax=right, label="weight of the pair", shrink=0.8)
            right.set(xticks=range(targets), yticks=range(sources))
        middle.set(title="Fig. 1: change of the inner gradient", xlabel="outer iteration", yscale="log")
        right.set(title="where: the baseline, in the end", xlabel="target's stage", ylabel="source's stage")
        left.grid(alpha=0.3)
        middle.grid(alpha=0.3)
    legend_below(figure, grid[0][0], 6)
    return save(figure, path)


def _draw_costs(costs: dict[str, dict[int, Row]], path: Path) -> Path:
    columns = {"seconds": "processor time [s]", "ratio": "time / baseline's", "error": "error of the hypergradient"}
    figure, grid = panels(len(KINDS), len(columns), 4.2, 3.2)
    for row, kind in zip(grid, KINDS, strict=True):
        by_name: dict[str, dict[int, Row]] = {}
        for steps, found in costs[kind].items():
            for name, cost in found.items():
                label = "one step, T lr" if name.startswith("one step") else name
                by_name.setdefault(label, {})[steps] = cost
        for axes, (key, label) in zip(row, columns.items(), strict=True):
            for name, at in by_name.items():
                values = {steps: cost[key] for steps, cost in at.items() if cost[key]}  # the baseline's error is zero
                if key != "error" or name != BASELINE:
                    axes.plot(list(values), list(values.values()), **_style(name), label=name)
            axes.set(title=kind, xlabel="steps T on the transfer loss", ylabel=label)
            axes.set_xticks(list(costs[kind]))
            axes.set_yscale("log" if key == "error" else "linear")
            axes.grid(alpha=0.3)
        row[1].axhline(0.65, color="0.5", linewidth=0.8, linestyle=":")
        row[1].annotate(
            "the paper, T=2", (0.98, 0.66), xycoords=("axes fraction", "data"), ha="right", fontsize="small"
        )
    legend_below(figure, grid[0][0], 4)
    return save(figure, path)
