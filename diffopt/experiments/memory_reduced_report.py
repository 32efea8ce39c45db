"""What the memory-reduced algorithm's runs say: tables, claims and pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from diffopt.experiments.framework import image_sets
from diffopt.experiments.framework.claims import Finished, Frame
from diffopt.experiments.framework.experiment import Claim, Row, Summary
from diffopt.experiments.framework.outer_loop import AXES, curve, outcome
from diffopt.experiments.framework.pictures import STYLES, curves
from diffopt.experiments.framework.tables import listed
from diffopt.experiments.framework.texts import asked
from diffopt.experiments.memory_reduced_problem import FORMS

RIVALS = ("MAML", "ANIL", "ITD-BiO")
OURS = "ours, warm"
WINDOW = 15
COLOURS = {
    OURS: STYLES["binomial"],
    "ours, cold": STYLES["binomial, scale L/K"],
    "ITD-BiO": STYLES["truncated"],
    "ANIL": STYLES["hybrid"],
    "MAML": STYLES["exact"],
}


def memory_of(done: Finished) -> Frame:
    """One row per number of steps, form of the inner loss and method; what ours saves of its memory, in per cent."""

    def records(row: Row) -> Iterator[Row]:
        for form, methods in row.items():
            ours = methods[OURS]["megabytes"]
            for method, cost in methods.items():
                size = cost["megabytes"]
                yield {
                    "form": form,
                    "estimator": method,
                    **cost,
                    "saved": 100 * (1 - ours / size) if size and ours else math.nan,
                }

    return done.table(records, part="memory")


def runs_of(settings: Any, done: Finished) -> Frame:
    """One row per run and test task."""

    def records(row: Row) -> Iterator[Row]:
        found = outcome(row, 0.0, WINDOW)
        for draw, accuracy in enumerate(row["each"]):
            yield {"draw": draw, "accuracy": accuracy, **found, "seconds": row["seconds"][-1]}

    return done.table(records, part="learn")


def summary(settings: Any, done: Finished) -> Summary:
    """Tables and claims."""
    memory, runs = memory_of(done), runs_of(settings, done)
    starts = done.table(lambda row: [_shrunk(row)], part="deterministic")
    title = f"{image_sets.SETS[settings.dataset].title}, {settings.way}-way {settings.shot}-shot"
    found = listed(
        f"{title}: after {settings.iterations} outer iterations, K={settings.steps}",
        runs,
        {"method": "estimator"},
        {
            "accuracy [%]": "accuracy",
            "+- (95 %)": ("accuracy", "+-"),
            "final outer loss": "final",
            "seconds": "seconds",
            "ms per iteration": "ms",
        },
        paper=lambda at: "at least the others'" if at["estimator"] == OURS else None,
    )
    for key, words in (("megabytes", "Peak memory [MB]"), ("seconds", "Seconds")):
        found += listed(
            f"{words} of one task's hypergradient over inner steps",
            memory,
            {"inner loss": "form", "method": "estimator"},
            {},
            across="K",
            cell=key,
            label=lambda k: f"K={k}",
        )
    found += listed(
        "Norm of the true gradient in the deterministic case",
        starts,
        {"starts": "estimator"},
        {
            "at first": "first",
            "halfway": "middle",
            "in the end": "last",
            "outer loss in the end": "loss",
        },
    )
    claims = (
        *_of_memory(memory),
        *asked("memory-reduced", "trained", runs),
        *asked("memory-reduced", "deterministic", _beside_first(starts)),
    )
    return Summary(found, claims)


def _shrunk(row: Row) -> Row:
    norms = row["gradient"]
    last = {"last": norms[-1], "shrunk": norms[-1] / norms[0], "loss": row["losses"][-1]}
    return {"first": norms[0], "middle": norms[len(norms) // 2], **last}


def _beside_first(starts: Frame) -> Frame:
    """The same with the norms in the end, and that at first as of one more estimator."""
    if not len(starts):
        return starts
    warm = starts[starts["estimator"] == "warm"]
    return pd.concat([starts.assign(norm=starts["last"]), warm.assign(estimator="at first", norm=warm["first"])])


def _of_memory(memory: Frame) -> Iterator[Claim]:
    """Claims about exact sizes."""
    ours = memory[memory["estimator"] == OURS].dropna(subset=["megabytes"]) if len(memory) else memory
    sizes = ours.groupby("form")["megabytes"].agg(most="max", least="min") if len(ours) > len(FORMS) else pd.DataFrame()
    yield from asked("memory-reduced", "growth", sizes)
    for form in FORMS:
        told = ""
        if len(memory):
            each = memory[memory["form"] == form].groupby("estimator")["saved"].agg(["min", "max"]).dropna()
            told = "; ".join(
                f"{r}: {each['min'][r] + 0:.0f} to {each['max'][r] + 0:.0f} %" for r in RIVALS if r in each.index
            )
        yield from asked("memory-reduced", form, memory, told=told)


def pictures(settings: Any, done: Finished, folder: Path) -> list[Path]:
    """``training.png``: accuracy over iterations and time; ``memory.png``; ``deterministic.png``."""

    def records(row: Row) -> Iterator[Row]:
        yield from ({**point, "loss at": point["iteration"]} for point in curve(row, WINDOW))
        seconds = [0.0, *row["seconds"]]
        for after, accuracy in zip(row["after"], row["accuracy"], strict=True):
            yield {"at": after, "iteration": after, "time": seconds[int(after)], "accuracy": accuracy}

    def descents(row: Row) -> Iterator[Row]:
        for after, norm in zip(row["after"], row["gradient"], strict=True):
            yield {"iteration": after, "gradient": norm}

    def style(method: str) -> dict[str, Any]:
        return {"color": COLOURS[method]["color"], "linestyle": "--" if method == "ours, cold" else "-"}

    labels = {**AXES, "accuracy": "test accuracy [%]", "megabytes": "peak memory [MB]", "K": "inner steps K"}
    labels |= {"loss at": "outer iteration", "gradient": "norm of the true gradient"}
    look: dict[str, Any] = {"labels": labels, "hue": "estimator"}
    runs = done.table(records, part="learn")
    sides: dict[str, Any] = {"x": ("iteration", "time", "loss at"), "y": ("accuracy", "accuracy", "loss"), "over": "at"}
    scales = {"time": "symlog"}
    found = curves(runs, folder / "training.png", **sides, style=style, scales=scales, legend=5, **look)
    memory = memory_of(done)
    marked: dict[str, Any] = {"style": COLOURS.get, "scales": {"K": "log", "megabytes": "log"}}
    found += curves(memory, folder / "memory.png", x="K", y="megabytes", panel="form", **marked, **look)
    path, starts = folder / "deterministic.png", done.table(descents, part="deterministic")
    scales = {"gradient": "log"}
    return found + curves(
        starts, path, x="iteration", y="gradient", style=lambda r: style(f"ours, {r}"), scales=scales, **look
    )
