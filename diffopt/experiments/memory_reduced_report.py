"""What the memory-reduced algorithm's runs say: tables, answers to the paper's claims, pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from diffopt.experiments.framework import image_sets
from diffopt.experiments.framework.experiment import Cell, Claim, Results, Row, Summary, Table, verdict
from diffopt.experiments.framework.outer_loop import smoothed
from diffopt.experiments.framework.pictures import STYLES, legend_below, panels, save
from diffopt.experiments.memory_reduced_problem import FORMS, METHODS

PAPER = "memory-reduced paper"
RIVALS = ("MAML", "ANIL", "ITD-BiO")
OURS = "ours, warm"
STATIONARY = 1e-4
"""The true gradient's norm beside that of the start, below which a point counts as stationary."""
COLOURS = {
    OURS: STYLES["binomial"],
    "ours, cold": STYLES["binomial, scale L/K"],
    "ITD-BiO": STYLES["truncated"],
    "ANIL": STYLES["hybrid"],
    "MAML": STYLES["exact"],
}
NOTES = (
    "The paper's pseudocode, its constants and the numbers of its figures are not in the text available to us: the "
    "algorithm is a reconstruction (derivations, section 6.3), its warm starts our inference from the theorem.",
    "The paper's data (CIFAR-FS, FC100, miniImageNet, tieredImageNet) cannot be had here; `--dataset` takes them. "
    "The network has fewer channels than the paper's, and the outer optimizer is Adam for all methods.",
    "Memory is the peak of torch's allocator above the start of one task's hypergradient. Where the embedding is part "
    "of the inner loss, each inner step that is kept keeps a graph of it; where its features are computed once, which "
    "every head-only method may do, an inner step keeps the head's graph alone. MAML adapts the embedding: one form.",
    "Training uses features computed once. Each task takes its turn: times are of work, not of batching.",
    "The inner step size matters more to implicit gradients than to back-propagation, for they take the head to be at "
    "its minimum: with `--set lr=0.4 --set iterations=80` both of ours diverge (outer loss 1.3 to 20), not ITD-BiO.",
    "The deterministic case is a small problem in float64 (4 tasks of 3 classes), two inner steps and one iteration of "
    "conjugate gradients per outer step, and gradient descent outside.",
)


def summarise(settings: Any, results: Results) -> Summary:
    """Tables and claims."""
    memory = {steps: results[f"memory K={steps}"] for steps in settings.memory_steps if f"memory K={steps}" in results}
    runs = trained(settings, results)
    tables = []
    if runs:
        columns = (
            "method",
            "accuracy [%]",
            "+- (95 %)",
            "final outer loss",
            "seconds",
            "ms per iteration",
            "the paper",
        )
        tables.append(
            Table(
                f"{_title(settings)}: after {settings.iterations} outer iterations, K={settings.steps}",
                columns,
                tuple(_trained(name, rows) for name, rows in runs.items()),
            )
        )
    for key, words in (("megabytes", "Peak memory [MB]"), ("seconds", "Seconds")):
        tables += [
            Table(
                f"{words} of one task's hypergradient over inner steps; {form}",
                ("method", *(f"K={steps}" for steps in memory)),
                tuple((method, *(row[form][method][key] for row in memory.values())) for method in (OURS, *RIVALS)),
            )
            for form in FORMS
            if memory
        ]
    starts = {
        start: results[f"deterministic, {start}"] for start in ("warm", "cold") if f"deterministic, {start}" in results
    }
    if starts:
        tables.append(
            Table(
                "Norm of the true gradient in the deterministic case",
                ("start", "at first", "halfway", "in the end", "outer loss in the end"),
                tuple((f"{start} starts", *_shrunk(row), row["losses"][-1]) for start, row in starts.items()),
            )
        )
    claims = [*_memory_claims(memory), *_training_claims(runs), *_deterministic_claims(starts)]
    return Summary(tuple(tables), tuple(claims), NOTES)


def _title(settings: Any) -> str:
    return f"{image_sets.SETS[settings.dataset].title}, {settings.way}-way {settings.shot}-shot"


