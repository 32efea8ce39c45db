"""What the measured costs say: tables, answers to the papers' claims, pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from diffopt.experiments.framework.experiment import Claim, Results, Row, Summary, Table, verdict
from diffopt.experiments.framework.pictures import STYLES, legend_below, panels, save

Costs: TypeAlias = Mapping[str, Mapping[str, float]]
"""By rule: ``time`` and ``memory`` beside MAML's, ``megabytes``, ``gradients``, ``products``, ``depth``."""
BINOMIAL, MULTI_STEP, REDUCED = "binomial paper", "multi-step paper", "memory-reduced paper"
EQUAL = 0.1
"""Times within so much of each other count as equal."""
NOTES = (
    "The papers measured on GPUs, where independent products run at once: their times follow the depth. Processor time "
    "on one core follows the work: binomial takes L (K - L + 1) products, never fewer than MAML's K.",
    "The binomial paper leaves out the time of computing gradients again in the backward pass; ours has it in.",
    "Memory is the peak of torch's allocator above the start of the call, the outer loss's graph included; the papers' "
    "figures are of a whole GPU process. Their numbers are not in the text available to us, only what the text says.",
)


def summarise(settings: Any, results: Results) -> Summary:
    """Tables and claims."""
    levels = _median_costs(results, f"levels K={settings.levels_steps} ")
    by_steps = {steps: _median_costs(results, f"steps K={steps} ") for steps in settings.steps}
    by_steps = {steps: costs for steps, costs in by_steps.items() if costs}
    columns = ("rule", "gradients", "products", "depth", "time / MAML's", "memory / MAML's", "peak [MB]", "the paper")
    keys = ("gradients", "products", "depth", "time", "memory", "megabytes")
    tables = [
        Table(
            f"Over levels, K={settings.levels_steps}, gradient descent",
            columns,
            tuple(
                (rule, *(_whole(cost[key]) for key in keys), _said_of_level(rule, settings.levels_steps))
                for rule, cost in levels.items()
            ),
        ),
        *_step_tables(by_steps),
    ]
    claims = [*_level_claims(settings.levels_steps, levels), *_step_claims(by_steps)]
    return Summary(tuple(table for table in tables if table.rows), tuple(claims), NOTES)


def _step_tables(by_steps: Mapping[int, Costs]) -> Iterator[Table]:
    rules = list(dict.fromkeys(rule for costs in by_steps.values() for rule in costs))
    for key, title in (("time", "Time / MAML's"), ("megabytes", "Peak memory [MB]")):
        rows = tuple(
            (rule, *(costs[rule][key] if rule in costs else None for costs in by_steps.values()), SAID[key].get(rule))
            for rule in rules
        )
        columns = ("rule", *(f"K={steps}" for steps in by_steps), "the papers")
        yield Table(f"{title} over inner steps, momentum 0.9", columns, rows)


SAID = {
    "time": {"multi-step 4": "half of MAML's at K=8", "implicit, 5 CG": "above MAML's below K=8"},
    "megabytes": {
        "multi-step 4": "significantly less than MAML at K=8",
        "first-order": "little, whatever K",
        "implicit, 5 CG": "as little as first-order; flat in K, over 50 % saved",
    },
}
"""What the multi-step and the memory-reduced paper say in words; their figures' numbers are not in the text."""


def _said_of_level(rule: str, steps: int) -> str | None:
    """What the binomial paper says in words."""
    name, _, level = rule.rpartition(" ")
    if name != "binomial":
        return None
    if int(level) in (0, steps):
        return f"time of {'MAML' if int(level) else 'first order'}"
    return "time slightly above truncated's, memory markedly below MAML's"


