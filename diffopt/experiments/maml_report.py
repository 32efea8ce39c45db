"""What the runs of MAML say: tables, answers to what the slides and the papers say of it, pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple, final

from diffopt.experiments.framework.claims import Finished
from diffopt.experiments.framework.experiment import Cell, Claim, Results, Row, Summary, Table, verdict
from diffopt.experiments.framework.outer_loop import first_below, smoothed
from diffopt.experiments.framework.pictures import STYLES, legend_below, panels, save

SLIDES = "slides, convergence for MAML"
HEADLINES = ("the inner step size should not be too large", "ANIL converges faster than MAML by running time")
"""What the results page begins with."""
WORSE = 1.1
"""A loss so many times the lowest one is worse than it."""


@final
class Key(NamedTuple):
    """What a unit's name says."""

    method: str
    rate: float
    tasks: int
    batch: str
    way: int
    seed: int


def key(name: str) -> Key:
    """Read a unit's name."""
    method, *rest = name.split()
    rate, tasks, batch, way, seed = (word.partition("=")[2] for word in rest)
    return Key(method, float(rate), int(tasks), batch, int(way), int(seed))


@final
class Lines:
    """The finished runs, and which of them belong to a question."""

    def __init__(self, settings: Any, results: Results) -> None:
        """Read the names."""
        self.settings = settings
        self.rows = {key(name): row for name, row in results.items()}
        self.base = Key("MAML", settings.rate, settings.tasks[len(settings.tasks) // 2], "all", settings.ways[0], 0)
        self.seeds = sorted({each.seed for each in self.rows})

    def over(self, field: str, values: Sequence[Any], seed: int, **others: Any) -> dict[Any, Row] | None:
        """The rows of one seed with one thing varied, by its values; ``None``: one is missing."""
        keys = {value: self.base._replace(**others)._replace(**{field: value, "seed": seed}) for value in values}
        return {v: self.rows[k] for v, k in keys.items()} if all(k in self.rows for k in keys.values()) else None

    def by_rate(self, method: str, seed: int) -> dict[float, Row] | None:
        """Over the inner step sizes."""
        return self.over("rate", sorted({*self.settings.rates, self.settings.rate}), seed, method=method)

    def by_tasks(self, seed: int) -> dict[int, Row] | None:
        """Over the tasks per outer iteration."""
        return self.over("tasks", sorted(self.settings.tasks), seed)

    def by_batch(self, seed: int) -> dict[str, Row] | None:
        """Over the support images per inner gradient."""
        return self.over("batch", [*map(str, sorted(self.settings.batches)), "all"], seed)


def summary(settings: Any, done: Finished) -> Summary:
    """Tables and claims."""
    lines = Lines(settings, done.results)
    merged: dict[Key, list[Row]] = {}
    for each, row in lines.rows.items():
        merged.setdefault(each._replace(seed=0), []).append(row)
    sizes = ("method", "inner lr", "tasks", "batch", "ways", "starts", "outer loss", "squared gradient norm")
    columns = (*sizes, "accuracy, unseen classes [%]", "+- (one deviation)", "ms per iteration")
    table = Table(
        f"After {settings.iterations} outer iterations, means over the starts",
        columns,
        tuple(_line(each, rows) for each, rows in merged.items()),
    )
    claims = (*_step_size(lines), *_batches(lines), *_anil(lines), *_ways(lines))
    starts = max(1, len(lines.seeds))
    marked = tuple(replace(claim, starts=starts, headline=claim.text in HEADLINES) for claim in claims)
    return Summary((table,) if table.rows else (), marked)


def _line(each: Key, rows: Sequence[Row]) -> tuple[Cell, ...]:
    ended = [row for row in rows if "loss" in row]
    head = (each.method, f"{each.rate:g}", each.tasks, each.batch, each.way, len(rows))
    if not ended:
        return (*head, rows[0]["diverged"], None, None, None, None)
    accuracies = [row["accuracy"] for row in ended]
    spread = stdev(accuracies) if len(accuracies) > 1 else None
    pace = 1e3 * fmean(row["seconds"][-1] / len(row["seconds"]) for row in ended)
    loss, slope = (fmean(row[name] for row in ended) for name in ("loss", "slope"))
    return (*head, loss, slope, round(fmean(accuracies), 2), None if spread is None else round(spread, 2), pace)


def _loss(row: Row) -> float:
    return float(row.get("loss", float("inf")))


def _step_size(lines: Lines) -> Iterator[Claim]:
    flags, told = [], []
    for seed in lines.seeds:
        if found := lines.by_rate("MAML", seed):
            ends = {rate: _loss(row) for rate, row in found.items()}
            (lowest, best), largest = min((loss, rate) for rate, loss in ends.items()), max(ends)
            flags.append(ends[largest] > WORSE * lowest)
            told.append(f"{lowest:.3g} at {best:g}, {ends[largest]:.3g} at {largest:g}")
    evidence = f"outer loss at the best and at the largest step size, by start: {'; '.join(told)}"
    yield Claim("the inner step size should not be too large", SLIDES, *verdict(flags, evidence))


def _batches(lines: Lines) -> Iterator[Claim]:
    for field, pick in (("loss", _loss), ("slope", lambda row: float(row.get("slope", float("inf"))))):
        what = "outer loss" if field == "loss" else "squared gradient norm"
        yield _falls(f"the error ({what}) falls with more tasks per iteration", lines, Lines.by_tasks, pick)
        text = f"the error ({what}) falls with more support images per inner gradient"
        yield _falls(text, lines, Lines.by_batch, pick)


def _falls(
    text: str, lines: Lines, over: Callable[[Lines, int], dict[Any, Row] | None], pick: Callable[[Row], float]
) -> Claim:
    """Whether the largest batch ends below the smallest, at every start."""
    found = [rows for seed in lines.seeds if (rows := over(lines, seed))]
    ends = [[pick(row) for row in rows.values()] for rows in found]
    sizes = ", ".join(map(str, found[0])) if found else ""
    told = "; ".join(", ".join(f"{value:.3g}" for value in each) for each in ends)
    return Claim(text, SLIDES, *verdict([each[-1] < each[0] for each in ends], f"at {sizes}, by start: {told}"))


def _anil(lines: Lines) -> Iterator[Claim]:
    times, paces = [], []
    for seed in lines.seeds:
        maml, anil = (_best(lines.by_rate(method, seed)) for method in ("MAML", "ANIL"))
        if maml is None or anil is None:
            continue
        tenth = max(1, len(maml["losses"]) // 10)
        target = fmean(maml["losses"][-tenth:])
        reached = [
            first_below(smoothed(row["losses"], tenth), target * 1.000001, row["seconds"]) for row in (anil, maml)
        ]
        at = reached[1] if reached[1] is not None else maml["seconds"][-1]
        times.append(None if reached[0] is None else reached[0] / at)
        paces.append(anil["seconds"][-1] / len(anil["seconds"]) / (maml["seconds"][-1] / len(maml["seconds"])))
    told = ", ".join("not reached" if ratio is None else f"{ratio:.2g}" for ratio in times)
    yield Claim(
        "ANIL converges faster than MAML by running time",
        "slides, importance of ANIL",
        *verdict([r is not None and r < 1 for r in times], f"time to MAML's loss over MAML's own, by start: {told}"),
    )
    told = ", ".join(f"{ratio:.2g}" for ratio in paces)
    yield Claim(
        "an iteration of ANIL takes less time",
        "slides, importance of ANIL",
        *verdict([ratio < 1 for ratio in paces], f"of MAML's, by start: {told}"),
    )


def _best(found: dict[float, Row] | None) -> Row | None:
    """The run with the lowest loss."""
    ended = [row for row in (found or {}).values() if "losses" in row]
    return min(ended, key=_loss) if ended else None


def _ways(lines: Lines) -> Iterator[Claim]:
    ways = sorted(lines.settings.ways)
    flags, told = [], []
    for seed in lines.seeds:
        maml, first = (lines.over("way", ways, seed, method=method) for method in ("MAML", "FOMAML"))
        if maml and first and len(ways) > 1:
            gaps = [maml[w].get("accuracy", 0.0) - first[w].get("accuracy", 0.0) for w in ways]
            flags.append(gaps[-1] > gaps[0])
            told.append(", ".join(f"{gap:+.2f}" for gap in gaps))
    evidence = f"points of MAML above first order at {', '.join(map(str, ways))} ways, by start: {'; '.join(told)}"
    text = f"first order falls further behind at {ways[-1]} ways than at {ways[0]}"
    yield Claim(text, "multi-step paper, table 4", *verdict(flags, evidence))


def pictures(settings: Any, done: Finished, folder: Path) -> list[Path]:
    """``maml.png``: the loss over the step size and over both batch sizes, and ANIL beside MAML over time."""
    lines = Lines(settings, done.results)
    if not any("losses" in row for row in lines.rows.values()):
        return []
    figure, ((first, second, third, fourth),) = panels(1, 4, 3.6, 3.4)
    styles = {"MAML": STYLES["exact"], "ANIL": STYLES["binomial"]}
    for seed in lines.seeds:
        shown = {"label": None} if seed else {}
        for method, style in styles.items():
            look = {**style, "label": method, "markersize": 5, **shown}
            if found := lines.by_rate(method, seed):
                kept = {rate: row for rate, row in found.items() if "loss" in row}
                first.plot(list(kept), [_loss(row) for row in kept.values()], **look)
            if best := _best(lines.by_rate(method, seed)):
                fourth.plot(best["seconds"], smoothed(best["losses"], 15), **{**look, "marker": None})
        if rows := lines.by_tasks(seed):
            second.plot([str(size) for size in rows], [_loss(row) for row in rows.values()], **styles["MAML"])
        if images := lines.by_batch(seed):
            third.plot(list(images), [_loss(row) for row in images.values()], **styles["MAML"])
    first.set(xscale="log", yscale="log", xlabel="inner step size", ylabel="outer loss in the end")
    second.set(xlabel="tasks per outer iteration", ylabel="outer loss in the end")
    third.set(xlabel="support images per inner gradient", ylabel="outer loss in the end")
    fourth.set(xlabel="processor time [s]", ylabel="training loss, smoothed", title="each at its best step size")
    for axes in (first, second, third, fourth):
        axes.grid(alpha=0.3)
    legend_below(figure, first, 2)
    return [save(figure, folder / "maml.png")]