def trained(settings: Any, results: Results) -> dict[str, list[Row]]:
    """The methods of which every seed is finished."""
    found = {
        method: [results[name] for seed in range(settings.seeds) if (name := f"{method}, seed {seed}") in results]
        for method in METHODS
    }
    return {method: rows for method, rows in found.items() if len(rows) == settings.seeds}


def _trained(name: str, rows: list[Row]) -> tuple[Cell, ...]:
    losses = fmean(fmean(row["losses"][-max(1, len(row["losses"]) // 10) :]) for row in rows)
    seconds = fmean(row["seconds"][-1] for row in rows)
    each = 1e3 * fmean(row["seconds"][-1] / len(row["seconds"]) for row in rows)
    said = "at least the others'" if name == OURS else None
    return (name, *(round(value, 2) for value in _accuracy(rows)), losses, seconds, each, said)


def _accuracy(rows: list[Row]) -> tuple[float, float]:
    """In the end, mean over seeds, and half the width of the interval over tasks."""
    return fmean(row["accuracy"][-1] for row in rows), fmean(row["half_width"][-1] for row in rows)


def _shrunk(row: Row) -> tuple[float, float, float]:
    norms = row["gradient"]
    return norms[0], norms[len(norms) // 2], norms[-1]


def _memory_claims(memory: Mapping[int, Row]) -> Iterator[Claim]:
    cases = {form: [row[form][OURS]["megabytes"] for row in memory.values()] for form in FORMS if len(memory) > 1}
    known = {form: sizes for form, sizes in cases.items() if None not in sizes}
    told = "; ".join(f"{form}: {min(sizes):.3g} to {max(sizes):.3g} MB" for form, sizes in known.items())
    yield Claim(
        "memory does not grow with the number of inner steps K",
        f"{PAPER}, Fig. 2",
        *verdict([max(sizes) <= 1.05 * min(sizes) for sizes in known.values()], f"{told}; counted up to 5 %"),
    )
    for form in FORMS:
        savings = {
            (rival, steps): round(100 * (1 - row[form][OURS]["megabytes"] / row[form][rival]["megabytes"]))
            for rival in RIVALS
            for steps, row in memory.items()
            if row[form][rival]["megabytes"]
        }
        told = "; ".join(
            f"{rival}: " + ", ".join(f"{saved} % at K={k}" for (r, k), saved in savings.items() if r == rival)
            for rival in RIVALS
        )
        yield Claim(
            f"it saves more than half of the memory of MAML, ANIL and ITD-BiO ({form})",
            f"{PAPER}, abstract and Fig. 2",
            *verdict([saved > 50 for saved in savings.values()], f"against {told}"),
        )


def _training_claims(runs: Mapping[str, list[Row]]) -> Iterator[Claim]:
    ours = runs.get(OURS)
    others = {name: rows for name, rows in runs.items() if name in RIVALS and ours}
    mean, half = _accuracy(ours) if ours else (0.0, 0.0)
    pairs = {name: _accuracy(rows) for name, rows in others.items()}
    told = f"{mean:.1f} +- {half:.1f} % against " + ", ".join(
        f"{a:.1f} +- {b:.1f} ({name})" for name, (a, b) in pairs.items()
    )
    yield Claim(
        "its accuracy is at least that of MAML, ANIL and ITD-BiO after as many iterations",
        f"{PAPER}, Fig. 1",
        *verdict([mean >= a - max(half, b) for a, b in pairs.values()], f"{told}; within the interval counts as equal"),
    )
    times = {name: fmean(row["seconds"][-1] for row in rows) for name, rows in runs.items()}
    ratios = {name: times[OURS] / times[name] for name in others}
    told = ", ".join(f"{ratio:.2g} of {name}'s" for name, ratio in ratios.items())
    yield Claim(
        "it takes less time for as many iterations", "this library", *verdict([r < 1 for r in ratios.values()], told)
    )
    cold = runs.get("ours, cold")
    flags, told = [], ""
    if ours and cold:
        (warm_mean, warm_half), (cold_mean, cold_half) = _accuracy(ours), _accuracy(cold)
        flags = [warm_mean >= cold_mean - max(warm_half, cold_half)]
        told = f"{warm_mean:.1f} +- {warm_half:.1f} % warm, {cold_mean:.1f} +- {cold_half:.1f} % cold"
    yield Claim(
        "with sampled tasks, warm starts train no worse than cold ones", "derivations, 6.3", *verdict(flags, told)
    )


def _deterministic_claims(starts: Mapping[str, Row]) -> Iterator[Claim]:
    shrunk = {start: row["gradient"][-1] / row["gradient"][0] for start, row in starts.items()}
    told = ", ".join(f"{start}: {ratio:.1e} of the first" for start, ratio in shrunk.items())
    yield Claim(
        "with K and N constant, the deterministic case converges to a stationary point",
        f"{PAPER}, theorem 2",
        *verdict([shrunk["warm"] < STATIONARY] if "warm" in shrunk else [], f"true gradient, {told}"),
    )
    yield Claim(
        "that takes warm starts: from cold ones the gradient stalls",
        "derivations, 6.3",
        *verdict([shrunk["cold"] > 100 * shrunk["warm"]] if len(shrunk) == 2 else [], f"true gradient, {told}"),
    )


def draw(settings: Any, results: Results, folder: Path) -> list[Path]:
    """``training.png``: accuracy over iterations and time; ``memory.png``; ``deterministic.png``."""
    found = [_draw_training(settings, results, folder), _draw_memory(settings, results, folder)]
    starts = {start: results[name] for start in ("warm", "cold") if (name := f"deterministic, {start}") in results}
    if starts:
        figure, ((axes,),) = panels(1, 1, 4.5, 3)
        for start, row in starts.items():
            axes.semilogy(row["after"], row["gradient"], **_line(f"ours, {start}"))
        axes.set(xlabel="outer iteration", ylabel="norm of the true gradient")
        axes.grid(alpha=0.3)
        legend_below(figure, axes)
        found.append(save(figure, folder / "deterministic.png"))
    return [path for path in found if path]


def _line(method: str) -> dict[str, Any]:
    return {"color": COLOURS[method]["color"], "label": method, "linestyle": "--" if method == "ours, cold" else "-"}


def _draw_training(settings: Any, results: Results, folder: Path) -> Path | None:
    runs = trained(settings, results)
    if not runs:
        return None
    figure, (grid,) = panels(1, 3, 4, 3)
    for method, rows in runs.items():
        after, accuracy, half, seconds, losses = (
            [fmean(values) for values in zip(*(row[key] for row in rows), strict=True)]
            for key in ("after", "accuracy", "half_width", "seconds", "losses")
        )
        style = _line(method)
        grid[0].errorbar(after, accuracy, yerr=half, capsize=2, **style)
        grid[1].errorbar([[0.0, *seconds][int(i)] for i in after], accuracy, yerr=half, capsize=2, **style)
        grid[2].plot(range(1, len(losses) + 1), smoothed(losses, 15), **style)
    grid[0].set(xlabel="outer iteration", ylabel="test accuracy [%]")
    grid[1].set(xlabel="processor time [s]", ylabel="test accuracy [%]", xscale="symlog")
    grid[2].set(xlabel="outer iteration", ylabel="outer training loss")
    for axes in grid:
        axes.grid(alpha=0.3)
    legend_below(figure, grid[2], len(runs))
    return save(figure, folder / "training.png")


def _draw_memory(settings: Any, results: Results, folder: Path) -> Path | None:
    memory = {steps: results[f"memory K={steps}"] for steps in settings.memory_steps if f"memory K={steps}" in results}
    if not memory:
        return None
    figure, (grid,) = panels(1, len(FORMS), 4, 3)
    for axes, form in zip(grid, FORMS, strict=True):
        for method in (OURS, *RIVALS):
            sizes = [row[form][method]["megabytes"] for row in memory.values()]
            if None not in sizes:
                axes.plot(list(memory), sizes, **{**_line(method), "marker": COLOURS[method]["marker"]})
        axes.set(title=form, xlabel="inner steps K", ylabel="peak memory [MB]", xscale="log", yscale="log")
        axes.set_xticks(list(memory), [str(steps) for steps in memory])
        axes.grid(alpha=0.3)
    legend_below(figure, grid[0])
    return save(figure, folder / "memory.png")