def _level_claims(steps: int, costs: Costs) -> Iterator[Claim]:
    inner = [level for level in range(1, steps) if costs]
    slower = {level: costs[f"binomial {level}"]["time"] / costs[f"truncated {level}"]["time"] for level in inner}
    told = ", ".join(f"{ratio:.2g} at L={level}" for level, ratio in slower.items())
    yield Claim(
        "binomial's time is only slightly above truncated's at equal L",
        f"{BINOMIAL}, Fig. 4",
        *verdict([ratio <= 1.25 for ratio in slower.values()], f"binomial / truncated: {told}; counted up to 1.25"),
    )
    depths = [costs[f"binomial {level}"]["depth"] == costs[f"truncated {level}"]["depth"] for level in inner]
    yield Claim(
        "their time complexity is the same",
        f"{BINOMIAL}, remark 3.4",
        *verdict(depths, f"as depth (products that wait for one another): L in {sum(depths)} of {len(depths)} cases"),
    )
    pairs = [("binomial 0", "first-order"), (f"binomial {steps}", "MAML, recomputed")] if costs else []
    equal = {f"{a} / {b}": costs[a]["time"] / costs[b]["time"] for a, b in pairs}
    told = ", ".join(f"{name}: {ratio:.3g}" for name, ratio in equal.items())
    yield Claim(
        "at L=0 binomial takes first order's time, at L=K that of MAML",
        f"{BINOMIAL}, Fig. 4",
        *verdict([abs(ratio - 1) < EQUAL for ratio in equal.values()], f"{told}; MAML here computes steps again, too"),
    )
    memory = {level: costs[f"binomial {level}"]["memory"] for level in [*inner, *([steps] if costs else [])]}
    told = ", ".join(f"{ratio:.2g} at L={level}" for level, ratio in memory.items())
    yield Claim(
        "binomial takes markedly less memory than MAML",
        f"{BINOMIAL}, Fig. 4 and remark 3.4",
        *verdict([ratio < 0.8 for ratio in memory.values()], f"beside MAML's: {told}; counted below 0.8"),
    )
    falls = [memory[level + 1] < memory[level] for level in inner]
    alone = [costs[f"binomial, one by one {level}"]["memory"] for level in inner]
    spared = f"one product at a time: {min(alone):.2g} to {max(alone):.2g}" if alone else ""
    yield Claim(
        "binomial's memory falls with L",
        f"{BINOMIAL}, remark 3.4",
        *verdict(falls, f"beside MAML's: {told}; {spared}"),
    )


def _step_claims(by_steps: Mapping[int, Costs]) -> Iterator[Claim]:
    eight = by_steps.get(8, {})
    four = [eight["multi-step 4"]] if eight else []
    told = ", ".join(f"time {c['time']:.2g}, memory {c['memory']:.2g} of 8-step MAML's" for c in four)
    yield Claim(
        "multi-step(4) is twice as fast as 8-step MAML",
        f"{MULTI_STEP}, Fig. 2",
        *verdict([cost["time"] <= 0.5 * (1 + EQUAL) for cost in four], told),
    )
    yield Claim(
        "it uses significantly less memory",
        f"{MULTI_STEP}, Fig. 2",
        *verdict([cost["memory"] < 0.8 for cost in four], f"{told}; counted below 0.8"),
    )
    windows = [name for name in ("MAML", "multi-step 2", "multi-step 4", "multi-step 8") if name in eight]
    falls = [eight[wide][key] < eight[narrow][key] for narrow, wide in pairwise(windows) for key in ("time", "memory")]
    times = ", ".join(f"{eight[name]['time']:.2g}" for name in windows)
    yield Claim(
        "time and memory fall as the window grows (K=8)",
        f"{MULTI_STEP}, Fig. 2",
        *verdict(falls, f"times of MAML and windows 2, 4, 8: {times}"),
    )
    short = [costs["implicit, 5 CG"]["time"] for steps, costs in by_steps.items() if steps < 8]
    told = ", ".join(f"{ratio:.2g}" for ratio in short)
    yield Claim(
        "iMAML takes more time than MAML at fewer than eight inner steps",
        f"{MULTI_STEP}, Fig. 2",
        *verdict([ratio > 1 for ratio in short], f"beside MAML's at K below 8: {told} (5 conjugate-gradient products)"),
    )
    memory = [costs["implicit, 5 CG"]["megabytes"] for costs in by_steps.values()]
    flat = [max(memory) <= 1.05 * min(memory)] if len(memory) > 1 else []
    yield Claim(
        "memory by implicit differentiation does not grow with K",
        f"{REDUCED}, Fig. 2",
        *verdict(flat, f"{min(memory):.3g} to {max(memory):.3g} MB" if memory else ""),
    )
    savings = {steps: 1 - costs["implicit, 5 CG"]["memory"] for steps, costs in by_steps.items()}
    told = ", ".join(f"{100 * saving:.0f} % at K={steps}" for steps, saving in savings.items())
    yield Claim(
        "it saves more than half of the memory",
        f"{REDUCED}, Fig. 2",
        *verdict([saving > 0.5 for saving in savings.values()], f"against MAML: {told}"),
    )


