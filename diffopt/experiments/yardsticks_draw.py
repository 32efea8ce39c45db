"""The pictures of the public yardsticks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffopt.experiments import yardsticks_influence as influence
from diffopt.experiments import yardsticks_toy as toy
from diffopt.experiments.framework.claims import Finished
from diffopt.experiments.framework.experiment import Results, Row
from diffopt.experiments.framework.pictures import SEQUENCE, STYLES, legend_below, panels, save

MARKED = {"truncated": "truncated", "implicit, Neumann": "implicit", "krylov": "krylov"}
"""What is drawn over its length, and in whose style."""
DESCENTS = ("exact", "truncated 1", "truncated 10", "truncated 20", "truncated 50", "krylov 50", "first-order")
ENDS = ("exact", "implicit, CG", "krylov 5", "truncated 5", "truncated 1", "binomial 1", "first-order")

FITS = {"oracle": "right labels only", "start": "all, weights of the start", "noisy": "all, weights 1"}
"""The plain fits, in words."""


def pictures(settings: Any, done: Finished, folder: Path) -> list[Path]:
    """``influence.png``, ``toy.png`` and ``cleaning.png``: those of which something is finished."""
    results = done.results
    still, moving = part(results, "influence, "), part(results, "toy, ")
    paths = []
    if any("gradient" in row for row in still.values()):
        paths.append(_draw_influence(still, folder / "influence.png"))
    if any("ends" in row for row in moving.values()):
        paths.append(_draw_toy(settings, moving, folder / "toy.png"))
    if any("losses" in row for row in results.values()):
        paths.append(_draw_cleaning(settings, results, folder / "cleaning.png"))
    return paths


def part(results: Results, prefix: str) -> dict[str, Row]:
    """The rows whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): row for name, row in results.items() if name.startswith(prefix)}


def _style(name: str) -> dict[str, Any]:
    """By the estimator's kind; what has no style of its own is drawn in one of the sequence's colours."""
    kind = next((kind for kind in STYLES if name.startswith(kind)), None)
    found = dict(STYLES[kind]) if kind else {"color": SEQUENCE[3], "marker": "+", "linestyle": "-."}
    return {**found, "label": name}


def _draw_influence(rows: Mapping[str, Row], path: Path) -> Path:
    figure, ((left, right),) = panels(1, 2, 5.2, 3.8)
    lengths = range(1, 121)
    by_hand = [influence.of_window(k, influence.THETA) for k in lengths]
    left.plot(list(lengths), by_hand, color="0.6", linewidth=1, label="a window of so many steps, by hand")
    for kind, style in MARKED.items():
        found = {int(n.rpartition(" ")[2]): row for n, row in rows.items() if n.rpartition(" ")[0] == kind}
        points = [(k, row["gradient"]) for k, row in found.items() if abs(row.get("gradient", 1e9)) < 120]
        size = 11 if kind.startswith("implicit") else 7  # under those of truncation, with which they agree
        look = {"marker": STYLES[style]["marker"], "color": STYLES[style]["color"], "markersize": size}
        place = 2 if kind.startswith("implicit") else 3
        left.plot(*zip(*points, strict=True), **look, linestyle="", label=kind, zorder=place) if points else None
    left.axhline(influence.at_rest(influence.THETA), color="black", linewidth=1, linestyle="--", label="exact, +24")
    left.axhline(0, color="black", linewidth=0.5)
    left.set(xlabel="steps, terms or order", ylabel="hypergradient at theta = 0.5", xscale="log", ylim=(-75, 60))
    left.set_title("below zero the sign is wrong")
    for name in DESCENTS:
        if "path" in rows.get(name, {}):
            right.plot(rows[name]["path"], **{**_style(name), "marker": None, **_shade(name)})
    right.axhline(influence.OPTIMUM, color="black", linewidth=0.8, linestyle=":")
    right.set(xlabel="step of descent", ylabel="theta", ylim=(-0.5, 3), title="descent; the dotted line is the optimum")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return save(figure, path)


