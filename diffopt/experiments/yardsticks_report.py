"""What the public yardsticks say: tables and answers to claims."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from diffopt.experiments import yardsticks_influence as influence
from diffopt.experiments import yardsticks_toy as toy
from diffopt.experiments.framework.claims import Finished, Frame
from diffopt.experiments.framework.experiment import Claim, Row, Summary, Table
from diffopt.experiments.framework.tables import Value, listed
from diffopt.experiments.framework.texts import asked

INDEX = {"estimator": "estimator"}


def summary(settings: Any, done: Finished) -> Summary:
    """Tables and claims."""
    still, moving = influence_of(done), toy_of(done)
    fits, first, runs = fits_of(done), first_of(done), runs_of(done)
    tables = _influence_table(settings, still) + _toy_table(settings, moving)
    tables += _cleaning_tables(settings, fits, pd.concat([first, runs]))
    claims = (*_influence_claims(still), *_toy_claims(settings, moving), *_cleaning_claims(fits, first, runs))
    return Summary(tables, claims)


def influence_of(done: Finished) -> Frame:
    """One row per estimator of influence balancing; one that refuses or diverges has no hypergradient."""

    def records(row: Row) -> Iterator[Row]:
        if "gradient" not in row:
            none = dict.fromkeys(("gradient", "theta", "distance"), math.nan)
            yield {**none, "said": row.get("refused", row.get("diverged")), "warned": False}
            return
        theta, steps = row["path"][-1], len(row["path"]) - 1
        end = f"leaves, after {steps} steps" if abs(theta) > influence.FAR else f"{theta:.4f}"
        found = {"gradient": row["gradient"], "said": ", ".join(row["warned"]) or "nothing", "end": end}
        yield {**found, "theta": theta, "distance": abs(theta - influence.OPTIMUM), "warned": bool(row["warned"])}

    data = done.table(records, part="influence")
    return data.assign(by_hand=data["estimator"].map(influence.by_hand)) if len(data) else data


def _influence_table(settings: Any, still: Frame) -> tuple[Table, ...]:
    title = f"Influence balancing: the hypergradient at theta = 0.5 after {settings.influence_steps} steps, and descent"
    values: dict[str, Value] = {"hypergradient": "gradient", "by hand": "by_hand", "warned of, or refused by": "said"}
    values[f"theta after {settings.influence_iterations} steps"] = "end"
    return listed(f"{title} by it to the optimum -0.1667", still, INDEX, values)


def _influence_claims(still: Frame) -> Iterator[Claim]:
    yield from asked("yardsticks", "influence", still)
    pairs = still
    if len(still):  # as many terms of Neumann's series as steps that truncation keeps
        names = still["estimator"].str.rpartition(" ")
        sides = [still.assign(length=names[2])[names[0] == kind] for kind in ("implicit, Neumann", "truncated")]
        pairs = sides[0].merge(sides[1], on="length", suffixes=("", "_truncated"))
    yield from asked("yardsticks", "series", pairs)
    silent = still[(still["gradient"] < 0) & ~still["warned"]]["estimator"] if len(still) else ()
    yield from asked("yardsticks", "signs", still, silent=", ".join(silent) or "none")


def toy_of(done: Finished) -> Frame:
    """One row per estimator of the toy, with the ends of its descents, and one more for each number of steps."""

    def records(row: Row) -> Iterator[Row]:
        none = dict.fromkeys(("T", "error", "largest", "wrong", "reached", "distance"), math.nan)
        away = toy.distances(row["ends"]) if "ends" in row else None
        share = math.nan if away is None else 100 * float((away < toy.CLOSE).double().mean())
        yield {**none, "reached": share, "distance": math.nan if away is None else median(away.tolist())}
        for steps, (error, largest, wrong) in row["errors"].items():
            yield {**none, "T": int(steps), "error": error, "largest": largest, "wrong": 100 * wrong}

    return done.table(records, part="toy")


def _toy_table(settings: Any, moving: Frame) -> tuple[Table, ...]:
    last = settings.toy_steps[-1]
    of_steps = {steps: f"median error, T={steps}" for steps in settings.toy_steps}
    values: dict[str, Value] = {
        **{words: words for words in of_steps.values()},
        f"largest, T={last}": "largest",
        f"wrong signs [%], T={last}": "wrong",
        f"ends within {toy.CLOSE:g} of a local minimum [%]": "reached",
        "median distance": "distance",
    }
    if len(moving):
        moving = moving.assign(**{words: moving["error"].where(moving["T"] == at) for at, words in of_steps.items()})
        moving = moving.assign(**{key: moving[key].where(moving["T"] == last) for key in ("largest", "wrong")})
    title = f"Shen and Chen's toy: errors beside the closed form (slopes up to 4.8), and {settings.toy_starts} descents"
    return listed(title, moving, INDEX, values)


def _toy_claims(settings: Any, moving: Frame) -> Iterator[Claim]:
    told = "none"
    if len(moving):
        missed = moving[(moving["estimator"] != "exact") & (moving["reached"] < 100)]
        pairs = zip(missed["estimator"], missed["reached"], strict=True)
        told = ", ".join(f"{name} {share:.0f} %" for name, share in pairs) or told
    yield from asked("yardsticks", "toy", moving, last=settings.toy_steps[-1], missed=told)
    before, last = settings.toy_steps[-2:] if len(settings.toy_steps) > 1 else settings.toy_steps * 2
    falls = pd.DataFrame()
    if len(moving):
        errors = moving.pivot_table(index="estimator", columns="T", values="error")
        of_two = errors.reindex(index=["truncated 5", "exact"], columns=list(dict.fromkeys((before, last))))
        left = (of_two[last] / of_two[before]).dropna()
        falls = left.rename("left").reset_index() if len(left) == 2 else falls
    yield from asked("yardsticks", "bias", falls, before=before, last=last)


def fits_of(done: Finished) -> Frame:
    """One row per draw and share of redrawn labels: the test errors of plain fits."""
    return done.table(lambda row: [{**row, "wrong": 100 * row["wrong"], "plain": plain_fit(row)}], part="baselines")


def plain_fit(baselines: Row) -> float:
    """The lower test error of the two fits to the labels as they are; the larger weights mean less ridge."""
    return float(min(baselines["noisy"], baselines["start"]))


def first_of(done: Finished) -> Frame:
    """One row per draw, share of redrawn labels and estimator: its first hypergradient."""

    def records(row: Row) -> Iterator[Row]:
        for name, (error, cosine) in row.items():
            yield {"estimator": name, "error": error, "cosine": cosine}

    return done.table(records, part="hypergradients")


def runs_of(done: Finished) -> Frame:
    """One row per run that learns weights."""

    def records(row: Row) -> Iterator[Row]:
        numbers: Row = dict.fromkeys(("loss", "test_error", "told", "seconds"), math.nan)
        if "losses" in row:
            numbers = {"loss": row["losses"][-1], "seconds": row["seconds"][-1]}
            numbers |= {"test_error": row["test error"], "told": row["told apart"]}
        yield {**numbers, "diverged": row.get("diverged")}

    return done.table(records, part="learn")


def _cleaning_tables(settings: Any, fits: Frame, data: Frame) -> tuple[Table, ...]:
    plain = {"wrong labels [%]": "wrong", "all, weights 1": "noisy", "all, weights of the start": "start"}
    plain["right labels only"] = "oracle"
    found = listed("Data cleaning: test errors of plain fits [%]", fits, {"redrawn": "corruption"}, plain)
    for corruption in settings.corruptions if len(data) else ():
        rows = data[data["corruption"] == corruption]
        values: dict[str, Value] = {"relative error": "error", "cosine": "cosine", "outer loss": "loss"}
        values |= {"test error [%]": "test_error", "told apart": "told", "seconds": "seconds"}
        values |= {"diverged": "diverged"} if "diverged" in rows and rows["diverged"].any() else {}
        title = f"Data cleaning, {100 * corruption:g} % redrawn: the first hypergradient, and"
        title += f" {settings.iterations} outer steps"
        draws = rows["seed"].nunique()
        found += listed(title + (f"; means of {draws} draws" if draws > 1 else ""), rows, INDEX, values)
    return found


def _cleaning_claims(fits: Frame, first: Frame, runs: Frame) -> Iterator[Claim]:
    here = ["corruption", "seed"]
    gains, worse, both = pd.DataFrame(), "none", pd.DataFrame()
    if len(fits) and len(runs):
        gains = runs.merge(fits[[*here, "plain"]], on=here)
        gains = gains.assign(gain=gains["test_error"] - gains["plain"]).dropna(subset=["gain"])
        not_lower = gains[(gains["estimator"] != "exact") & (gains["gain"] >= 0)]
        parts = zip(not_lower["estimator"], not_lower["corruption"], not_lower["gain"], strict=True)
        worse = ", ".join(f"{name} at {at:g} ({gain:+.2f})" for name, at, gain in parts) or worse
    yield from asked("yardsticks", "cleaning", gains, worse=worse)
    if len(first):
        both = first.pivot_table(index=here, columns="estimator", values="error").reset_index()
        both = both.assign(ratio=both["implicit, 5 CG"] / both["exact"])
    yield from asked("yardsticks", "hypergradients", both)
