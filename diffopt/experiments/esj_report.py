"""What the runs with the evolution-strategies Jacobian say: tables, claims and pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from diffopt.experiments.esj_problem import DIVIDED
from diffopt.experiments.framework.claims import Finished, Frame
from diffopt.experiments.framework.experiment import Row, Summary
from diffopt.experiments.framework.outer_loop import AXES, curve, outcome, smoothed
from diffopt.experiments.framework.pictures import STYLES, curves
from diffopt.experiments.framework.tables import listed
from diffopt.experiments.framework.texts import asked

SCALED, AID, DIRECT = DIVIDED, "AID, 10 CG", "direct part only"
RIVALS = ("ITD", AID, "ITD, features once", "AID, features once", "ANIL", "MAML")
ONCE, FORWARD = ", features once", ", forward"
WINDOW = 15
COLOURS: dict[str, str] = {
    DIRECT: STYLES["first-order"]["color"],
    "ITD": STYLES["exact"]["color"],
    AID: STYLES["implicit"]["color"],
    SCALED: STYLES["krylov"]["color"],
    "ANIL": STYLES["hybrid"]["color"],
    "MAML": STYLES["truncated"]["color"],
}
"""Of the estimators that are not ESJ with so many directions."""
DIVERGED = (
    "Ended above the loss it started from, in some start: {}. The features grow beyond what the inner step size can "
    "follow, and the inner loop diverges. Implicit differentiation takes the inner solution for exact, so nothing "
    "tells it; back-propagation (ITD) differentiates that loop, and comes back where its loss rises too."
)


def unbiased(method: str) -> bool:
    """Whether it is ESJ with the factor that makes it unbiased, by differences in the parameters."""
    return method.startswith("ESJ") and method != SCALED and not method.endswith(ONCE)


def directions(method: str) -> int:
    """``Q``, of a method's name."""
    return int(method.partition("Q=")[2].partition(",")[0])


def errors_of(done: Finished) -> Frame:
    """One row per start, embedding and estimator: the hypergradient beside the exact one."""

    def records(row: Row) -> Iterator[Row]:
        for method, found in row.get("rules", {}).items():
            predicted = row["response"] if method == DIRECT else None
            if unbiased(method):
                predicted = row["response"] * math.sqrt((row["parameters"] + 1) / directions(method))
            factors = {"of_response": found["error"] / row["response"], "unbiased": unbiased(method)}
            factors |= {"predicted": predicted, "of_predicted": found["error"] / (predicted or math.nan)}
            yield {"estimator": method, "parameters": row["parameters"], **found, **factors}

    return done.table(records)


def with_best(data: Frame, columns: Sequence[str] = ("seconds", "ms")) -> Frame:
    """The runs, and the best of some kinds as if they were one, by some columns."""
    if not len(data):
        return data
    kinds = {"any ESJ": data["estimator"].str.startswith("ESJ"), "ITD or AID": data["estimator"].isin(RIVALS[:4])}
    kinds["unbiased ESJ"] = data["estimator"].map(unbiased)
    kinds["any unscaled ESJ"] = kinds["any ESJ"] & (data["estimator"] != SCALED)
    found = [data]
    for name, chosen in kinds.items():
        best = data[chosen].groupby(["seed", "embedding"])[list(columns)].min()
        found.append(best.reset_index().assign(estimator=name))
    return pd.concat(found)


def summary(settings: Any, done: Finished) -> Summary:
    """Tables and claims."""
    errors = errors_of(done)
    data = done.table(lambda row: [outcome(row, settings.target, WINDOW)] if "losses" in row else None)
    found = listed(
        "The hypergradient at the start, beside the exact one",
        errors,
        {"embedding": "embedding", "estimator": "estimator"},
        {"parameters p": "parameters", "relative error": "error", "predicted": "predicted", "cosine": "cosine"},
    )
    to_target = f"to loss {settings.target:g}"
    found += listed(
        "Training the embedding",
        data,
        {"embedding": "embedding", "estimator": "estimator"},
        {
            "final outer loss": "final",
            "+- (95 %)": ("final", "+-"),
            f"iterations {to_target}": ("iterations", "median"),
            f"seconds {to_target}": ("seconds", "median"),
            "ms/iteration": "ms",
        },
    )
    steps = done.table(lambda row: [row] if "step" in row else None)
    found += listed(
        "One outer step of a ResNet-12",
        steps,
        {"estimator": "estimator"},
        {
            "parameters p": "parameters",
            "seconds": "step",
            "+- (95 %)": ("step", "+-"),
            "megabytes at the peak": ("megabytes", "max"),
        },
    )
    rose = {
        f"{unit.keys['estimator']} ({unit.keys['embedding']})": True
        for unit in done.units
        if "estimator" in unit.keys and _rose(done.results.get(unit.name, {}))
    }
    claims = (
        *asked("esj", "trained", with_best(data)),
        *asked("esj", "steps", with_best(steps, ["step"])),
        *asked("esj", "errors", errors),
    )
    return Summary(found, claims, (DIVERGED.format(", ".join(rose)),) if rose else ())


def _rose(row: Row) -> bool:
    """Whether a run ended above its start."""
    return "losses" in row and smoothed(row["losses"], WINDOW)[-1] > row["losses"][0]


def _looks(methods: Iterable[str]) -> dict[str, dict[str, str]]:
    """A colour for each way to take the hypergradient, a line for each form of it."""
    spare = cycle((STYLES["binomial, scale L/K"]["color"], STYLES["binomial"]["color"], "#7F7F00"))
    colours, found = dict(COLOURS), {}
    for method in methods:
        base = method.removesuffix(ONCE).removesuffix(FORWARD)
        base = AID if base == "AID" else base
        if base not in colours:
            colours[base] = next(spare)
        line = ":" if method.endswith(ONCE) else "-." if method.endswith(FORWARD) else "-"
        found[method] = {"color": colours[base], "linestyle": "--" if method in (DIRECT, SCALED) else line}
    return found


def pictures(settings: Any, done: Finished, folder: Path) -> list[Path]:
    """``training.png``: the outer loss over iterations and over processor time."""
    data = done.table(lambda row: curve(row, WINDOW))
    looks = _looks(dict.fromkeys(data["estimator"]) if len(data) else ())

    def target(axes: Any, size: Any) -> None:
        axes.axhline(settings.target, color="0.6", linewidth=0.8, linestyle=":")
        shown = data[data["embedding"] == size]["loss"]
        start = data[(data["embedding"] == size) & (data["at"] == 1)]["loss"].max()
        axes.set_ylim(shown.min() - 0.05 * (start - shown.min()), start + 0.2 * (start - shown.min()))

    look: dict[str, Any] = {"labels": AXES, "style": looks.get, "size": (5, 3), "finish": target}
    path = folder / "training.png"
    return curves(data, path, x=("iteration", "time"), y="loss", hue="estimator", panel="embedding", over="at", **look)
