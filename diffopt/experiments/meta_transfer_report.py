"""What meta-transfer found: tables beside the paper's, claims and pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from diffopt.experiments.framework.claims import Finished, Frame
from diffopt.experiments.framework.experiment import Claim, Row, Summary
from diffopt.experiments.framework.tables import Value, listed
from diffopt.experiments.framework.texts import asked
from diffopt.experiments.meta_transfer_problem import BASELINE, FIRST_ORDER, FIXED, KINDS, SCRATCH, annealing

WINDOW, ONE_STEP = "one window of T", "one step, T lr"
DIFFERENCES = {
    "difference": "its two-norm",
    "relative difference": "divided by the gradient's norm",
    "per step size": "divided by that and by the step size, which is annealed to zero",
}
SAID: dict[tuple[str, str], str] = {
    (SCRATCH, "sgd"): "42.15 ± 0.75",
    (BASELINE, "sgd"): "65.05 ± 1.19",
    ("multi-step", "sgd"): "64.89 ± 0.98",
    (FIRST_ORDER, "sgd"): "41.46 ± 2.34",
    (FIXED, "adam"): "48.91 ± 0.83",
    (BASELINE, "adam"): "66.26 ± 0.51",
    ("multi-step", "adam"): "66.51 ± 1.08",
}
"""Bird: tables 2 and 3, section 5.1, appendix H."""


def difference_curve(row: Row, key: str, iterations: int) -> list[float]:
    """``difference`` or ``relative difference`` as measured; ``per step size``: the latter over the annealed size."""
    if key != "per step size":
        return list(row[key])
    measured = zip(row["after"], row["relative difference"], strict=False)  # accuracy is measured once more, in the end
    return [value / annealing(after + 1, iterations) for after, value in measured]  # an update comes before


def runs_of(done: Finished) -> Frame:
    """One row per run: its accuracy in the end, also beside the baseline's of the same start."""
    data = done.table(lambda row: [{"accuracy": row["accuracy"][-1]}], part="learn")
    if not len(data):
        return data
    base = data[data["estimator"] == BASELINE][["seed", "kind", "accuracy"]]
    data = data.merge(base, on=["seed", "kind"], how="left", suffixes=("", " of baseline"))
    return data.assign(beside=data["accuracy"] - data["accuracy of baseline"])


def steps_of(settings: Any, done: Finished) -> Frame:
    """One row per run by Adam, of every T: exact, by one window, by one step of T times the rate; of ``learn`` too."""

    def records(row: Row) -> Iterator[Row]:
        yield {"accuracy": row["accuracy"][-1]}

    other = done.table(records, part="steps")
    main = done.table(records, part="learn", kind="adam")
    main = main.assign(T=settings.steps) if len(main) else main
    data: Frame = pd.concat([main, other])
    if not len(data):
        return data
    names = data["T"].astype(str)
    data = data.assign(estimator=data["estimator"].mask(data["estimator"] == "multi-step " + names, WINDOW))
    data = data.assign(estimator=data["estimator"].mask(data["estimator"] == "one step, " + names + " lr", ONE_STEP))
    return data[data["estimator"].isin((BASELINE, WINDOW, ONE_STEP))].sort_values("T", kind="stable")


def pairs_of(done: Finished) -> Frame:
    """One row per run that learns and pair of stages: the weight it ends with, mean over the test images."""

    def records(row: Row) -> Iterator[Row]:
        for pair, weight in row["pairs"].items():
            source, target = map(int, pair.split("-"))
            yield {"pair": f"({source}, {target})", "source": source, "target": target, "weight": weight}

    data = done.table(records, part="learn")
    return data[data["estimator"] != FIXED] if len(data) else data


def costs_of(done: Finished) -> Frame:
    """One row per start, T, inner optimizer and method; two methods once more, under names that hold for every T."""

    def records(row: Row) -> Iterator[Row]:
        for name, cost in row["methods"].items():
            yield {"estimator": name, **cost}

    data = done.table(records, part="cost")
    if not len(data):
        return data
    window = data[data["estimator"] == "multi-step " + data["T"].astype(str)].assign(estimator=WINDOW)
    return pd.concat([data, window, data[data["estimator"].str.startswith("one step")].assign(estimator=ONE_STEP)])


def growth_of(costs: Frame) -> Frame:
    """How much longer a further step takes at the largest T than at the smallest, by start and inner optimizer."""
    rows = []
    base = costs[costs["estimator"] == BASELINE].sort_values("T") if len(costs) else costs
    for (seed, kind), group in base.groupby(["seed", "kind"]) if len(base) else ():
        slopes = list((group["seconds"].diff() / group["T"].diff()).iloc[1:])
        if len(slopes) > 1:
            growth = slopes[-1] / slopes[0] if slopes[0] > 0 else math.inf  # the clock is not that exact
            rows.append({"seed": seed, "kind": kind, "growth": growth})
    return pd.DataFrame(rows)


