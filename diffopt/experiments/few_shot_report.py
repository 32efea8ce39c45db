"""What the few-shot runs say: tables beside the papers', answers to their claims, pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from diffopt.experiments.few_shot_papers import printed, spread
from diffopt.experiments.framework import image_sets
from diffopt.experiments.framework.experiment import Cell, Claim, Results, Row, Summary, Table, verdict
from diffopt.experiments.framework.outer_loop import smoothed
from diffopt.experiments.framework.pictures import SEQUENCE, STYLES, legend_below, panels, save

Runs: TypeAlias = Mapping[str, Row]
"""By method, of one number of ways and shots."""
BINOMIAL, MULTI_STEP = "binomial paper", "multi-step paper"
NOTES = (
    "Our +- is half the width of the 95 % confidence interval over the test episodes, 1.96 standard deviations by the "
    "root of their number; it says nothing of other starts. The multi-step paper's +- is a 95 % interval too, the "
    "binomial paper's is, by its authors' code, one standard error: to be multiplied by 1.96.",
    "Two accuracies count as different if they differ by more than the 95 % interval of a difference of independent "
    "means; our methods are tested on the same episodes, so that this is on the safe side.",
    "Equal budget: every method has the same number of outer iterations, the same start and the same episodes. It is "
    "a fraction of the papers' (20,000 and 60,000), with fewer channels; `--full` takes 20,000.",
    "The best of some checkpoints by validation episodes is tested. Normalisation is by the statistics of the batch at "
    "hand, queries included (transductive), as in the binomial paper's code.",
    "The first group is trained with 5 inner steps and tested with 10, as in the binomial paper's code. That costs our "
    "iMAML accuracy, on the training classes too: `--set test_steps=5` tests as it was trained.",
    "Binomial and hybrid have scale 1, as in the theorems; the paper's tables are of the scale L/K. iMAML here "
    "descends on the proximal objective, from which its L iterations of conjugate gradients take the gradient. "
    "Multi-step estimation changes the forward pass and is tested with its windows.",
)
SAME_RULE = (
    "Krylov of level 1 is binomial of level 1 in exact arithmetic. In float32 the two runs part by rounding alone, and "
    "end {:.1f} points of accuracy apart: one run a method, as here, cannot tell methods apart that differ by as much, "
    "whatever the interval over test episodes says."
)


def summarise(settings: Any, results: Results) -> Summary:
    """Tables and claims."""
    groups = {(way, shot): _runs(results, way, shot) for way in settings.ways for shot in settings.shots}
    groups = {key: runs for key, runs in groups.items() if runs}
    tables = []
    for (way, shot), runs in groups.items():
        title = f"{image_sets.SETS[settings.dataset].title}, {way}-way {shot}-shot"
        columns = ("method", "accuracy [%]", "+- (95 %)", "minus exact", "seconds", "of exact's", "printed")
        rows = tuple(_line(settings, way, shot, name, runs) for name in runs)
        what = "head only (ANIL)" if settings.anil else "all layers adapted"
        words = f"{title}, {what}: {settings.iterations} outer iterations"
        words += f"; printed: {spread(settings.dataset)}" if any(row[-1] for row in rows) else ""
        tables.append(Table(words, columns, rows))
    pairs = [(runs.get("binomial 1"), runs.get("krylov 1")) for runs in groups.values()]
    apart = [abs(a["accuracy"] - b["accuracy"]) for a, b in pairs if a and b]
    return Summary(
        tuple(tables), tuple(_claims(settings, groups)), (*NOTES, SAME_RULE.format(max(apart))) if apart else NOTES
    )


def _runs(results: Results, way: int, shot: int) -> dict[str, Row]:
    start = f"{way}-way {shot}-shot, "
    return {name.removeprefix(start): row for name, row in results.items() if name.startswith(start)}


def exact_of(name: str) -> str:
    """The exact rule of a method's group."""
    return "momentum: MAML" if name.startswith(("momentum", "multi-step")) else "MAML"


def _line(settings: Any, way: int, shot: int, name: str, runs: Runs) -> tuple[Cell, ...]:
    row, exact = runs[name], runs.get(exact_of(name), {})
    said = printed(settings.dataset, way, shot, name)
    if "accuracy" not in row:
        return (name, row["diverged"], None, None, None, None, said)
    figures = (round(row["accuracy"], 2), round(row["half_width"], 2))
    if "accuracy" not in exact:
        return (name, *figures, None, row["seconds"][-1], None, said)
    beside = (
        round(row["accuracy"] - exact["accuracy"], 2),
        row["seconds"][-1],
        row["seconds"][-1] / exact["seconds"][-1],
    )
    return (name, *figures, *beside, said)


def difference(first: Row, second: Row) -> tuple[float, float]:
    """First minus second, and half the width of the 95 % interval; a run that diverged is at zero."""
    accuracies = [row.get("accuracy", 0.0) for row in (first, second)]
    return accuracies[0] - accuracies[1], math.hypot(first.get("half_width", 0.0), second.get("half_width", 0.0))


def _pairs(groups: Mapping[Any, Runs], pairs: Sequence[tuple[str, str]]) -> dict[str, tuple[float, float]]:
    """The differences between methods of which both are finished."""
    several = len(groups) > 1
    return {
        f"{a} - {b}" + (f" ({way}-way {shot}-shot)" if several else ""): difference(runs[a], runs[b])
        for (way, shot), runs in groups.items()
        for a, b in pairs
        if a in runs and b in runs
    }


