"""What the measured bounds say: tables, claims and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
from matplotlib.ticker import MaxNLocator

from diffopt.experiments import bounds_decay
from diffopt.experiments.framework.claims import Finished, Frame
from diffopt.experiments.framework.experiment import Row, Summary
from diffopt.experiments.framework.pictures import STYLES, curves
from diffopt.experiments.framework.tables import listed
from diffopt.experiments.framework.texts import asked

ESTIMATORS = {
    "(11a)": "first-order",
    "(11b)": "truncated",
    "(11c)": "binomial",
    "(12a)": "first-order",
    "(12b)": "truncated",
    "(12c)": "binomial",
    "4.1, first order": "first-order",
    "4.1, truncated": "truncated",
    "(34a)": "first-order",
    "(34b)": "truncated",
    "(34c)": "binomial",
}
"""Whose error each bound is of."""
ASSUMED = {
    "bounded": "curvature within -x and x",
    "convex": "convex, curvature up to x",
    "ending convex": "the last L steps convex, the others within -x and x",
}
RECONSTRUCTED = ("(12a)", "(12b)", "(34a)")
"""Their right-hand sides are missing from the text available to us."""


def errors_of(done: Finished) -> Frame:
    """One row per bound, level and kind of Hessians: the error beside its bound, and the size of their round-off."""

    def records(row: Row) -> Iterator[Row]:
        for level in row.get("levels", ()):
            for bound, limit in level["bound"].items():
                for kind in ("random", "adversarial"):
                    error = level[kind][ESTIMATORS[bound]]
                    seen = limit > 1e4 * row["round-off"]  # else round-off decides the ratio
                    found = {"L": level["level"], "bound": bound, "kind": kind, "error": error, "limit": limit}
                    yield {**found, "round_off": row["round-off"], "ratio": error / limit if seen else 0.0}

    return done.table(records)


def levels_of(done: Finished) -> Frame:
    """One row per level: its bounds side by side, and on how many of the draws binomial has the smaller error."""

    def records(row: Row) -> Iterator[Row]:
        for level in row.get("levels", ()):
            yield {**level["bound"], "L": level["level"], "better": level["binomial better"]}

    return done.table(records).rename(columns={f"({n}{x})": f"b{n}{x}" for n in (11, 12) for x in "abc"})


def turns_of(done: Finished) -> Frame:
    """One row per ``x`` of the counterexamples."""
    keys = {"curvatures": "x", "error": "error", "claimed (12a)": "claimed", "proposition 4.1": "proved"}

    def records(row: Row) -> Iterator[Row]:
        for values in zip(*(row[key] for key in keys), strict=True):
            yield dict(zip(keys.values(), values, strict=True))

    data = done.table(records, theorem="turning")
    if not len(data):
        return data
    fails = data["x"].where(data["error"] > data["claimed"] * (1 + 1e-9))
    ratios = {
        "error / claimed (12a)": data["error"] / data["claimed"],
        "error / proposition 4.1": data["error"] / data["proved"],
    }
    return data.assign(fails=fails, **ratios)


def summary(settings: Any, done: Finished) -> Summary:
    """Tables and claims."""
    data, levels, turned = errors_of(done), levels_of(done), turns_of(done)
    data = data.assign(assumed=data["theorem"].map(ASSUMED)) if len(data) else data
    convex = (
        levels[(levels["theorem"] == "convex") & levels["L"].between(1, levels["K"] - 1)] if len(levels) else levels
    )
    found = listed(
        "Largest error over its bound, all K, x and L (above 1: the bound does not hold)",
        data,
        {"bound": "bound", "assumed": "assumed"},
        {},
        across="kind",
        cell=("ratio", "max"),
        paper=lambda at: _said(at["bound"]),
    )
    worst = turned.loc[turned.groupby("K")["error"].idxmax()] if len(turned) else turned
    found += listed(
        "Counterexamples to (12a): first order's error on convex losses whose Hessians turn",
        worst.assign(fails=worst["K"].map(turned.groupby("K")["fails"].min())) if len(worst) else worst,
        {"K": "K"},
        {
            "largest error": "error",
            "at x": "x",
            "(12a) there": "claimed",
            "proposition 4.1 there": "proved",
            "(12a) fails from x =": "fails",
        },
    )
    found += listed(
        "Share of random convex sequences on which binomial's error is below truncated's at equal L",
        convex,
        {"K": "K", "x": "x"},
        {},
        across="L",
        cell="better",
        label=lambda level: f"L={level}",
    )
    decays = bounds_decay.decays_of(done)
    share = 100 * convex["better"].mean() if len(convex) else 0
    claims = (
        *asked("bounds", "errors", data),
        *asked("bounds", "bounds", levels),
        *asked("bounds", "convex", convex, share=share),
        *asked("bounds", "decay", decays, bend=bounds_decay.BEND),
    )
    return Summary(found + bounds_decay.table(decays), claims)


def _said(bound: str) -> str:
    if bound.startswith("4.1"):
        return "not in it"
    if bound in RECONSTRUCTED:
        return "reconstructed; " + ("at most 1" if bound == "(34a)" else "attained (1)")
    return "attained (1)" if bound[1:3] in ("11", "12") and bound != "(12c)" else "at most 1"


def pictures(settings: Any, done: Finished, folder: Path) -> list[Path]:
    """``bounds.png``: bounds and errors over L; ``turning.png``: the counterexamples over x."""
    data, turned = errors_of(done), turns_of(done)
    found: list[Path] = []
    if len(data):
        shown = settings.curvatures[:1] + settings.curvatures[-2:]
        data = data[(data["K"] == max(settings.steps)) & data["x"].isin(shown)].sort_values(["x", "theorem"])
        data["panel"] = [f"{t}, K={k}, x={x:g}" for t, k, x in zip(data["theorem"], data["K"], data["x"], strict=True)]
        sides = [("limit", "bound", data["kind"] == "random")]
        sides += [("error", f"largest error, {kind}", data["kind"] == kind) for kind in ("random", "adversarial")]
        lines = []
        for column, words, rows in sides:
            line = data[rows].rename(columns={column: "shown"})[["seed", "panel", "L", "bound", "shown"]]
            of = [f"{ESTIMATORS[bound]}: {words}" for bound in line["bound"]]
            if column == "limit":
                refuted = line["bound"].isin(("(12a)", "(12b)"))
                of = [f"{name}: refuted" if out else name for name, out in zip(of, refuted, strict=True)]
            lines.append(line.assign(line=of))
        drawn = pd.concat(lines)
        drawn = drawn[drawn["shown"] > 1e-12]  # exact estimators leave the picture
        found += curves(
            drawn,
            folder / "bounds.png",
            x="L",
            y="shown",
            hue="line",
            panel="panel",
            wrap=3,
            style=_style,
            labels={"L": "level L", "shown": "error / norm of the outer gradient"},
            scales={"shown": "log"},
            size=(4.2, 3.2),
            finish=lambda axes, panel: axes.xaxis.set_major_locator(MaxNLocator(integer=True)),
        )
    return found + curves(
        turned,
        folder / "turning.png",
        x="x",
        y=("error / claimed (12a)", "error / proposition 4.1"),
        hue="K",
        labels={"x": "x = lr * curvature bound"},
        size=(5.5, 4),
        finish=lambda axes, where: axes.axhline(1, color="black", linewidth=1, linestyle="--"),
    )


def _style(line: str) -> dict[str, Any]:
    estimator, _, what = line.partition(": ")
    random = what.endswith("random")
    marker = "" if what.startswith("bound") else "o" if random else "x"
    style = "" if marker else "--" if "refuted" in what else "-"
    return {"color": STYLES[estimator]["color"], "marker": marker, "linestyle": style, "fillstyle": "none"}