def differences_of(settings: Any, done: Finished) -> Frame:
    """One row per run of the baseline and measurement of Fig. 1's difference, normalised in three ways."""

    def records(row: Row) -> Iterator[Row]:
        found = {key: difference_curve(row, key, settings.iterations) for key in DIFFERENCES}
        for after, *values in zip(row["after"], *found.values(), strict=False):
            yield {"after": after, **dict(zip(found, values, strict=True))}

    return done.table(records, part="learn", estimator=BASELINE)


def summary(settings: Any, done: Finished) -> Summary:
    """Tables and claims."""
    runs, costs = runs_of(done), costs_of(done)
    title = f"Target accuracy after {settings.iterations} iterations, T={settings.steps}, {settings.seeds} starts"
    if source := done.results.get("source"):
        sizes = f"{source['training images']} training and {source['test images']} test images of {source['classes']}"
        title += f"; {sizes} classes; source at {source['accuracy']:.0f} % in training"
        title += f", a linear layer on its features at {source['linear layer']:.1f} % on the test images"
    values: dict[str, Value] = {"accuracy [%]": "accuracy", "+- (95 %)": ("accuracy", "+-")}
    found = listed(
        title,
        runs,
        {"inner optimizer": "kind", "method": "estimator"},
        {**values, "beside the baseline": "beside", "+- of that": ("beside", "+-")},
        paper=lambda at: SAID.get(
            ("multi-step" if at["estimator"] == f"multi-step {settings.steps}" else at["estimator"], at["kind"])
        ),
        said="the paper, Bird",
    )
    found += listed(
        "Learned: weights of the pairs (source's stage, target's stage, counted from 0), which start at 1",
        pairs_of(done),
        {"inner optimizer": "kind", "method": "estimator"},
        {},
        across="pair",
        cell="weight",
    )
    steps = steps_of(settings, done)
    found += listed(
        "Fig. 4a: accuracy over the steps T on the transfer loss; inner optimizer Adam",
        steps,
        {"method": "estimator"},
        {},
        across="T",
        cell="accuracy",
        label=lambda t: f"T={t} [%]",
    )
    found += listed(
        "One iteration: processor time, memory, and the hypergradient beside the exact one",
        costs[~costs["estimator"].isin((WINDOW, ONE_STEP))] if len(costs) else costs,
        {"T": "T", "inner optimizer": "kind", "method": "estimator"},
        {
            "seconds": "seconds",
            "time / baseline's": "ratio",
            "+- (95 %)": ("ratio", "+-"),
            "peak [MB]": "megabytes",
            "error": "error",
            "cosine": "cosine",
        },
        paper=lambda at: 0.65 if (at["estimator"], at["T"]) == ("multi-step 2", 2) else None,
        said="the paper's time",
    )
    claims = (
        *_of_accuracy(settings, runs),
        *asked("meta-transfer", "steps", steps),
        *asked("meta-transfer", "costs", costs),
        *asked("meta-transfer", "growth", growth_of(costs)),
        *_of_differences(differences_of(settings, done)),
    )
    return Summary(found, claims)


def _gains(runs: Frame) -> bool:
    """Whether transfer is shown to gain anything over scratch: learned, or at fixed weights."""
    (gain,), (headroom,) = (asked("meta-transfer", group, runs) for group in ("gain", "headroom"))
    return gain.answer == "yes" or headroom.answer in ("yes", "partly")


def _of_accuracy(settings: Any, runs: Frame) -> Iterator[Claim]:
    """Claims about what transfer gains, and about what is lost of it, which ask for something to lose."""
    yield from asked("meta-transfer", "headroom", runs)
    yield from asked("meta-transfer", "gain", runs)
    gaining = [kind for kind in KINDS if len(runs) and _gains(runs[runs["kind"] == kind])]
    shown = runs[runs["kind"].isin(gaining)] if len(runs) else runs
    both = (asked("meta-transfer", "losses", data, steps=settings.steps) for data in (shown, runs))
    for found, whole in zip(*both, strict=True):
        if found.answer == "not measured" != whole.answer:
            none = "no transfer is shown to gain over scratch here, so that no estimator can lose it"
            found = replace(whole, answer="not measured", evidence=f"{none}; {whole.evidence}")
        yield found


def _of_differences(data: Frame) -> Iterator[Claim]:
    for key, words in DIFFERENCES.items():
        left = data
        if len(data):
            ends = data.sort_values("after").groupby(["seed", "kind"])[key].agg(["first", "last"]).reset_index()
            left = ends.assign(left=ends["last"] / ends["first"])
        yield from asked("meta-transfer", "differences", left, words=words)
