"""What the methods without second derivatives say: tables, a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffopt.experiments.framework.claims import Finished, Frame
from diffopt.experiments.framework.equal_time import COLUMNS, LABELS, beside_exact, episodes, looks
from diffopt.experiments.framework.experiment import Row, Summary
from diffopt.experiments.framework.pictures import STYLES, curves
from diffopt.experiments.framework.tables import listed
from diffopt.experiments.framework.texts import asked

COLOURS = {
    "MAML": STYLES["exact"]["color"],
    "FOMAML": STYLES["first-order"]["color"],
    "HF-MAML": STYLES["krylov"]["color"],
    "GGS-MAML": STYLES["binomial"]["color"],
    "ES-MAML": STYLES["truncated"]["color"],
    "ESJ": STYLES["hybrid"]["color"],
}


def errors_of(done: Finished) -> Frame:
    """One row per start, number of steps and method."""

    def records(row: Row) -> Iterator[Row]:
        for method, numbers in row.get("rules", {}).items():
            yield {"method": method, **split(method), **numbers}

    return done.table(records)


def split(method: str) -> dict[str, Any]:
    """A method's name and its number of directions, 0 if it draws none."""
    name, _, directions = method.partition(", Q=")
    return {"estimator": name, "Q": int(directions or 0)}


def runs_of(settings: Any, done: Finished) -> Frame:
    """One row per run and test episode."""
    data = done.table(lambda row: None if "rules" in row else episodes(row, settings.episodes))
    if not len(data):
        return data
    data["method"] = data["estimator"]
    for column in ("estimator", "Q"):
        data[column] = [split(method)[column] for method in data["method"]]
    return beside_exact(data, ("MAML",))


def summary(settings: Any, done: Finished) -> Summary:
    """Tables and claims."""
    errors, data = errors_of(done), runs_of(settings, done)
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
    return Summary(found, (*asked("hessian-free", "errors", errors), *asked("hessian-free", "trained", data)))


def _style(method: str) -> dict[str, Any]:
    parts = split(method)
    return {"color": COLOURS[parts["estimator"]], "linestyle": "--" if parts["Q"] == 1 else "-", "marker": "o"}


def pictures(settings: Any, done: Finished, folder: Path) -> list[Path]:
    """``training.png``: validation accuracy over iterations and over processor time, and the outer loss."""
    return curves(
        done.table(looks),
        folder / "training.png",
        x=("after", "clock", "iteration"),
        y=("validation", "validation", "loss"),
        hue="estimator",
        over="at",
        style=_style,
        labels=LABELS,
        scales={"loss": "log"},
        legend=5,
    )
