"""What the measured costs say: tables, answers to the papers' claims, pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from diffopt.experiments.framework.claims import Every, Frame, answers, ask, long_table, side_by_side
from diffopt.experiments.framework.experiment import Results, Row, Summary, Unit
from diffopt.experiments.framework.pictures import STYLES, curves
from diffopt.experiments.framework.tables import Value, levelled, listed

BINOMIAL, MULTI_STEP, REDUCED = "binomial paper", "multi-step paper", "memory-reduced paper"
IMPLICIT = "implicit, 5 CG"
NOTES = (
    "The papers measured on GPUs, where independent products run at once: their times follow the depth. Processor time "
    "on one core follows the work: binomial takes L (K - L + 1) products, never fewer than MAML's K.",
    "The binomial paper leaves out the time of computing gradients again in the backward pass; ours has it in.",
    "Memory is the peak of torch's allocator above the start of the call, the outer loss's graph included; the papers' "
    "figures are of a whole GPU process. Their numbers are not in the text available to us, only what the text says.",
)
LEVELS = (
    ask(
        "binomial's time is only slightly above truncated's at equal L (up to 1.25)",
        f"{BINOMIAL}, Fig. 4",
        "seconds: binomial [0 < L < K] / truncated <= 1.25 by L",
        headline=True,
    ),
    ask(
        "at L=0 binomial takes first order's time, at L=K that of MAML (within 10 %; MAML computes steps again, too)",
        f"{BINOMIAL}, Fig. 4",
        ("seconds: binomial [L == 0] / first-order ~ 1.1", "seconds: binomial [L == K] / MAML, recomputed ~ 1.1"),
    ),
    Every(
        "binomial takes markedly less memory than MAML (below 0.8)",
        f"{BINOMIAL}, Fig. 4 and remark 3.4",
        "memory < 0.8",
        "rule == 'binomial' and L > 0",
        "memory",
        headline=True,
    ),
)
STEPS = (
    ask(
        "multi-step(4) is twice as fast as 8-step MAML (up to 0.55)",
        f"{MULTI_STEP}, Fig. 2",
        "seconds: multi-step [L == 4] / MAML <= 0.55",
        "K == 8",
        headline=True,
    ),
    Every(
        "it uses significantly less memory (below 0.8)",
        f"{MULTI_STEP}, Fig. 2",
        "memory < 0.8",
        "rule == 'multi-step' and L == 4 and K == 8",
        "memory",
    ),
    ask(
        "time and memory fall as the window grows (K=8)",
        f"{MULTI_STEP}, Fig. 2",
        tuple(
            f"{key}: {pair} < 1"
            for key in ("seconds", "megabytes")
            for pair in (
                "multi-step [L == 2] / MAML",
                "multi-step [L == 4] / multi-step [L == 2]",
                "multi-step [L == 8] / multi-step [L == 4]",
            )
        ),
        "K == 8",
    ),
    ask(
        "iMAML takes more time than MAML at fewer than eight inner steps (5 conjugate-gradient products)",
        f"{MULTI_STEP}, Fig. 2",
        f"seconds: {IMPLICIT} / MAML > 1 by K",
        "K < 8",
    ),
    Every(
        "it saves more than half of the memory",
        f"{REDUCED}, Fig. 2; beside MAML's",
        "memory < 0.5",
        f"rule == '{IMPLICIT}'",
        "memory",
    ),
)
SAID = {
    "share": {"multi-step 4": "half of MAML's at K=8", IMPLICIT: "above MAML's below K=8"},
    "megabytes": {
        "multi-step 4": "significantly less than MAML at K=8",
        "first-order": "little, whatever K",
        IMPLICIT: "as little as first-order; flat in K, over 50 % saved",
    },
}
"""What the multi-step and the memory-reduced paper say in words; their figures' numbers are not in the text."""


def table_of(units: Sequence[Unit], results: Results, over: str) -> Frame:
    """One row per start, number of steps and estimator; times and memory also beside MAML's in the same start."""

    def records(row: Row) -> Iterator[Row]:
        exact = row["rules"]["MAML"]
        for name, cost in row["rules"].items():
            kind, level = levelled(name)
            beside = {"share": cost["seconds"] / exact["seconds"], "memory": cost["megabytes"] / exact["megabytes"]}
            yield {"method": name, "rule": kind, "L": level, **cost, **beside}

    return long_table(units, results, records, over=over)


