"""What the methods without second derivatives say: tables, answers, a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffopt.experiments.framework.claims import Frame, answers, ask, long_table
from diffopt.experiments.framework.equal_time import COLUMNS, TIMED, beside_exact, episodes, validated
from diffopt.experiments.framework.experiment import Results, Row, Summary, Unit
from diffopt.experiments.framework.outer_loop import smoothed
from diffopt.experiments.framework.pictures import STYLES, curves
from diffopt.experiments.framework.tables import listed

MULTI_STEP = "multi-step paper, other Hessian-free methods"
COLOURS = {
    "MAML": STYLES["exact"]["color"],
    "FOMAML": STYLES["first-order"]["color"],
    "HF-MAML": STYLES["krylov"]["color"],
    "GGS-MAML": STYLES["binomial"]["color"],
    "ES-MAML": STYLES["truncated"]["color"],
    "ESJ": STYLES["hybrid"]["color"],
}
NOTES = (
    "The multi-step paper names these methods and runs none of them. HF-MAML is that of Fallah, Mokhtari and Ozdaglar "
    "(2020); ES-MAML that of Song et al. (2020), here their form that estimates the Hessian, which is what the paper "
    "speaks of; GGS-MAML is, by the paper's list of references, Ji, Yang and Liang (2020), arXiv 2002.07836, whose "
    "summary has a Hessian by a gradient-based Gaussian smoothing method. Its full text was not at hand: that the "
    "smoothed Hessian is the mean of (g(x + m z) - g(x)) / m times z' is ours to answer for.",
    "Each replaces the products with the inner Hessian in the exact recursion, at every inner step. An inner step back "
    "takes two gradients (HF-MAML), Q gradients (GGS-MAML), or 2 Q + 1 losses (ES-MAML); MAML takes one product. "
    "ES-MAML has central differences with the loss itself taken off, which have less noise than the paper's plain "
    "form. ESJ, this library's estimator by evolution strategies, perturbs the whole inner loop and projects what it "
    "answers on the outer gradient: to first order in the radius it is ES-MAML's other form, which takes differences "
    "of the outer loss after adaptation.",
    "Errors are of single episodes, after some iterations of MAML, where curvature matters; the mean square over the "
    "episodes of an outer iteration, and over sets of directions. All arithmetic is in single precision.",
    "The network has three layers and tanh, the images are 14x14, all runs share one inner and one outer step size. "
    "`In equal time` is the validation accuracy when the fastest run of a start had finished. The differences of "
    "GGS-MAML and ES-MAML are taken one direction after the other: in one batch they would take less time on a machine "
    "that is not busy with one. MAML keeps the graphs of its inner steps, for which the others have no use; they take "
    "each step's update once more.",
)
MEASURED = (
    ask(
        "ES-MAML has a large estimation error with few samples: larger than that of leaving the Hessian out",
        MULTI_STEP,
        "error: ES-MAML / FOMAML > 1 by K; Q",
        headline=True,
    ),
    ask(
        "GGS-MAML's error is much smaller than ES-MAML's (at most a tenth)",
        "Ji, Yang and Liang (2020), abstract; a tenth is ours",
        "error: GGS-MAML / ES-MAML < 0.1 by K, Q",
    ),
    ask(
        "GGS-MAML's error is smaller than that of leaving the Hessian out",
        "this library",
        "error: GGS-MAML / FOMAML < 1 by K; Q",
    ),
    ask(
        "HF-MAML is MAML up to the error of a difference (below 1 % of the gradient)",
        "Fallah, Mokhtari and Ozdaglar (2020): the error falls with the length of the difference",
        "error: HF-MAML < 0.01 by K",
    ),
)
TRAINED = (
    ask(
        "HF-MAML is as accurate as MAML (within one point)",
        "Fallah, Mokhtari and Ozdaglar (2020): the same rate",
        "accuracy: HF-MAML - MAML ~ 1",
        crossed=True,
        headline=True,
    ),
    ask(
        "random directions are worth having: GGS-MAML and ES-MAML end above first order",
        "this library",
        ("accuracy: GGS-MAML - FOMAML > 0 by K; Q", "accuracy: ES-MAML - FOMAML > 0 by K; Q"),
        crossed=True,
    ),
    ask(
        "differences of gradients save no time beside products by automatic differentiation",
        MULTI_STEP,
        "seconds: * [rule in ('HF-MAML', 'GGS-MAML')] / MAML >= 1 by K; method",
    ),
    ask(
        "none of them is above MAML in equal time",
        MULTI_STEP + ": less beneficial",
        f"{TIMED}: * [rule not in ('MAML', 'FOMAML')] - MAML <= 0 by K; method",
        crossed=True,
    ),
)


def errors_of(units: Sequence[Unit], results: Results) -> Frame:
    """One row per start, number of steps and method."""

    def records(row: Row) -> Iterator[Row]:
        for method, numbers in row.get("rules", {}).items():
            yield {"method": method, **split(method), **numbers}

    return long_table(units, results, records)


def split(method: str) -> dict[str, Any]:
    """A method's name and its number of directions, 0 if it draws none."""
    name, _, directions = method.partition(", Q=")
    return {"rule": name, "Q": int(directions or 0)}


def runs_of(settings: Any, units: Sequence[Unit], results: Results) -> Frame:
    """One row per run and test episode."""
    data = long_table(units, results, lambda row: None if "rules" in row else episodes(row, settings.episodes))
    if not len(data):
        return data
    data["method"] = data["rule"]
    for column in ("rule", "Q"):
        data[column] = [split(method)[column] for method in data["method"]]
    return beside_exact(data, ("MAML",))


def summary(settings: Any, units: Sequence[Unit], results: Results) -> Summary:
    """Tables and claims."""
    errors, data = errors_of(units, results), runs_of(settings, units, results)
    found = listed(
        f"The meta-gradient of one episode beside MAML's, after {settings.warm} outer iterations",
        errors,
        {"K": "K", "method": "method"},
        {"relative error": "error", "+- (95 %)": ("error", "+-"), "cosine": "cosine"},
    )
    found += listed(
        f"Training: {settings.iterations} outer iterations",
        data,
        {"method": "method"},
        COLUMNS,
    )
    return Summary(found, (*answers(errors, MEASURED), *answers(data, TRAINED)), NOTES)


def _style(method: str) -> dict[str, Any]:
    parts = split(method)
    return {"color": COLOURS[parts["rule"]], "linestyle": "--" if parts["Q"] == 1 else "-", "marker": "o"}


def pictures(settings: Any, units: Sequence[Unit], results: Results, folder: Path) -> list[Path]:
    """``training.png``: validation accuracy over iterations and over processor time, and the outer loss."""

    def records(row: Row) -> Iterator[Row]:
        if "each" in row:
            for at, (after, clock, value) in enumerate(zip(row["after"], *validated(row), strict=True)):
                yield {"after": after, "clock": clock, "validation": value, "at": at}
            for at, loss in enumerate(smoothed(row["losses"], 31)):
                yield {"iteration": at + 1, "loss": loss, "at": at}

    labels = {
        "after": "outer iteration",
        "clock": "processor time of training [s]",
        "validation": "validation accuracy [%]",
        "iteration": "outer iteration",
        "loss": "outer training loss",
    }
    return curves(
        long_table(units, results, records),
        folder / "training.png",
        x=("after", "clock", "iteration"),
        y=("validation", "validation", "loss"),
        hue="rule",
        over="at",
        style=_style,
        labels=labels,
        scales={"loss": "log"},
        legend=5,
    )
