"""What the runs with the evolution-strategies Jacobian say: tables, answers to the slides' claims, pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from diffopt.experiments.esj_problem import DIVIDED
from diffopt.experiments.framework.claims import Frame, answers, ask, long_table
from diffopt.experiments.framework.experiment import Results, Row, Summary, Unit
from diffopt.experiments.framework.outer_loop import AXES, curve, outcome, smoothed
from diffopt.experiments.framework.pictures import STYLES, curves
from diffopt.experiments.framework.tables import listed

SLIDES = "slides, ESJ"
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
NOTES = (
    "The slides report the time (its unit is not printed) to reach 67 % and 69 % with a ResNet-12 of 12 million "
    "parameters: ESJ 2.0 and 2.8, ANIL 6.3 and -, MAML 9.7 and -, ProtoNet 3.5 and 4.4, MetaOptNet over 20 for both. "
    "Its data cannot be had here, and training it takes a GPU; ours are embeddings of 14x14 drawings by linear layers.",
    "Of a ResNet-12 with 12.4 million parameters one outer step is measured, on one task of drawings made larger, with "
    "as many inner steps for every rule. It shows what a step costs, and nothing of how many are needed.",
    "With p parameters and Q Gaussian directions the squared error of an unbiased estimate is (p + 1) / Q times that "
    "of leaving the response out. So with few directions the response drowns in noise; with the authors' scale, 1/p of "
    "it, the noise is gone and the response with it, and what trains is the direct part. (Their code takes unit "
    "directions for each tensor without the factor that makes them unbiased; we divide by the p of all tensors.)",
    "ESJ with Q directions takes central differences of the parameters and one more rollout, which checks that the "
    "loss repeats itself: 2 Q + 1 rollouts beside the forward pass. The slides' own form, forward differences with "
    "one rollout a direction and no check, is the row `forward`.",
    "With features once, the embedding of the support images is not part of the inner problem: it is computed once, "
    "ESJ perturbs the features of each task (5 times the width, and not all parameters) by forward differences, one "
    "rollout of the head a direction, and autograd goes on through the embedding. ITD and AID have that form too. "
    "ANIL learns the start of the head besides; MAML adapts all layers from a learned start, without the L2 term and "
    "without momentum. The slides' rivals are MAML, ANIL, ProtoNet and MetaOptNet; the last two differentiate through "
    "no inner loop, and are not run.",
)
STEPS = (
    ask(
        "one outer step of a ResNet-12 takes less time by ESJ than by MAML and by ANIL",
        f"{SLIDES}, whose table has the time of all steps to an accuracy",
        ("step: any ESJ / MAML < 1", "step: any ESJ / ANIL < 1"),
        note="ESJ's fastest form",
        headline=True,
    ),
    ask(
        "one outer step of a ResNet-12 takes less time by ESJ than by ITD and AID",
        "this library",
        "step: any ESJ / ITD or AID < 1",
        note="the fastest form of each",
    ),
)
DIVERGED = (
    "Ended above the loss it started from, in some start: {}. The features grow beyond what the inner step size can "
    "follow, and the inner loop diverges. Implicit differentiation takes the inner solution for exact, so nothing "
    "tells it; back-propagation (ITD) differentiates that loop, and comes back where its loss rises too."
)
TRAINED = (
    ask(
        "ESJ is faster than MAML and ANIL to a given loss",
        f"{SLIDES}, table: ResNet-12, of whose rivals these two learn by gradients of an inner loop",
        ("seconds: any ESJ / MAML < 1 by embedding", "seconds: any ESJ / ANIL < 1 by embedding"),
        note="ESJ's fastest form",
        headline=True,
    ),
    ask(
        "ESJ is faster than back-propagation (ITD) and implicit differentiation (AID) to a given loss",
        "this library; the slides name these two as the approximations that take second-order information",
        "seconds: any ESJ / ITD or AID < 1 by embedding",
        note="the fastest of each kind, features once or not",
    ),
    ask(
        "ESJ, in a form that is not scaled down, comes to a given loss no later than without any response",
        "this library",
        f"seconds: any unscaled ESJ / {DIRECT} <= 1 by embedding",
    ),
    ask(
        "without second-order information an iteration is cheaper",
        f"{SLIDES}; beside ITD, with the fewest directions",
        "ms: unbiased ESJ / ITD < 1 by embedding",
    ),
    ask(
        "with the authors' scale, ESJ trains like the direct part alone (final loss within 5 %)",
        "this library",
        f"final: {SCALED} / {DIRECT} ~ 1.05 by embedding",
        headline=True,
    ),
    ask(
        "the response is worth having: ITD ends below the direct part alone",
        "this library",
        f"final: ITD - {DIRECT} < 0 by embedding",
    ),
)
MEASURED = (
    ask(
        "the differences estimate the response (error below that of leaving it out)",
        SLIDES,
        "of_response: * < 1 by embedding, rule",
        "unbiased",
        note="error over that of the direct part alone",
    ),
    ask(
        "the error is sqrt((p + 1) / Q) times the response (within a factor of 2)",
        "derivations, section 7",
        "of_predicted: * ~ 2 by embedding, rule",
        "unbiased",
    ),
)


def unbiased(rule: str) -> bool:
    """Whether it is ESJ with the factor that makes it unbiased, by differences in the parameters."""
    return rule.startswith("ESJ") and rule != SCALED and not rule.endswith(ONCE)


def directions(rule: str) -> int:
    """``Q``, of a rule's name."""
    return int(rule.partition("Q=")[2].partition(",")[0])


