"""What the runs of ANIL say: tables, claims and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd  # type: ignore[import-untyped]

from diffopt.experiments.framework.claims import Finished, Frame
from diffopt.experiments.framework.experiment import Summary
from diffopt.experiments.framework.outer_loop import AXES, curve, outcome
from diffopt.experiments.framework.pictures import curves
from diffopt.experiments.framework.tables import Value, listed
from diffopt.experiments.framework.texts import asked

WINDOW = 15


def adapted(layers: int) -> str:
    """What is adapted, in words."""
    return "head (strongly convex)" if layers == 1 else f"{layers} layers (non-convex)"


def trends(data: Frame) -> Frame:
    """One row per start, layers and step size: how its figures change with N."""
    rows: list[dict[str, Any]] = []
    for (seed, layers, rate), group in data.groupby(["seed", "layers", "lr"], sort=False) if len(data) else ():
        group = group.sort_values("N")
        if len(group) < 2:
            continue
        row = {"seed": seed, "layers": layers, "lr": rate, "adapted": adapted(layers), "smallest": group["N"].iloc[0]}
        ranks = group[["N", "final", "iterations", "seconds"]].rank()
        reached = math.isfinite(group["seconds"].min())
        row |= {"final": _correlation(ranks["N"], ranks["final"])}
        row |= {key: _correlation(ranks["N"], ranks[key]) if reached else math.nan for key in ("iterations", "seconds")}
        row |= {"best": group.loc[group["seconds"].idxmin(), "N"] if reached else None, "largest": group["N"].iloc[-1]}
        rows.append({**row, "left": saturation(list(group["N"]), list(group["final"]))})
    found: Frame = pd.DataFrame(rows)
    if not rows:
        return found
    head = found[found["layers"] == 1][["seed", "lr", "final"]].rename(columns={"final": "head"})
    return found.merge(head, on=["seed", "lr"], how="left")


def _correlation(first: Frame, second: Frame) -> float:
    """Of ranks; 0 where all are equal."""
    return float(first.corr(second)) if second.nunique() > 1 else 0.0


def saturation(steps: Sequence[int], losses: Sequence[float]) -> float | None:
    """The change per step between the two largest N over the fall between the two smallest; ``None`` of two N."""
    if len(steps) < 3:
        return None
    first, last = ((losses[i] - losses[i + 1]) / (steps[i + 1] - steps[i]) for i in (0, len(steps) - 2))
    return abs(last) / first if first > 0 and math.isfinite(last) else math.inf


def summary(settings: Any, done: Finished) -> Summary:
    """Tables and claims."""
    data = done.table(lambda row: [{**outcome(row, settings.target, WINDOW), "curvature": row.get("curvature")}])
    to_target = f"to loss {settings.target:g}"
    found = listed(
        "Outer training loss against the number of inner steps",
        data,
        {"adapted": "adapted", "inner lr": "lr", "N": "N"},
        {
            "final outer loss": "final",
            "+- (95 %)": ("final", "+-"),
            f"iterations {to_target}": ("iterations", "median"),
            f"seconds {to_target}": ("seconds", "median"),
            "ms per iteration": "ms",
            "lr * curvature": ("curvature", "max"),
        },
    )
    trend = trends(data)
    values: dict[str, Value] = {"final outer loss": "final", "+- (95 %)": ("final", "+-")}
    values |= {f"{key} to target": key for key in ("iterations", "seconds")}
    found += listed(
        "Rank correlation with N (-1: more inner steps are better, +1: worse)",
        trend,
        {"adapted": "adapted", "inner lr": "lr"},
        values,
        paper=lambda at: "negative" if at["adapted"].startswith("head") else "positive",
        said="the slides",
    )
    return Summary(found, asked("anil", "trends", trend))


def pictures(settings: Any, done: Finished, folder: Path) -> list[Path]:
    """``convergence.png``: the outer loss over iterations and over processor time."""
    data = done.table(lambda row: curve(row, WINDOW))
    if len(data):
        data["setting"] = [f"{name}\nlr {rate:g}" for name, rate in zip(data["adapted"], data["lr"], strict=True)]
        data = data[data["loss"] < 10].sort_values(["layers", "lr"])  # what lies above diverged

    def target(axes: Any, where: Any) -> None:
        axes.axhline(settings.target, color="0.6", linewidth=0.8, linestyle=":")

    look: dict[str, Any] = {"labels": AXES, "scales": {"loss": "log"}, "size": (3.2, 2.9), "finish": target}
    path = folder / "convergence.png"
    return curves(data, path, x=("iteration", "time"), y="loss", hue="N", panel="setting", over="at", **look)
