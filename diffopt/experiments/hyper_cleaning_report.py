"""What the learned weights say: tables, claims and pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from diffopt.experiments.framework.claims import Finished, Frame
from diffopt.experiments.framework.experiment import Row, Summary
from diffopt.experiments.framework.pictures import SEQUENCE, STYLES, curves
from diffopt.experiments.framework.tables import Value, levelled, listed
from diffopt.experiments.framework.texts import asked

FITS = {
    "noisy": "all labels as they are",
    "oracle": "right labels only (oracle)",
    "validation images only": "validation images only",
}


def runs_of(done: Finished) -> Frame:
    """One row per run: the fit under the learned weights, beside the plain fits of the same start."""

    def records(row: Row) -> Iterator[Row]:
        if "diverged" in row:
            yield {"accuracy": 0.0, "seconds": math.inf, "f1": 0.0, "told": None, "loss": None, "diverged": 1}
            return
        final = row["final"]
        found = {"accuracy": final["accuracy"], "f1": final["f1"], "told": 100 * final["told"]}
        yield {**found, "loss": row["losses"][-1], "seconds": row["seconds"][-1], "diverged": 0}

    data = done.table(records, part="learn")
    base = done.table(lambda row: [row], part="baselines")
    if not len(data):
        return data
    columns = ["noisy", "oracle", "validation images only"]
    base = base if len(base) else pd.DataFrame(columns=["seed", *columns], dtype=float)
    data = data.merge(base[["seed", *columns]], on="seed", how="left")
    lost = (data["oracle"] - data["noisy"]).replace(0, math.nan)
    gain = data["accuracy"] - data["validation images only"]
    won = 100 * (data["accuracy"] - data["noisy"]) / lost
    best = data["accuracy"] == data.groupby("seed")["accuracy"].transform("max")
    return data.assign(won=won, gain=gain, best=best, estimator=data["method"].map(estimator_of))


def estimator_of(method: str) -> str:
    """A method without its number."""
    return levelled(method.partition(",")[0])[0]


def errors_of(done: Finished) -> Frame:
    """One row per estimator: its first hypergradient beside the exact one."""

    def records(row: Row) -> Iterator[Row]:
        for method, found in row["rules"].items():
            predicted = None
            if method.startswith("ES Jacobian"):
                predicted = math.sqrt((row["hyperparameters"] + 1) / int(method.rpartition("=")[2]))
            factor = (found["relative_error"] or 0.0) / (predicted or math.nan)
            known = {"method": method, "estimator": estimator_of(method), "curvature": row["curvature"]}
            yield {**known, **found, "of_predicted": factor}

    return done.table(records, part="errors")


def summary(settings: Any, done: Finished) -> Summary:
    """Tables and claims."""
    data, errors = runs_of(done), errors_of(done)
    base = done.table(
        lambda row: [{"fit": words, "accuracy": row[key], "wrong": row["wrong"]} for key, words in FITS.items()],
        part="baselines",
    )
    wrong = f"{100 * base['wrong'].mean():.1f}" if len(base) else ""
    values: dict[str, Value] = {"test accuracy [%]": "accuracy", "+- (95 %)": ("accuracy", "+-")}
    found = listed(f"Plain fits; {wrong} % of the labels are wrong", base, {"fitted to": "fit"}, values)
    values |= {"won back [%]": "won", "F1": "f1", "labels told [%]": "told", "outer loss": "loss", "seconds": "seconds"}
    values |= {"diverged": "diverged"} if len(data) and data["diverged"].any() else {}
    found += listed(f"Weights learned in {settings.iterations} outer steps", data, {"estimator": "method"}, values)
    number = errors["curvature"].mean() if len(errors) else math.nan
    shown = f"; T * lr * curvature is {number:.3g}" if math.isfinite(number) else ""
    keys = {"relative error": "relative_error", "cosine": "cosine", "gradients": "gradients", "products": "products"}
    found += listed(
        f"The first hypergradient beside the exact one{shown}",
        errors,
        {"estimator": "method"},
        {**keys, "depth": "depth", "peak [MB]": "megabytes"},
    )
    claims = asked("hyper-cleaning", "learned", data)
    return Summary(found, claims + asked("hyper-cleaning", "errors", errors, curvature=2 * max(settings.orders)))


def pictures(settings: Any, done: Finished, folder: Path) -> list[Path]:
    """``learning.png``: outer loss, accuracy and F1 over processor time."""

    def records(row: Row) -> Iterator[Row]:
        keys = ("seconds", "losses", "accuracy", "f1")
        for at, values in enumerate(zip(*(row.get(key, ()) for key in keys), strict=True)):
            yield {"at": at, **dict(zip(keys, values, strict=True))}

    data = done.table(records, part="learn")
    base = done.table(lambda row: [row], part="baselines")
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
