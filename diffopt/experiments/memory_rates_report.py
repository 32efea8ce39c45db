"""What the theorems' descents say: floors, exponents, answers, pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from diffopt.experiments.framework.claims import Every, Frame, answers, ask, long_table
from diffopt.experiments.framework.experiment import Results, Row, Summary, Table, Unit
from diffopt.experiments.framework.pictures import SEQUENCE, draw_line, legend_below, panels, save
from diffopt.experiments.framework.tables import Value, listed
from diffopt.experiments.memory_rates_problem import DECAY, LOWEST, LR, TARGETS

PAPER = "memory-reduced paper"
PROCESSES = ("mean", "last")
CLAIMS = (
    ask(
        "the floor of the squared gradient falls as 1/|B| (its exponent, up to a factor of 1.25)",
        f"{PAPER}, theorem 1",
        "exponent: floor ~ 1.25",
        note="the slope of a line through the logarithms",
        headline=True,
    ),
    ask(
        "with all tasks, the mean squared gradient is eps after a number of iterations that grows as 1/eps "
        "(its exponent, up to a factor of 1.25)",
        f"{PAPER}, theorem 2",
        "exponent: mean ~ 1.25",
        note="the slope of a line through the logarithms",
        headline=True,
    ),
    ask(
        "and the last squared gradient is there no later (an exponent of at most 1)",
        f"{PAPER}, theorem 2",
        "exponent: last <= 1",
    ),
    Every(
        "with all tasks nothing is left of the gradient (the squared one falls below 1e-12 of the first)",
        f"{PAPER}, theorem 2: an exact solution",
        "left < 1e-12",
        "rule == 'all'",
        shown="left",
    ),
)
NOTES = (
    "The paper's bounds, its constants K0 and N0 and its proofs are in a supplement that is not available to us; the "
    "abstract gives the orders. The algorithm is our reconstruction (derivations, section 6.3): "
    "`diffopt.WarmStarts`, tasks under `torch.func.vmap`.",
    f"The inner losses are quadratic, their curvature between {LOWEST} and 1, the inner steps of size {LR:g}; the "
    f"outer loss is smooth and not convex, with {DECAY / 2:g} times the squared shared variable. The true gradient has "
    "a closed form that shares nothing with the algorithm. The outer step size is the same for every |B|, and tasks "
    "are drawn with replacement, so that the variance of their mean is one task's over |B|.",
    "The floor is the mean of the squared true gradient over the last half of the iterations. Upper bounds are what "
    "the theorems give: asked is whether their exponents are what is measured. What a theorem of this kind bounds is "
    "the mean of the squared gradients of all iterations so far, and its exponent is 1 wherever their sum is finite: "
    "that the sum is finite, with K and N constant, is what is shown. Where the outer loss is strongly convex around "
    "its minimum, as here in the end, the last one falls faster, and that is no contradiction.",
)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the line through the logarithms, by least squares."""
    return float(np.polyfit(np.log(list(x)), np.log(list(y)), 1)[0])


def floors_of(units: Sequence[Unit], results: Results) -> Frame:
    """One row per descent with sampled tasks: its floor, and that beside the variance of the mean that it takes."""

    def records(row: Row) -> Iterator[Row]:
        yield {"floor": row["floor"], "variance": row["variance"]}

    data = long_table(units, results, records)
    data = data[data["tasks"] > 0] if len(data) else data
    return data.assign(scaled=data["floor"] * data["tasks"] / data["variance"]) if len(data) else data


def exponents_of(units: Sequence[Unit], results: Results) -> Frame:
    """One row per start and what grows as a power: ``floor``, of its inverse over ``|B|``; of iterations over 1/eps.

    And a row ``all``, with what is left of the first squared gradient in the end.
    """
    rows, floors = [], floors_of(units, results)
    for seed, group in floors.groupby("seed") if len(floors) else ():
        if len(group) > 1:
            rows.append({"seed": seed, "rule": "floor", "exponent": -slope(group["tasks"], group["floor"])})

    def records(row: Row) -> Iterator[Row]:
        yield {"rule": "all", "left": row["left"]}
        for process in PROCESSES:
            found = [(1 / eps, at) for eps, at in zip(TARGETS, row[process], strict=True) if at is not None]
            if len(found) > 1:
                yield {"rule": process, "exponent": slope(*zip(*found, strict=True))}

    return pd.concat([pd.DataFrame(rows), long_table(units, results, records, tasks=0)])


def summary(settings: Any, units: Sequence[Unit], results: Results) -> Summary:
    """Tables and claims."""

    def times(row: Row) -> Iterator[Row]:
        for process, words in zip(PROCESSES, ("mean of all so far", "last"), strict=True):
            for eps, at in zip(TARGETS, row[process], strict=True):
                yield {"what": words, "eps": eps, "iterations": at}

    columns: dict[str, Value] = {
        "squared gradient": "floor",
        "+- (95 %)": ("floor", "+-"),
        "variance of a task's gradient": "variance",
        "squared gradient * |B| / variance": "scaled",
    }
    sizes = f"K={settings.steps}, N={settings.products}, outer steps of {settings.outer_lr}, {settings.tasks} tasks"
    tables: tuple[Table, ...] = listed(
        f"The floor over the number of sampled tasks; {sizes}", floors_of(units, results), {"|B|": "tasks"}, columns
    )
    tables += listed(
        "Iterations until the squared gradient, all tasks in each, is such a part of the first",
        long_table(units, results, times, tasks=0),
        {"squared gradient": "what"},
        {},
        across="eps",
        cell="iterations",
        label=lambda eps: f"{eps:.2g}",
    )
    exponents = exponents_of(units, results)
    return Summary(tables, tuple(answers(exponents, CLAIMS)), NOTES)


def pictures(units: Sequence[Unit], results: Results, folder: Path) -> list[Path]:
    """``rates.png``: the squared gradient over the iterations, and the floor over the number of sampled tasks."""

    def records(row: Row) -> Iterator[Row]:
        for after, squared in zip(row["after"], row["squared"], strict=True):
            yield {"iteration": after, "squared": max(squared, 1e-33)}  # zero has no place on the axis

    data, floors = long_table(units, results, records), floors_of(units, results)
    if not len(data) or not len(floors):
        return []
    figure, ((left, right),) = panels(1, 2, 4.2, 3.2)
    for size, colour in zip(dict.fromkeys(data["tasks"]), SEQUENCE * len(data), strict=False):
        look = {"color": colour, "label": f"|B|={size}" if size else "all tasks", "marker": ""}
        draw_line(left, data[data["tasks"] == size], "iteration", "squared", "iteration", look)
    draw_line(right, floors, "tasks", "floor", "tasks", {"color": SEQUENCE[0], "marker": "o", "label": "measured"})
    middle = floors.groupby("tasks")["floor"].mean()
    ideal = [middle.iloc[-1] * middle.index[-1] / size for size in middle.index]
    right.plot(middle.index, ideal, linestyle=":", color="0.5", label="1/|B|")
    left.set(yscale="log", xlabel="outer iteration", ylabel="squared true gradient")
    right.set(xscale="log", yscale="log", xlabel="sampled tasks |B|", ylabel="its mean over the last half")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    right.legend(frameon=False, fontsize="small")
    legend_below(figure, left, 5)
    return [save(figure, folder / "rates.png")]
