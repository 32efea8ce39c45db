"""What the memory-reduced algorithm's runs say: tables, answers to the paper's claims, pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from diffopt.experiments.framework import image_sets
from diffopt.experiments.framework.claims import Every, Frame, answers, ask, long_table
from diffopt.experiments.framework.experiment import Claim, Results, Row, Summary, Unit
from diffopt.experiments.framework.outer_loop import AXES, curve, outcome
from diffopt.experiments.framework.pictures import STYLES, curves
from diffopt.experiments.framework.tables import listed
from diffopt.experiments.memory_reduced_problem import FORMS

PAPER = "memory-reduced paper"
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
NOTES = (
    "The paper's pseudocode, its constants and the numbers of its figures are not in the text available to us: the "
    "algorithm is a reconstruction (derivations, section 6.3), its warm starts our inference from the theorem.",
    "The paper's data (CIFAR-FS, FC100, miniImageNet, tieredImageNet) cannot be had here; `--dataset` takes them. "
    "The network has fewer channels than the paper's, and the outer optimizer is Adam for all methods.",
    "Memory is the peak of torch's allocator above the start of one task's hypergradient. Where the embedding is part "
    "of the inner loss, each inner step that is kept keeps a graph of it; where its features are computed once, which "
    "every head-only method may do, an inner step keeps the head's graph alone. MAML adapts the embedding: one form.",
    "Training uses features computed once. Each task takes its turn: times are of work, not of batching. The test "
    "tasks are the same for every start and method, and differences are taken task by task.",
    "The inner step size matters more to implicit gradients than to back-propagation, for they take the head to be at "
    "its minimum: with `--set lr=0.4 --set iterations=80` both of ours diverge (outer loss 1.3 to 20), not ITD-BiO.",
    "The deterministic case is a small problem in float64 (4 tasks of 3 classes), two inner steps and one iteration of "
    "conjugate gradients per outer step, and gradient descent outside.",
)
TRAINED = (
    ask(
        "its accuracy is at least that of MAML, ANIL and ITD-BiO after as many iterations",
        f"{PAPER}, Fig. 1",
        tuple(f"accuracy: {OURS} - {rival} >= 0" for rival in RIVALS),
        crossed=True,
        order=True,
        headline=True,
    ),
    ask(
        "it takes less time for as many iterations",
        "this library",
        tuple(f"seconds: {OURS} / {rival} < 1" for rival in RIVALS),
    ),
    ask(
        "with sampled tasks, warm starts train no worse than cold ones (up to one point)",
        "derivations, 6.3",
        f"accuracy: {OURS} - ours, cold >= -1",
        crossed=True,
        unit=" points",
    ),
)
DETERMINISTIC = (
    ask(
        "with K and N constant, the deterministic case converges to a stationary point",
        f"{PAPER}, theorem 2; true gradient below 1e-4 of the first",
        "shrunk: warm < 1e-4",
        headline=True,
    ),
    ask(
        "that takes warm starts: from cold ones the gradient stalls (it ends 100 times larger)",
        "derivations, 6.3",
        "shrunk: cold / warm > 100",
    ),
)


def memory_of(units: Sequence[Unit], results: Results) -> Frame:
    """One row per number of steps, form of the inner loss and method; what ours saves of its memory, in per cent."""

    def records(row: Row) -> Iterator[Row]:
        for form, methods in row.items():
            ours = methods[OURS]["megabytes"]
            for method, cost in methods.items():
                size = cost["megabytes"]
                yield {
                    "form": form,
                    "rule": method,
                    **cost,
                    "saved": 100 * (1 - ours / size) if size and ours else math.nan,
                }

    return long_table(units, results, records, part="memory")


def runs_of(settings: Any, units: Sequence[Unit], results: Results) -> Frame:
    """One row per run and test task."""

    def records(row: Row) -> Iterator[Row]:
        found = outcome(row, 0.0, WINDOW)
        for draw, accuracy in enumerate(row["each"]):
            yield {"draw": draw, "accuracy": accuracy, **found, "seconds": row["seconds"][-1]}

    return long_table(units, results, records, part="learn")


def summary(settings: Any, units: Sequence[Unit], results: Results) -> Summary:
    """Tables and claims."""
    memory, runs = memory_of(units, results), runs_of(settings, units, results)
    starts = long_table(units, results, lambda row: [_shrunk(row)], part="deterministic")
    title = f"{image_sets.SETS[settings.dataset].title}, {settings.way}-way {settings.shot}-shot"
    found = listed(
        f"{title}: after {settings.iterations} outer iterations, K={settings.steps}",
        runs,
        {"method": "rule"},
        {
            "accuracy [%]": "accuracy",
            "+- (95 %)": ("accuracy", "+-"),
            "final outer loss": "final",
            "seconds": "seconds",
            "ms per iteration": "ms",
        },
        paper=lambda at: "at least the others'" if at["rule"] == OURS else None,
    )
    for key, words in (("megabytes", "Peak memory [MB]"), ("seconds", "Seconds")):
        found += listed(
            f"{words} of one task's hypergradient over inner steps",
            memory,
            {"inner loss": "form", "method": "rule"},
            {},
            across="K",
            cell=key,
            label=lambda k: f"K={k}",
        )
    found += listed(
        "Norm of the true gradient in the deterministic case",
        starts,
        {"starts": "rule"},
        {
            "at first": "first",
            "halfway": "middle",
            "in the end": "last",
            "outer loss in the end": "loss",
        },
    )
    claims = (*_of_memory(memory), *answers(runs, TRAINED), *answers(starts, DETERMINISTIC))
    return Summary(found, claims, NOTES)


def _shrunk(row: Row) -> Row:
    norms = row["gradient"]
    last = {"last": norms[-1], "shrunk": norms[-1] / norms[0], "loss": row["losses"][-1]}
    return {"first": norms[0], "middle": norms[len(norms) // 2], **last}


def _of_memory(memory: Frame) -> Iterator[Claim]:
    """Claims about exact sizes."""
    ours = memory[memory["rule"] == OURS].dropna(subset=["megabytes"]) if len(memory) else memory
    flat = Every(
        "memory does not grow with the number of inner steps K (up to 5 %)",
        f"{PAPER}, Fig. 2",
        "most <= 1.05 * least",
        shown="most",
        note="megabytes, in each form of the inner loss",
        headline=True,
    )
    sizes = ours.groupby("form")["megabytes"].agg(most="max", least="min") if len(ours) > len(FORMS) else pd.DataFrame()
    yield flat.answer(sizes)
    for form in FORMS:
        told = ""
        if len(memory):
            each = memory[memory["form"] == form].groupby("rule")["saved"].agg(["min", "max"]).dropna()
            told = "; ".join(f"{r}: {each['min'][r]:.0f} to {each['max'][r]:.0f} %" for r in RIVALS if r in each.index)
        yield Every(
            f"it saves more than half of the memory of MAML, ANIL and ITD-BiO ({form})",
            f"{PAPER}, abstract and Fig. 2",
            "saved > 50",
            f"form == {form!r} and rule in {RIVALS} and saved == saved",
            note=told,
            headline=form == FORMS[0],
        ).answer(memory)


def pictures(units: Sequence[Unit], results: Results, folder: Path) -> list[Path]:
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
    look: dict[str, Any] = {"labels": labels, "hue": "rule"}
    runs = long_table(units, results, records, part="learn")
    sides: dict[str, Any] = {"x": ("iteration", "time", "loss at"), "y": ("accuracy", "accuracy", "loss"), "over": "at"}
    scales = {"time": "symlog"}
    found = curves(runs, folder / "training.png", **sides, style=style, scales=scales, legend=5, **look)
    memory = memory_of(units, results)
    marked: dict[str, Any] = {"style": COLOURS.get, "scales": {"K": "log", "megabytes": "log"}}
    found += curves(memory, folder / "memory.png", x="K", y="megabytes", panel="form", **marked, **look)
    path, starts = folder / "deterministic.png", long_table(units, results, descents, part="deterministic")
    scales = {"gradient": "log"}
    return found + curves(
        starts, path, x="iteration", y="gradient", style=lambda r: style(f"ours, {r}"), scales=scales, **look
    )