def in_order(found: Mapping[str, tuple[float, float]]) -> tuple[Any, str]:
    """The answer to ``first >= second`` for several pairs: no difference speaks against it, and some speak for it."""
    shown = sum(value > half for value, half in found.values())
    against = sum(value < -half for value, half in found.values())
    told = f"{shown} of {len(found)} differences are beyond their interval, {against} the other way; {_told(found)}"
    if not found or bool(shown) == bool(against):
        return verdict([True, False] if found else [], told)
    return verdict([bool(shown)], told)


def _told(found: Mapping[str, tuple[float, float]]) -> str:
    return ", ".join(f"{name}: {value:+.2f} +- {half:.2f}" for name, (value, half) in found.items())


def _claims(settings: Any, groups: Mapping[Any, Runs]) -> Iterator[Claim]:
    levels = settings.levels
    order = [
        *(("MAML", f"{kind} {level}") for kind in ("binomial", "krylov") for level in levels),
        *((f"{kind} {level}", f"truncated {level}") for kind in ("binomial", "krylov") for level in levels),
        *((f"truncated {level}", "FOMAML") for level in levels),
    ]
    found = _pairs(groups, order)
    yield Claim(
        "the order is MAML >= binomial, Krylov >= truncated >= first order", f"{BINOMIAL}, table 1", *in_order(found)
    )
    for words, rival in (("truncated", "truncated"), ("iMAML", "iMAML")):
        found = _pairs(groups, [(f"binomial {level}", f"{rival} {level}") for level in levels])
        yield Claim(
            f"binomial is above {words} at equal L (beyond the interval)",
            f"{BINOMIAL}, table 1",
            *verdict([value > half for value, half in found.values()], _told(found)),
        )
    found = _pairs(groups, [(f"binomial {level}", "MAML") for level in levels])
    yield Claim(
        "binomial is within one point of MAML",
        f"{BINOMIAL}, table 1",
        *verdict([value >= -1 for value, _ in found.values()], _told(found)),
    )
    found = _pairs(groups, [("hybrid 1", "truncated 1"), ("binomial 1", "hybrid 1")])
    yield Claim(
        "hybrid lies between truncated and binomial",
        f"{BINOMIAL}, table 2",
        *in_order(found),
    )
    found = _pairs(groups, [("multi-step 2", "momentum: MAML"), ("multi-step 4", "momentum: MAML")])
    yield Claim(
        "multi-step(2) and (4) are as accurate as MAML (within the interval)",
        f"{MULTI_STEP}, tables 4 and 5",
        *verdict([value >= -half for value, half in found.values()], _told(found)),
    )
    yield _speed(groups)
    found = _pairs(groups, [("multi-step 8", "momentum: MAML")])
    yield Claim(
        "multi-step(8) loses at most 2.59 points",
        f"{MULTI_STEP}, table 5",
        *verdict([value >= -2.59 for value, _ in found.values()], _told(found)),
    )


def _speed(groups: Mapping[Any, Runs]) -> Claim:
    flags, told = [], []
    for (way, shot), runs in groups.items():
        if "accuracy" in runs.get("multi-step 4", {}) and "accuracy" in runs.get("momentum: MAML", {}):
            short, exact = runs["multi-step 4"], runs["momentum: MAML"]
            ratio, (value, half) = short["seconds"][-1] / exact["seconds"][-1], difference(short, exact)
            flags += [ratio <= 0.55, value >= -0.1]
            told.append(f"{way}-way {shot}-shot: {ratio:.2f} of the time, {value:+.2f} +- {half:.2f} points")
    return Claim(
        "multi-step(4) is twice as fast as MAML at a loss of 0.1 points",
        f"{MULTI_STEP}, abstract and table 4",
        *verdict(flags, "; ".join(told) + "; half the time is counted up to 0.55"),
    )


def _style(name: str) -> dict[str, Any]:
    kind = name.removeprefix("momentum: ").rpartition(" ")[0] or name.removeprefix("momentum: ")
    known = {"MAML": "exact", "FOMAML": "first-order", "Reptile": "reptile", "iMAML": "implicit"}
    found = STYLES.get(known.get(kind, kind), {"color": SEQUENCE[0], "marker": "o"})
    level = name.rpartition(" ")[2]
    line = ":" if name.startswith("momentum") else "--" if level in ("2", "4") else "-"
    return {"color": found["color"], "marker": found["marker"], "linestyle": line}


def draw(settings: Any, results: Results, folder: Path) -> list[Path]:
    """``accuracy-WAY-SHOT.png``: the test accuracy over training time, and validation accuracy over iterations."""
    found = []
    for way in settings.ways:
        for shot in settings.shots:
            runs = {name: row for name, row in _runs(results, way, shot).items() if "accuracy" in row}
            if not runs:
                continue
            figure, (grid,) = panels(1, 3, 4.4, 3.6)
            for name, row in runs.items():
                style, seconds = {**_style(name), "label": name}, row["seconds"][-1]
                fill = "none" if exact_of(name) != "MAML" else style["color"]
                grid[0].errorbar(
                    seconds,
                    row["accuracy"],
                    yerr=row["half_width"],
                    capsize=2,
                    **{**style, "mfc": fill, "linestyle": ""},
                )
                grid[1].plot(row["after"], row["validation"], **style)
                grid[2].plot(smoothed(row["losses"], 31), color=style["color"], linestyle=style["linestyle"])
            grid[0].set(xlabel="processor time of training [s]", ylabel="test accuracy [%]")
            grid[1].set(xlabel="outer iteration", ylabel="validation accuracy [%]")
            grid[2].set(xlabel="outer iteration", ylabel="outer training loss", yscale="log")
            for axes in grid:
                axes.grid(alpha=0.3)
            legend_below(figure, grid[1], 6)
            found.append(save(figure, folder / f"accuracy-{way}-{shot}.png"))
    return found