def _shade(name: str) -> dict[str, Any]:
    """One colour for each length of truncation."""
    lengths = ("1", "10", "20", "50")
    kind, _, length = name.rpartition(" ")
    if kind != "truncated" or length not in lengths:
        return {}
    return {"color": SEQUENCE[lengths.index(length) + 1], "linestyle": "--"}


def _draw_toy(settings: Any, rows: Mapping[str, Row], path: Path) -> Path:
    figure, ((left, right),) = panels(1, 2, 5.6, 4.2)
    kinds: list[str] = []
    for name, row in rows.items():
        found = {int(steps): errors[0] for steps, errors in row["errors"].items()}
        if found and max(found.values()) < 1e3:
            kind = name.split(" ")[0]
            look = {**_style(name), "markersize": 6, "fillstyle": ("full", "none", "left")[kinds.count(kind) % 3]}
            kinds.append(kind)
            left.plot(list(found), list(found.values()), **look)
    left.set(yscale="log", xlabel="inner steps T", ylabel="median error of the hypergradient")
    left.set_xticks(settings.toy_steps)
    left.set_title("beside the slope of the closed form")
    x = torch.linspace(toy.LOW, toy.HIGH, 601, dtype=torch.float64)
    right.plot(x, toy.outer_loss(x, -x), color="black", linewidth=1.5, label="h(x), the closed form")
    for at in toy.minimisers().tolist():
        right.axvline(at, color="0.7", linewidth=0.8)
    shown = [name for name in ENDS if "ends" in rows.get(name, {})]
    for place, name in enumerate(shown):
        ends, style = rows[name]["ends"], _style(name)
        heights = [-0.25 - 0.25 * place] * len(ends)
        right.plot(ends, heights, marker="|", markersize=9, linestyle="", color=style["color"])
        right.annotate(name, (3.2, heights[0]), fontsize="small", va="center", annotation_clip=False)
    right.set(xlabel="x", ylabel="h(x)", title="where the descents end", xlim=(-0.1, 3.1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    legend_below(figure, left, 4)
    return save(figure, path)


def _draw_cleaning(settings: Any, results: Results, path: Path) -> Path:
    """The outer loss and the test error at every corruption of which something is finished, of the first draw."""
    every = {p: part(results, f"cleaning p={p:g} seed=0, ") for p in settings.corruptions}
    shown = {p: rows for p, rows in every.items() if any("losses" in row for row in rows.values())}
    figure, (upper, lower) = panels(2, len(shown), 4.6, 3.2)
    for above, below, (corruption, rows) in zip(upper, lower, shown.items(), strict=True):
        runs = {name: row for name, row in rows.items() if "losses" in row}
        for place, (name, row) in enumerate(runs.items()):
            style = _style(name)
            above.plot(row["losses"], **{**style, "marker": None})
            below.plot(row["test error"], place, marker=style["marker"] or "o", color=style["color"], linestyle="")
        for key, word in FITS.items() if "baselines" in rows else ():
            below.axvline(rows["baselines"][key], color="0.3", linewidth=1, linestyle=":")
            below.annotate(
                word,
                (rows["baselines"][key], len(runs) - 0.5),
                rotation=90,
                fontsize="x-small",
                va="bottom",
                ha="right",
            )
        below.set_yticks(range(len(runs)), list(runs), fontsize="small")
        below.set(xlabel="test error [%]", xscale="log", ylim=(len(runs) - 0.4, -0.6))
        below.set_xticks((10, 15, 20, 30, 50, 100), labels=("10", "15", "20", "30", "50", "100"), minor=False)
        below.set_xticks((), minor=True)
        above.set(xlabel="outer step", ylabel="outer loss", title=f"{100 * corruption:g} % of the labels redrawn")
        above.grid(alpha=0.3)
        below.grid(alpha=0.3, axis="y")
    legend_below(figure, max(upper, key=lambda axes: len(axes.lines)), 2 * len(shown) + 1)
    return save(figure, path)
