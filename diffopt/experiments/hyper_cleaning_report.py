"""What the learned weights say: tables, answers to claims, pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from diffopt.experiments.framework.claims import Compare, Frame, answers, ask, long_table
from diffopt.experiments.framework.experiment import Results, Row, Summary, Unit
from diffopt.experiments.framework.pictures import SEQUENCE, STYLES, curves
from diffopt.experiments.framework.tables import Value, levelled, listed

HERE = "this library"
GOAL = 100 * 6 / 7.8
"""The share, in per cent, of what the wrong labels cost that is to be won back: 6 of 7.8 points of accuracy."""
FITS = {
    "noisy": "all labels as they are",
    "oracle": "right labels only (oracle)",
    "validation images only": "validation images only",
}
NOTES = (
    "A rule applies if it reaches what the inner loss reads. First order and Reptile do not: their hypergradient is "
    "zero, and the weights stay where they are. Forward mode would, with one tangent per training example: 5,000 "
    "times the work of one rollout.",
    "Accuracies of the table are those of a model fitted anew, for longer, under the learned weights; the curves show "
    "the model that the inner steps leave, which is fitted for a shorter time. A run that diverged counts as 0 %.",
    "The validation images are as many as the training images and all their labels are right: training on them alone "
    "is the yardstick for the use of the whole procedure.",
    "F1 is of the wrong labels found: weight below one half.",
)
LITTLE = (
    ("truncated", "truncated back-propagation", "Shaban et al. (2019)", True),
    ("implicit", "implicit differentiation", "Pedregosa (2016)", True),
    ("multi-step", "multi-step estimation", "multi-step paper, claim on time", True),
    ("binomial", "the binomial rule", "binomial paper, in spirit", False),
    ("krylov", "the Krylov rule", HERE, False),
    ("ES Jacobian", "the ES Jacobian", "slides, in spirit", False),
)
"""Estimators that are claimed to lose little, and of some that they take less time."""


def _little(estimator: str, words: str, source: str, faster: bool) -> Compare:
    formulas = (f"accuracy: {estimator} - exact >= -1 by ; method", f"seconds: {estimator} / exact < 1 by ; method")
    text = f"{words} loses little (up to 1 point)" + (" and takes less time" if faster else "")
    return ask(text, source, formulas[: 1 + faster])


CLAIMS = (
    ask(
        "the exact rule wins back at least 6 of 7.8 points (77 %)",
        HERE,
        f"won: exact >= {GOAL:.4f}",
        unit=" % of the points lost",
        headline=True,
    ),
    ask("it finds the wrong labels: F1 of at least 0.9", HERE, "f1: exact >= 0.9", headline=True),
    *(_little(*line) for line in LITTLE),
    ask(
        "cleaning is worth it: the best rule is above training on the validation images alone",
        HERE,
        "gain: * > 0",
        "best",
        unit=" points",
        headline=True,
    ),
)


def runs_of(units: Sequence[Unit], results: Results) -> Frame:
    """One row per run: the fit under the learned weights, beside the plain fits of the same start."""

    def records(row: Row) -> Iterator[Row]:
        if "diverged" in row:
            yield {"accuracy": 0.0, "seconds": math.inf, "f1": 0.0, "told": None, "loss": None, "diverged": 1}
            return
        final = row["final"]
        found = {"accuracy": final["accuracy"], "f1": final["f1"], "told": 100 * final["told"]}
        yield {**found, "loss": row["losses"][-1], "seconds": row["seconds"][-1], "diverged": 0}

    data = long_table(units, results, records, part="learn")
    base = long_table(units, results, lambda row: [row], part="baselines")
    if not len(data):
        return data
    columns = ["noisy", "oracle", "validation images only"]
    base = base if len(base) else pd.DataFrame(columns=["seed", *columns], dtype=float)
    data = data.merge(base[["seed", *columns]], on="seed", how="left")
    lost = (data["oracle"] - data["noisy"]).replace(0, math.nan)
    gain = data["accuracy"] - data["validation images only"]
    won = 100 * (data["accuracy"] - data["noisy"]) / lost
    best = data["accuracy"] == data.groupby("seed")["accuracy"].transform("max")
    return data.assign(won=won, gain=gain, best=best, rule=data["method"].map(estimator_of))


def estimator_of(method: str) -> str:
    """A method without its number."""
    return levelled(method.partition(",")[0])[0]


def errors_of(units: Sequence[Unit], results: Results) -> Frame:
    """One row per estimator: its first hypergradient beside the exact one."""

    def records(row: Row) -> Iterator[Row]:
        for method, found in row["rules"].items():
            predicted = None
            if method.startswith("ES Jacobian"):
                predicted = math.sqrt((row["hyperparameters"] + 1) / int(method.rpartition("=")[2]))
            factor = (found["relative_error"] or 0.0) / (predicted or math.nan)
            known = {"method": method, "rule": estimator_of(method), "curvature": row["curvature"]}
            yield {**known, **found, "of_predicted": factor}

    return long_table(units, results, records, part="errors")


def summary(settings: Any, units: Sequence[Unit], results: Results) -> Summary:
    """Tables and claims."""
    data, errors = runs_of(units, results), errors_of(units, results)
    base = long_table(
        units,
        results,
        lambda row: [{"fit": words, "accuracy": row[key], "wrong": row["wrong"]} for key, words in FITS.items()],
        part="baselines",
    )
    wrong = f"{100 * base['wrong'].mean():.1f}" if len(base) else ""
    values: dict[str, Value] = {"test accuracy [%]": "accuracy", "+- (95 %)": ("accuracy", "+-")}
    found = listed(f"Plain fits; {wrong} % of the labels are wrong", base, {"fitted to": "fit"}, values)
    values |= {"won back [%]": "won", "F1": "f1", "labels told [%]": "told", "outer loss": "loss", "seconds": "seconds"}
    values |= {"diverged": "diverged"} if len(data) and data["diverged"].any() else {}
    found += listed(f"Weights learned in {settings.iterations} outer steps", data, {"rule": "method"}, values)
    number = errors["curvature"].mean() if len(errors) else math.nan
    shown = f"; T * lr * curvature is {number:.3g}" if math.isfinite(number) else ""
    keys = {"relative error": "relative_error", "cosine": "cosine", "gradients": "gradients", "products": "products"}
    found += listed(
        f"The first hypergradient beside the exact one{shown}",
        errors,
        {"rule": "method"},
        {**keys, "depth": "depth", "peak [MB]": "megabytes"},
    )
    of_errors = (
        ask(
            "where T * lr * curvature is well above the order, binomial's error is above that of no correction (1)",
            "derivations (11c)",
            "relative_error: binomial > 1 by ; method",
            f"curvature > {2 * max(settings.orders)}",
        ),
        ask(
            "the ES Jacobian's error is sqrt((p + 1) / Q) (within a factor of 2)",
            "derivations, section 7",
            "of_predicted: ES Jacobian ~ 2",
        ),
    )
    return Summary(found, (*answers(data, CLAIMS), *answers(errors, of_errors)), NOTES)


def pictures(units: Sequence[Unit], results: Results, folder: Path) -> list[Path]:
    """``learning.png``: outer loss, accuracy and F1 over processor time."""

    def records(row: Row) -> Iterator[Row]:
        keys = ("seconds", "losses", "accuracy", "f1")
        for at, values in enumerate(zip(*(row.get(key, ()) for key in keys), strict=True)):
            yield {"at": at, **dict(zip(keys, values, strict=True))}

    data = long_table(units, results, records, part="learn")
    base = long_table(units, results, lambda row: [row], part="baselines")
    seen: dict[str, list[str]] = {}
    for method in dict.fromkeys(data["method"]) if len(data) else ():
        seen.setdefault(estimator_of(method), []).append(method)

    def style(method: str) -> dict[str, Any]:
        estimator = estimator_of(method)
        found = STYLES.get(estimator, {"color": SEQUENCE[1]})
        return {"color": found["color"], "linestyle": "-" if seen[estimator][0] == method else "--"}

    def fits(axes: Any, where: Any) -> None:
        if axes.get_ylabel().startswith("test accuracy") and len(base):
            noisy, oracle = base["noisy"].mean(), base["oracle"].mean()
            for value, word in ((oracle, "oracle, fitted for longer"), (noisy, "noisy, fitted for longer")):
                axes.axhline(value, color="0.6", linewidth=0.8, linestyle=":")
                place = {"xycoords": ("axes fraction", "data"), "va": "bottom", "fontsize": "small"}
                axes.annotate(word, (0.02, value), **place)
            axes.set_ylim(2 * noisy - oracle, oracle + (oracle - noisy) / 4)  # what failed is below

    return curves(
        data,
        folder / "learning.png",
        x="seconds",
        y=("losses", "accuracy", "f1"),
        hue="method",
        over="at",
        style=style,
        labels={
            "seconds": "processor time [s]",
            "losses": "outer loss",
            "accuracy": "test accuracy [%]",
            "f1": "F1 of the wrong labels",
        },
        scales={"seconds": "log", "losses": "log"},
        finish=fits,
        legend=5,
    )