def errors_of(units: Sequence[Unit], results: Results) -> Frame:
    """One row per start, embedding and estimator: the hypergradient beside the exact one."""

    def records(row: Row) -> Iterator[Row]:
        for rule, found in row.get("rules", {}).items():
            predicted = row["response"] if rule == DIRECT else None
            if unbiased(rule):
                predicted = row["response"] * math.sqrt((row["parameters"] + 1) / directions(rule))
            factors = {"of_response": found["error"] / row["response"], "unbiased": unbiased(rule)}
            factors |= {"predicted": predicted, "of_predicted": found["error"] / (predicted or math.nan)}
            yield {"rule": rule, "parameters": row["parameters"], **found, **factors}

    return long_table(units, results, records)


def with_best(data: Frame, columns: Sequence[str] = ("seconds", "ms")) -> Frame:
    """The runs, and the best of some kinds as if they were one, by some columns."""
    if not len(data):
        return data
    kinds = {"any ESJ": data["rule"].str.startswith("ESJ"), "ITD or AID": data["rule"].isin(RIVALS[:4])}
    kinds["unbiased ESJ"] = data["rule"].map(unbiased)
    kinds["any unscaled ESJ"] = kinds["any ESJ"] & (data["rule"] != SCALED)
    found = [data]
    for name, chosen in kinds.items():
        best = data[chosen].groupby(["seed", "embedding"])[list(columns)].min()
        found.append(best.reset_index().assign(rule=name))
    return pd.concat(found)


def summary(settings: Any, units: Sequence[Unit], results: Results) -> Summary:
    """Tables and claims."""
    errors = errors_of(units, results)
    data = long_table(units, results, lambda row: [outcome(row, settings.target, WINDOW)] if "losses" in row else None)
    found = listed(
        "The hypergradient at the start, beside the exact one",
        errors,
        {"embedding": "embedding", "rule": "rule"},
        {"parameters p": "parameters", "relative error": "error", "predicted": "predicted", "cosine": "cosine"},
    )
    to_target = f"to loss {settings.target:g}"
    found += listed(
        "Training the embedding",
        data,
        {"embedding": "embedding", "rule": "rule"},
        {
            "final outer loss": "final",
            "+- (95 %)": ("final", "+-"),
            f"iterations {to_target}": ("iterations", "median"),
            f"seconds {to_target}": ("seconds", "median"),
            "ms/iteration": "ms",
        },
    )
    steps = long_table(units, results, lambda row: [row] if "step" in row else None)
    found += listed(
        "One outer step of a ResNet-12",
        steps,
        {"rule": "rule"},
        {
            "parameters p": "parameters",
            "seconds": "step",
            "+- (95 %)": ("step", "+-"),
            "megabytes at the peak": ("megabytes", "max"),
        },
    )
    rose = {
        f"{unit.keys['rule']} ({unit.keys['embedding']})": True
        for unit in units
        if "rule" in unit.keys and _rose(results.get(unit.name, {}))
    }
    notes = (*NOTES, DIVERGED.format(", ".join(rose))) if rose else NOTES
    claims = (*answers(with_best(data), TRAINED), *answers(with_best(steps, ["step"]), STEPS))
    return Summary(found, (*claims, *answers(errors, MEASURED)), notes)


def _rose(row: Row) -> bool:
    """Whether a run ended above its start."""
    return "losses" in row and smoothed(row["losses"], WINDOW)[-1] > row["losses"][0]


def _looks(rules: Iterable[str]) -> dict[str, dict[str, str]]:
    """A colour for each way to take the hypergradient, a line for each form of it."""
    spare = cycle((STYLES["binomial, scale L/K"]["color"], STYLES["binomial"]["color"], "#7F7F00"))
    colours, found = dict(COLOURS), {}
    for rule in rules:
        base = rule.removesuffix(ONCE).removesuffix(FORWARD)
        base = AID if base == "AID" else base
        if base not in colours:
            colours[base] = next(spare)
        line = ":" if rule.endswith(ONCE) else "-." if rule.endswith(FORWARD) else "-"
        found[rule] = {"color": colours[base], "linestyle": "--" if rule in (DIRECT, SCALED) else line}
    return found


def pictures(settings: Any, units: Sequence[Unit], results: Results, folder: Path) -> list[Path]:
    """``training.png``: the outer loss over iterations and over processor time."""
    data = long_table(units, results, lambda row: curve(row, WINDOW))
    looks = _looks(dict.fromkeys(data["rule"]) if len(data) else ())

    def target(axes: Any, size: Any) -> None:
        axes.axhline(settings.target, color="0.6", linewidth=0.8, linestyle=":")
        shown = data[data["embedding"] == size]["loss"]
        start = data[(data["embedding"] == size) & (data["at"] == 1)]["loss"].max()
        axes.set_ylim(shown.min() - 0.05 * (start - shown.min()), start + 0.2 * (start - shown.min()))

    look: dict[str, Any] = {"labels": AXES, "style": looks.get, "size": (5, 3), "finish": target}
    path = folder / "training.png"
    return curves(data, path, x=("iteration", "time"), y="loss", hue="rule", panel="embedding", over="at", **look)