def _median_costs(results: Results, start: str) -> Costs:
    """Medians over the rounds; times and memory beside MAML's in the same round."""
    rounds = [row["rules"] for name, row in results.items() if name.startswith(start)]
    found: dict[str, dict[str, float]] = {}
    for rule in rounds[0] if rounds else ():
        found[rule] = {key: median(costs[rule][key] for costs in rounds) for key in rounds[0][rule]}
        found[rule]["time"] = median(costs[rule]["seconds"] / costs["MAML"]["seconds"] for costs in rounds)
        found[rule]["memory"] = median(costs[rule]["megabytes"] / costs["MAML"]["megabytes"] for costs in rounds)
    return found


def _whole(value: float) -> float | int:
    return int(value) if value == int(value) else value


def draw(settings: Any, results: Results, folder: Path) -> list[Path]:
    """``levels.png``: costs over L; ``steps.png``: costs over K."""
    paths = []
    if levels := _median_costs(results, f"levels K={settings.levels_steps} "):
        paths.append(_draw_levels(settings.levels_steps, levels, folder / "levels.png"))
    by_steps = {steps: _median_costs(results, f"steps K={steps} ") for steps in settings.steps}
    if by_steps := {steps: costs for steps, costs in by_steps.items() if costs}:
        paths.append(_draw_steps(by_steps, folder / "steps.png"))
    return paths


def _draw_levels(steps: int, costs: Costs, path: Path) -> Path:
    columns = {"time": "time / MAML's", "memory": "memory / MAML's", "products": "products (HVPs)", "depth": "depth"}
    figure, grid = panels(1, len(columns), 3.4, 3.2)
    for axes, (key, label) in zip(grid[0], columns.items(), strict=True):
        for rule in ("truncated", "binomial", "binomial, one by one", "krylov"):
            at = [level for level in range(steps + 1) if f"{rule} {level}" in costs]
            style = STYLES["binomial, scale L/K" if rule == "binomial, one by one" else rule]
            axes.plot(at, [costs[f"{rule} {level}"][key] for level in at], **style, label=rule)
        lines = {"MAML": STYLES["exact"], "first-order": STYLES["first-order"]}
        for rule, style in {**lines, "MAML, recomputed": {"color": "#000000", "linestyle": "--"}}.items():
            axes.axhline(costs[rule][key], color=style["color"], linestyle=style["linestyle"], linewidth=1, label=rule)
        axes.set(xlabel="level L", ylabel=label, ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.suptitle(f"One meta-gradient, K={steps} inner steps")
    legend_below(figure, grid[0][0], 7)
    return save(figure, path)


STEP_STYLES: Row = {
    "MAML": STYLES["exact"],
    "MAML, sqrt checkpoints": {"color": "#000000", "marker": "+", "linestyle": "--"},
    "multi-step 2": {"color": "#F0B6D5", "marker": "*", "linestyle": "-"},
    "multi-step 4": STYLES["multi-step"],
    "multi-step 8": {"color": "#8A3D68", "marker": "*", "linestyle": "-"},
    "first-order": STYLES["first-order"],
    "reptile": STYLES["reptile"],
    "implicit, 5 CG": STYLES["implicit"],
}


def _draw_steps(by_steps: Mapping[int, Costs], path: Path) -> Path:
    columns = {"seconds": "processor time [s]", "time": "time / MAML's", "megabytes": "peak memory [MB]"}
    figure, grid = panels(1, len(columns), 4, 3.4)
    for axes, (key, label) in zip(grid[0], columns.items(), strict=True):
        for rule, style in STEP_STYLES.items():
            at = [steps for steps, costs in by_steps.items() if rule in costs]
            axes.plot(at, [by_steps[steps][rule][key] for steps in at], **style, label=rule)
        axes.set(xlabel="inner steps K", ylabel=label)
        _powers_of_two(axes, list(by_steps))
        axes.set_yscale("linear" if key == "time" else "log")
        axes.grid(alpha=0.3)
    legend_below(figure, grid[0][0], 4)
    return save(figure, path)


def _powers_of_two(axes: Axes, steps: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
