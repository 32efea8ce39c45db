"""What the measured costs say: tables, claims and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from diffopt.experiments.framework.claims import Finished, Frame, side_by_side
from diffopt.experiments.framework.experiment import Claim, Row, Summary
from diffopt.experiments.framework.pictures import STYLES, curves
from diffopt.experiments.framework.tables import Value, levelled, listed
from diffopt.experiments.framework.texts import asked

IMPLICIT = "implicit, 5 CG"
SAID = {
    "share": {"multi-step 4": "half of MAML's at K=8", IMPLICIT: "above MAML's below K=8"},
    "megabytes": {
        "multi-step 4": "significantly less than MAML at K=8",
        "first-order": "little, whatever K",
        IMPLICIT: "as little as first-order; flat in K, over 50 % saved",
    },
}
"""What the multi-step and the memory-reduced paper say in words; their figures' numbers are not in the text."""


def table_of(done: Finished, over: str) -> Frame:
    """One row per start, number of steps and estimator; times and memory also beside MAML's in the same start."""

    def records(row: Row) -> Iterator[Row]:
        exact = row["rules"]["MAML"]
        for name, cost in row["rules"].items():
            kind, level = levelled(name)
            beside = {"share": cost["seconds"] / exact["seconds"], "memory": cost["megabytes"] / exact["megabytes"]}
            yield {"method": name, "estimator": kind, "L": level, **cost, **beside}

    return done.table(records, over=over)


def summary(settings: Any, done: Finished) -> Summary:
    """Tables and claims."""
    levels, steps = (table_of(done, over) for over in ("levels", "steps"))
    values: dict[str, Value] = {key: key for key in ("gradients", "products", "depth")}
    values |= {"time / MAML's": "share", "+- (95 %)": ("share", "+-"), "memory / MAML's": "memory"}
    found = listed(
        f"Over levels, K={settings.levels_steps}, gradient descent",
        levels,
        {"estimator": "method"},
        {**values, "peak [MB]": "megabytes"},
        paper=lambda at: _said_of_level(at["method"], settings.levels_steps),
    )
    for key, title in (("share", "Time / MAML's"), ("megabytes", "Peak memory [MB]")):
        found += listed(
            f"{title} over inner steps, momentum 0.9",
            steps,
            {"estimator": "method"},
            {},
            across="K",
            cell=key,
            label=lambda k: f"K={k}",
            paper=lambda at, key=key: SAID[key].get(at["method"]),  # type: ignore[misc]
            said="the papers",
        )
    claims = (
        *asked("cost", "levels", levels),
        *_of_levels(levels),
        *asked("cost", "steps", steps),
        *asked("cost", "growth", _sizes(steps)),
    )
    return Summary(found, claims)


def _said_of_level(estimator: str, steps: int) -> str | None:
    """What the binomial paper says in words."""
    name, level = levelled(estimator)
    if name != "binomial":
        return None
    if level in (0, steps):
        return f"time of {'MAML' if level else 'first order'}"
    return "time slightly above truncated's, memory markedly below MAML's"


def _of_levels(levels: Frame) -> Iterator[Claim]:
    """Claims about exact counts: of depth, and of memory from one level to the next."""
    depth, memory, told = (side_by_side(levels, key, ["seed", "K", "L"]) for key in ("depth", "memory", "memory"))
    yield from asked("cost", "depth", depth)
    note = ""
    if len(memory):
        alone = told["binomial, one by one"].dropna() if "binomial, one by one" in told else told["binomial"]
        note = f"one product at a time: {alone.min():.2g} to {alone.max():.2g} of MAML's"
        memory = memory.assign(next=memory.groupby("seed")["binomial"].shift(-1))
    yield from asked("cost", "memory", memory, note=note)


def _sizes(steps: Frame) -> Frame:
    """The least and the most memory that implicit differentiation takes, whatever the number of steps."""
    if not len(steps) or steps["K"].nunique() < 2:
        return pd.DataFrame()
    implicit = steps[steps["estimator"] == IMPLICIT].groupby("seed")["megabytes"]
    return implicit.agg(most="max", least="min").reset_index()


STEP_STYLES: Row = {
    "MAML": STYLES["exact"],
    "MAML, recomputed": {"color": "#000000", "linestyle": "--"},
    "MAML, sqrt checkpoints": {"color": "#000000", "marker": "+", "linestyle": "--"},
    "binomial, one by one": STYLES["binomial, scale L/K"],
    "multi-step 2": {"color": "#F0B6D5", "marker": "*", "linestyle": "-"},
    "multi-step 4": STYLES["multi-step"],
    "multi-step 8": {"color": "#8A3D68", "marker": "*", "linestyle": "-"},
    IMPLICIT: STYLES["implicit"],
}
LABELS = {
    "share": "time / MAML's",
    "memory": "memory / MAML's",
    "products": "products (HVPs)",
    "seconds": "processor time [s]",
    "megabytes": "peak memory [MB]",
    "L": "level L",
    "K": "inner steps K",
}


def pictures(settings: Any, done: Finished, folder: Path) -> list[Path]:
    """``levels.png``: costs over L; ``steps.png``: costs over K."""
    levels, steps = (table_of(done, over) for over in ("levels", "steps"))
    look: dict[str, Any] = {"labels": LABELS, "style": lambda estimator: {**STYLES, **STEP_STYLES}[estimator]}
    if len(levels):  # estimators without levels are lines from one side to the other
        constant = levels[levels["estimator"] == levels["method"]]
        levels = pd.concat([levels, constant.assign(L=settings.levels_steps)])
    keys = ("share", "memory", "products", "depth")

    def whole(axes: Axes, where: Any) -> None:
        axes.set_ylim(0, None)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    found = curves(levels, folder / "levels.png", x="L", y=keys, hue="estimator", finish=whole, legend=7, **look)
    scales: Mapping[str, str] = {"seconds": "log", "megabytes": "log"}

    def doubled(axes: Axes, where: Any) -> None:
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(settings.steps))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))

    path = folder / "steps.png"
    return found + curves(
        steps, path, x="K", y=("seconds", "share", "megabytes"), hue="method", finish=doubled, scales=scales, **look
    )