def summary(settings: Any, units: Sequence[Unit], results: Results) -> Summary:
    """Tables and claims."""
    levels, steps = (table_of(units, results, over) for over in ("levels", "steps"))
    values: dict[str, Value] = {key: key for key in ("gradients", "products", "depth")}
    values |= {"time / MAML's": "share", "+- (95 %)": ("share", "+-"), "memory / MAML's": "memory"}
    found = listed(
        f"Over levels, K={settings.levels_steps}, gradient descent",
        levels,
        {"rule": "method"},
        {**values, "peak [MB]": "megabytes"},
        paper=lambda at: _said_of_level(at["method"], settings.levels_steps),
    )
    for key, title in (("share", "Time / MAML's"), ("megabytes", "Peak memory [MB]")):
        found += listed(
            f"{title} over inner steps, momentum 0.9",
            steps,
            {"rule": "method"},
            {},
            across="K",
            cell=key,
            label=lambda k: f"K={k}",
            paper=lambda at, key=key: SAID[key].get(at["method"]),  # type: ignore[misc]
            said="the papers",
        )
    claims = (*answers(levels, LEVELS), *_of_levels(levels), *answers(steps, STEPS), _flat(steps))
    return Summary(found, claims, NOTES)


def _said_of_level(estimator: str, steps: int) -> str | None:
    """What the binomial paper says in words."""
    name, level = levelled(estimator)
    if name != "binomial":
        return None
    if level in (0, steps):
        return f"time of {'MAML' if level else 'first order'}"
    return "time slightly above truncated's, memory markedly below MAML's"


def _of_levels(levels: Frame) -> Iterator[Any]:
    """Claims about exact counts: of depth, and of memory from one level to the next."""
    depth, memory, told = (side_by_side(levels, key, ["seed", "K", "L"]) for key in ("depth", "memory", "memory"))
    text = "their time complexity is the same (depth: products that wait for one another)"
    where = "0 < L < K" if len(depth) else ""
    yield Every(text, f"{BINOMIAL}, remark 3.4", "binomial == truncated", where).answer(depth)
    note = ""
    if len(memory):
        alone = told["binomial, one by one"].dropna() if "binomial, one by one" in told else told["binomial"]
        note = f"one product at a time: {alone.min():.2g} to {alone.max():.2g} of MAML's"
        memory = memory.assign(next=memory.groupby("seed")["binomial"].shift(-1))
    where = "0 < L < K" if len(memory) else ""
    falls = Every("binomial's memory falls with L", f"{BINOMIAL}, remark 3.4", "next < binomial", where, note=note)
    yield falls.answer(memory)


def _flat(steps: Frame) -> Any:
    """Whether memory by implicit differentiation stays what it is, whatever the number of steps."""
    question = Every(
        "memory by implicit differentiation does not grow with K (up to 5 %)",
        f"{REDUCED}, Fig. 2",
        "most <= 1.05 * least",
        shown="most",
    )
    if not len(steps) or steps["K"].nunique() < 2:
        return question.answer(pd.DataFrame())
    sizes = steps[steps["rule"] == IMPLICIT].groupby("seed")["megabytes"].agg(most="max", least="min").reset_index()
    return question.answer(sizes)


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


def pictures(settings: Any, units: Sequence[Unit], results: Results, folder: Path) -> list[Path]:
    """``levels.png``: costs over L; ``steps.png``: costs over K."""
    levels, steps = (table_of(units, results, over) for over in ("levels", "steps"))
    look: dict[str, Any] = {"labels": LABELS, "style": lambda estimator: {**STYLES, **STEP_STYLES}[estimator]}
    if len(levels):  # estimators without levels are lines from one side to the other
        constant = levels[levels["rule"] == levels["method"]]
        levels = pd.concat([levels, constant.assign(L=settings.levels_steps)])
    keys = ("share", "memory", "products", "depth")

    def whole(axes: Axes, where: Any) -> None:
        axes.set_ylim(0, None)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    found = curves(levels, folder / "levels.png", x="L", y=keys, hue="rule", finish=whole, legend=7, **look)
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
