"""What the errors on sine waves say: tables, claims and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.ticker import MaxNLocator

from diffopt.experiments.framework.claims import Finished, Frame, side_by_side
from diffopt.experiments.framework.experiment import Row, Summary
from diffopt.experiments.framework.pictures import SEQUENCE, STYLES, curves
from diffopt.experiments.framework.tables import listed
from diffopt.experiments.framework.texts import asked

ORDER = ("truncated", "binomial", "binomial, scale L/K", "hybrid", "krylov")
ROUND_OFF = 1e-14
"""Of a meta-gradient beside its norm; smaller errors count as that."""
SHOWN = (1, 2, 3, 4, 6, 8, 12, 16)
EACH = ("K", "lr", "L")
BATCH = ["seed", *EACH, "draw", "curvature"]


def table_of(done: Finished) -> Frame:
    """One row per estimator, level and batch: its error, and what share of the gradient's mean norm that is."""

    def records(row: Row) -> Iterator[Row]:
        norm = fmean(row["norm"])
        for estimator, levels in row["errors"].items():
            for level, errors in levels.items():
                for draw, error in enumerate(errors):
                    known = {"estimator": estimator, "L": int(level), "draw": draw, "curvature": row["curvature"][draw]}
                    yield {**known, "error": max(error, ROUND_OFF * norm), "share": error / norm}

    return done.table(records)


def ratios(data: Frame) -> Frame:
    """One row per level and batch: the errors of all estimators side by side, and ``L`` over the curvature number."""
    wide = side_by_side(data[data["estimator"] != "first-order"], "error", BATCH)
    return wide.assign(binomial_gain=wide["truncated"] / wide["binomial"], place=wide["L"] / wide["curvature"])


def summary(settings: Any, done: Finished) -> Summary:
    """Tables and claims."""
    data = table_of(done)
    wide = ratios(data) if len(data) else data
    gained = listed(
        "Truncated's error over binomial's at equal L, median over the batches (below 1: binomial is worse)",
        wide[wide["L"].isin(SHOWN)] if len(wide) else wide,
        {"K": "K", "lr": "lr"},
        {"K lr lambda_max": ("curvature", "median")},
        across="L",
        cell=("binomial_gain", "median"),
        label=lambda level: f"L={level}",
        paper=lambda at: "10^3 to 10^4 at L=4" if at["K"] == 5 else None,
    )
    few = data[data["K"] == data["K"].min()] if len(data) else data
    errors = listed(
        f"Mean error over the mean norm of the exact meta-gradient, K={few['K'].min() if len(few) else 0}",
        few,
        {"lr": "lr", "estimator": "estimator"},
        {},
        across="L",
        cell="share",
        label=lambda level: f"L={level}",
    )
    claims = (
        *asked("sinusoid", "errors", data),
        *asked("sinusoid", "batches", wide),
        *asked("sinusoid", "everywhere", data, worse=_worse(wide), scaled=_scaled(wide)),
    )
    return Summary((*gained, *errors), claims)


def _worse(wide: Frame) -> str:
    """Where binomial is worse than truncation."""
    worse = wide[wide["binomial_gain"] < 1] if len(wide) else wide
    if not len(worse):
        return ""
    told = f"where binomial is worse, the curvature number is {worse['curvature'].min():.2g} or more"
    return told + f" and L up to {worse['place'].max():.2g} times that"


def _scaled(wide: Frame) -> str:
    """Where the scale L/K makes binomial's error smaller, and where larger."""
    if not len(wide):
        return ""
    better = wide["binomial, scale L/K"] < wide["binomial"]
    groups = (wide[chosen]["curvature"] for chosen in (better, ~better))
    return "; ".join(
        f"{word} at curvature numbers {at.min():.2g} to {at.max():.2g}"
        for word, at in zip(("smaller", "larger"), groups, strict=True)
        if len(at)
    )


def pictures(settings: Any, done: Finished, folder: Path) -> list[Path]:
    """``levels.png``: errors over L; ``batches.png``: over batches; ``curvature.png``: who wins, by curvature."""
    data = table_of(done)
    if not len(data):
        return []
    data["setting"] = [f"K={k} lr={lr:g}" for k, lr in zip(data["K"], data["lr"], strict=True)]
    data["batch"] = data["seed"] * (data["draw"].max() + 1) + data["draw"] + 1
    rates, few = data["lr"].nunique(), data[data["K"] == data["K"].min()]
    looks: dict[str, Any] = {"hue": "estimator", "style": lambda estimator: STYLES[estimator], "legend": len(ORDER) + 1}
    shown = data[data["share"] > 10 * ROUND_OFF]
    found = curves(shown, folder / "levels.png", x="L", y="share", panel="setting", wrap=rates, finish=_levels, **looks)
    at = few[(few["L"] == few["K"] - 1) & (few["estimator"] != "hybrid")]
    found += curves(at, folder / "batches.png", x="batch", y="error", panel="setting", finish=_levels, **looks)
    wide = ratios(data).groupby(list(EACH)).median(numeric_only=True).reset_index()
    pairs = wide.melt([*EACH, "truncated", "place"], ["binomial", "krylov"], "rival", "of the rival")
    pairs = pairs.assign(ratio=pairs["truncated"] / pairs["of the rival"])
    order = list(dict.fromkeys(pairs["K"]))
    return found + curves(
        pairs,
        folder / "curvature.png",
        x="place",
        y="ratio",
        hue="K",
        panel="rival",
        style=lambda k: {"color": SEQUENCE[order.index(k) % 5], "marker": "os^D"[order.index(k) % 4], "linestyle": ""},
        labels={
            "place": "level L / curvature number",
            "ratio": "truncated's error / the rival's (above 1: it is better)",
        },
        scales={"place": "log", "ratio": "log"},
        finish=lambda axes, rival: axes.axhline(1, color="black", linewidth=0.8, linestyle="--"),
    )


def _levels(axes: Any, setting: Any) -> None:
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
