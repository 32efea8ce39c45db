"""What the runs of MAML say: tables, answers to what the slides and the papers say of it, pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from diffopt.experiments.framework.claims import Finished, Frame
from diffopt.experiments.framework.experiment import Row, Summary
from diffopt.experiments.framework.outer_loop import first_below, smoothed
from diffopt.experiments.framework.pictures import STYLES, legend_below, panels, save
from diffopt.experiments.framework.tables import Value, listed
from diffopt.experiments.framework.texts import asked

SIZES = {"method": "method", "inner lr": "lr", "tasks": "tasks", "batch": "batch", "ways": "way"}


def runs_of(done: Finished) -> Frame:
    """One row per run; one that diverged has no numbers."""

    def records(row: Row) -> Iterator[Row]:
        ms = 1e3 * row["seconds"][-1] / len(row["seconds"]) if "losses" in row else math.nan
        none = dict.fromkeys(("loss", "slope", "accuracy"), math.nan)
        yield {**none, **row, "ms": ms, "diverged": int("diverged" in row)}

    return done.table(records)


def varied(settings: Any, data: Frame, column: str, **others: Any) -> Frame:
    """The runs in which one thing is varied, in its order, of the starts at which all of them are finished."""
    s = settings
    values = {
        "lr": sorted({*s.rates, s.rate}),
        "tasks": sorted(s.tasks),
        "batch": [*map(str, sorted(s.batches)), "all"],
        "way": sorted(s.ways),
    }[column]
    if not len(data):
        return data
    same = {"method": "MAML", "lr": s.rate, "tasks": s.tasks[len(s.tasks) // 2], "batch": "all", "way": s.ways[0]}
    same |= others
    chosen = data[column].isin(values)
    for key in same.keys() - {column}:
        chosen &= data[key] == same[key]
    rows = data[chosen]
    rows = rows[rows.groupby("seed")[column].transform("nunique") == len(values)]
    return rows.sort_values(
        [column, "seed"], key=lambda found: found.map(values.index) if found.name == column else found
    )


def over_starts(rows: Frame, what: str) -> Frame:
    """One row per start: a number where most is taken, over that where least is and over the least of all.

    That of a run that diverged is infinite.
    """
    if not len(rows):
        return rows
    of_start = rows.assign(number=rows[what].fillna(math.inf)).groupby("seed")["number"]
    found = of_start.agg(first="first", last="last", least="min").reset_index()
    return found.assign(ratio=found["last"] / found["first"], worse=found["last"] / found["least"])


def best(rows: Frame) -> Frame:
    """Of each start the run with the lowest loss."""
    rows = rows[rows["diverged"] == 0] if len(rows) else rows
    return rows.loc[rows.groupby("seed")["loss"].idxmin()].set_index("seed") if len(rows) else rows


def beside(maml: Frame, anil: Frame) -> Frame:
    """One row per start: ANIL's time to the loss that MAML ends with, and that of an iteration, over MAML's own."""
    rows: list[Row] = []
    for seed in maml.index.intersection(anil.index) if len(maml) and len(anil) else ():
        first, second = (runs.loc[seed] for runs in (anil, maml))
        tenth = max(1, len(second["losses"]) // 10)
        target = 1.000001 * fmean(second["losses"][-tenth:])
        at, own = (first_below(smoothed(run["losses"], tenth), target, run["seconds"]) for run in (first, second))
        time = math.inf if at is None else at / (second["seconds"][-1] if own is None else own)
        rows.append({"seed": seed, "time": time, "pace": first["ms"] / second["ms"]})
    return pd.DataFrame(rows)


def behind(settings: Any, data: Frame) -> Frame:
    """One row per start: how many points first order falls further behind MAML from the fewest ways to the most."""
    maml, first = (varied(settings, data, "way", method=method) for method in ("MAML", "FOMAML"))
    if not len(maml) or not len(first) or len(settings.ways) < 2:
        return pd.DataFrame()
    both = maml.merge(first, on=["seed", "way"], suffixes=("", " of first order")).sort_values("way")
    numbers = both[["accuracy", "accuracy of first order"]].fillna(0.0)
    both = both.assign(gap=numbers["accuracy"] - numbers["accuracy of first order"])
    return both.groupby("seed")["gap"].agg(lambda gaps: gaps.iloc[-1] - gaps.iloc[0]).reset_index(name="further")


def summary(settings: Any, done: Finished) -> Summary:
    """Tables and claims."""
    data = runs_of(done)
    values: dict[str, Value] = {
        "starts": ("seed", "nunique"),
        "outer loss": "loss",
        "squared gradient norm": "slope",
        "accuracy, unseen classes [%]": "accuracy",
        "+- (one deviation)": ("accuracy", "std"),
        "ms per iteration": "ms",
        **({"diverged": ("diverged", "sum")} if len(data) and data["diverged"].any() else {}),
    }
    found = listed(f"After {settings.iterations} outer iterations, means over the starts", data, SIZES, values)
    rates, methods = varied(settings, data, "lr"), ("MAML", "ANIL")
    claims = asked("maml", "rates", over_starts(rates, "loss"))
    for what, words in (("loss", "outer loss"), ("slope", "squared gradient norm")):
        for column in ("tasks", "batch"):
            claims += asked("maml", column, over_starts(varied(settings, data, column), what), what=words)
    claims += asked("maml", "anil", beside(*(best(varied(settings, data, "lr", method=method)) for method in methods)))
    ways = sorted(settings.ways)
    return Summary(found, claims + asked("maml", "ways", behind(settings, data), fewest=ways[0], most=ways[-1]))


def pictures(settings: Any, done: Finished, folder: Path) -> list[Path]:
    """``maml.png``: the loss over the step size and over both batch sizes, and ANIL beside MAML over time."""
    data = runs_of(done)
    if not len(data) or data["diverged"].all():
        return []
    figure, ((first, second, third, fourth),) = panels(1, 4, 3.6, 3.4)
    styles = {"MAML": STYLES["exact"], "ANIL": STYLES["binomial"]}
    for method, style in styles.items():
        rates = varied(settings, data, "lr", method=method)
        look = {**style, "label": method, "markersize": 5}
        _lines(first, rates.dropna(subset=["loss"]), "lr", look)
        for place, (_, run) in enumerate(best(rates).iterrows()):
            label = method if place == 0 else None
            fourth.plot(run["seconds"], smoothed(run["losses"], 15), **{**look, "label": label, "marker": None})
    for axes, column in ((second, "tasks"), (third, "batch")):
        rows = varied(settings, data, column)
        _lines(axes, rows.assign(**{column: rows[column].astype(str)}), column, styles["MAML"])
    first.set(xscale="log", yscale="log", xlabel="inner step size", ylabel="outer loss in the end")
    second.set(xlabel="tasks per outer iteration", ylabel="outer loss in the end")
    third.set(xlabel="support images per inner gradient", ylabel="outer loss in the end")
    fourth.set(xlabel="processor time [s]", ylabel="training loss, smoothed", title="each at its best step size")
    for axes in (first, second, third, fourth):
        axes.grid(alpha=0.3)
    legend_below(figure, first, 2)
    return [save(figure, folder / "maml.png")]


def _lines(axes: Any, rows: Frame, x: str, look: dict[str, Any]) -> None:
    """The loss of each start, the first one with a label."""
    starts: Any = rows.groupby("seed") if len(rows) else ()
    for place, (_, each) in enumerate(starts):
        axes.plot(list(each[x]), list(each["loss"]), **{**look, **({"label": None} if place else {})})
