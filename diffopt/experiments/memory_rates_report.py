"""What the theorems' descents say: floors, exponents, pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from diffopt.experiments.framework.claims import Finished, Frame
from diffopt.experiments.framework.experiment import Row, Summary, Table
from diffopt.experiments.framework.pictures import SEQUENCE, draw_line, legend_below, panels, save
from diffopt.experiments.framework.tables import Value, listed
from diffopt.experiments.framework.texts import asked
from diffopt.experiments.memory_rates_problem import TARGETS

PROCESSES = ("mean", "last")


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the line through the logarithms, by least squares."""
    return float(np.polyfit(np.log(list(x)), np.log(list(y)), 1)[0])


def floors_of(done: Finished) -> Frame:
    """One row per descent with sampled tasks: its floor, and that beside the variance of the mean that it takes."""

    def records(row: Row) -> Iterator[Row]:
        yield {"floor": row["floor"], "variance": row["variance"]}

    data = done.table(records)
    data = data[data["tasks"] > 0] if len(data) else data
    return data.assign(scaled=data["floor"] * data["tasks"] / data["variance"]) if len(data) else data


def exponents_of(done: Finished) -> Frame:
    """One row per start and what grows as a power: ``floor``, of its inverse over ``|B|``; of iterations over 1/eps.

    And a row ``all``, with what is left of the first squared gradient in the end.
    """
    rows, floors = [], floors_of(done)
    for seed, group in floors.groupby("seed") if len(floors) else ():
        if len(group) > 1:
            rows.append({"seed": seed, "estimator": "floor", "exponent": -slope(group["tasks"], group["floor"])})

    def records(row: Row) -> Iterator[Row]:
        yield {"estimator": "all", "left": row["left"]}
        for process in PROCESSES:
            found = [(1 / eps, at) for eps, at in zip(TARGETS, row[process], strict=True) if at is not None]
            if len(found) > 1:
                yield {"estimator": process, "exponent": slope(*zip(*found, strict=True))}

    return pd.concat([pd.DataFrame(rows), done.table(records, tasks=0)])


def summary(settings: Any, done: Finished) -> Summary:
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
        f"The floor over the number of sampled tasks; {sizes}", floors_of(done), {"|B|": "tasks"}, columns
    )
    tables += listed(
        "Iterations until the squared gradient, all tasks in each, is such a part of the first",
        done.table(times, tasks=0),
        {"squared gradient": "what"},
        {},
        across="eps",
        cell="iterations",
        label=lambda eps: f"{eps:.2g}",
    )
    return Summary(tables, asked("memory-rates", "exponents", exponents_of(done)))


def pictures(settings: Any, done: Finished, folder: Path) -> list[Path]:
    """``rates.png``: the squared gradient over the iterations, and the floor over the number of sampled tasks."""

    def records(row: Row) -> Iterator[Row]:
        for after, squared in zip(row["after"], row["squared"], strict=True):
            yield {"iteration": after, "squared": max(squared, 1e-33)}  # zero has no place on the axis

    data, floors = done.table(records), floors_of(done)
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
