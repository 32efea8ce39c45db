"""What the learned weights say: tables, answers to claims, pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffopt.experiments.framework.experiment import Cell, Claim, Results, Row, Summary, Table, verdict
from diffopt.experiments.framework.pictures import SEQUENCE, STYLES, legend_below, panels, save

HERE = "this library"
GOAL = 6 / 7.8
"""The share of what the wrong labels cost that is to be won back: 6 of 7.8 points of accuracy."""
CLOSE = 1.0
"""Accuracies within so many points count as equal."""
NOTES = (
    "A rule applies if it reaches what the inner loss reads. First order and Reptile do not: their hypergradient is "
    "zero, and the weights stay where they are. Forward mode would, with one tangent per training example: 5,000 "
    "times the work of one rollout.",
    "Accuracies of the table are those of a model fitted anew, for longer, under the learned weights; the curves show "
    "the model that the inner steps leave, which is fitted for a shorter time.",
    "The validation images are as many as the training images and all their labels are right: training on them alone "
    "is the yardstick for the use of the whole procedure.",
    "F1 is of the wrong labels found: weight below one half.",
)


def summarise(settings: Any, results: Results) -> Summary:
    """Tables and claims."""
    base, errors, runs = results.get("baselines"), results.get("errors"), _runs(results)
    tables = []
    if base:
        fits = (("all labels as they are", "noisy"), ("right labels only (oracle)", "oracle"))
        only = (("validation images only", "validation images only"),)
        tables.append(
            Table(
                f"Plain fits; {100 * base['wrong']:.1f} % of the labels are wrong",
                ("fitted to", "test accuracy [%]"),
                tuple((words, round(base[key], 2)) for words, key in (*fits, *only)),
            )
        )
    if runs:
        columns = ("rule", "test accuracy [%]", "won back [%]", "F1", "labels told [%]", "outer loss", "seconds")
        rows = tuple(_learned(name, row, base) for name, row in runs.items())
        tables.append(Table(f"Weights learned in {settings.iterations} outer steps", columns, rows))
    if errors:
        number = errors["curvature"]
        shown = "" if number is None else f"; T * lr * curvature is {number:.3g}"
        keys = ("relative_error", "cosine", "gradients", "products", "depth", "megabytes")
        tables.append(
            Table(
                f"The first hypergradient beside the exact one{shown}",
                ("rule", "relative error", "cosine", "gradients", "products", "depth", "peak [MB]"),
                tuple((name, *(row[key] for key in keys)) for name, row in errors["rules"].items()),
            )
        )
    return Summary(tuple(tables), tuple(_claims(settings, base, errors, runs)), NOTES)


def _runs(results: Results) -> dict[str, Row]:
    return {name.removeprefix("learn, "): row for name, row in results.items() if name.startswith("learn, ")}


def _learned(name: str, row: Row, base: Row | None) -> tuple[Cell, ...]:
    if "diverged" in row:
        return (name, row["diverged"], None, None, None, None, None)
    final, share = row["final"], won_back(row, base)
    back = None if share is None else round(100 * share, 1)
    told = round(100 * final["told"], 1)
    return (name, round(final["accuracy"], 2), back, final["f1"], told, row["losses"][-1], row["seconds"][-1])


def won_back(row: Row, base: Row | None) -> float | None:
    """The share of the accuracy lost to wrong labels that a rule wins back; ``None``: not known."""
    if base is None or "final" not in row or base["oracle"] == base["noisy"]:
        return None
    return float((row["final"]["accuracy"] - base["noisy"]) / (base["oracle"] - base["noisy"]))


def _claims(settings: Any, base: Row | None, errors: Row | None, runs: Mapping[str, Row]) -> Iterator[Claim]:
    exact = runs.get("exact", {})
    share = won_back(exact, base)
    told = "" if share is None or base is None else _points(share, base)
    flags = [] if share is None else [share >= GOAL]
    yield Claim("the exact rule wins back at least 6 of 7.8 points (77 %)", HERE, *verdict(flags, told))
    final = exact.get("final")
    flags, told = ([], "") if final is None else ([final["f1"] >= 0.9], f"F1 {final['f1']:.3f}")
    yield Claim("it finds the wrong labels: F1 of at least 0.9", HERE, *verdict(flags, told))
    for kind, words, source in (
        ("truncated", "truncated back-propagation loses little and takes less time", "Shaban et al. (2019)"),
        ("implicit", "implicit differentiation loses little and takes less time", "Pedregosa (2016)"),
        ("multi-step", "multi-step estimation loses little and takes less time", "multi-step paper, claim on time"),
        ("binomial", "the binomial rule loses little", "binomial paper, in spirit"),
        ("krylov", "the Krylov rule loses little", HERE),
        ("ES Jacobian", "the ES Jacobian loses little", "slides, in spirit"),
    ):
        yield Claim(words, source, *_beside_exact(kind, exact, runs, faster="less time" in words))
    yield from _error_claims(settings, errors)
    gains = {
        name: row["final"]["accuracy"] - base["validation images only"]
        for name, row in runs.items()
        if base is not None and "final" in row
    }
    best = max(gains, key=lambda name: gains[name], default="")
    yield Claim(
        "cleaning is worth it: the best rule is above training on the validation images alone",
        HERE,
        *verdict([gains[best] > 0] if gains else [], f"{best}: {gains.get(best, 0):+.2f} points"),
    )


def _points(share: float, base: Row) -> str:
    lost = base["oracle"] - base["noisy"]
    return f"{share * lost:.2f} of {lost:.2f} points, {100 * share:.0f} %"


def _beside_exact(kind: str, exact: Row, runs: Mapping[str, Row], *, faster: bool) -> tuple[Any, str]:
    """Whether every rule of a kind ends within ``CLOSE`` points of the exact one (and sooner)."""
    flags, told = [], []
    for name, row in runs.items():
        if not name.startswith(kind) or "final" not in exact:
            continue
        if "diverged" in row:
            flags.append(False)
            told.append(f"{name}: {row['diverged']}")
            continue
        points = row["final"]["accuracy"] - exact["final"]["accuracy"]
        ratio = row["seconds"][-1] / exact["seconds"][-1]
        flags.append(points >= -CLOSE and (ratio < 1 or not faster))
        told.append(f"{name}: {points:+.2f} points, F1 {row['final']['f1']:.3f}, {ratio:.2g} of the time")
    return verdict(flags, f"beside exact: {'; '.join(told)}; counted down to -{CLOSE:g}")


def _error_claims(settings: Any, errors: Row | None) -> Iterator[Claim]:
    found: Mapping[str, Row] = {} if errors is None else errors["rules"]
    series = {name: row["relative_error"] for name, row in found.items() if name.startswith("binomial")}
    number = None if errors is None else errors["curvature"]
    told = ", ".join(f"{value:.3g} ({name})" for name, value in series.items())
    where = "" if number is None else f" at T * lr * curvature = {number:.3g}"
    large = number is not None and number > 2 * max(settings.orders)
    yield Claim(
        "where T * lr * curvature is well above the order, binomial's error is above that of no correction (1)",
        "derivations (11c)",
        *verdict([value > 1 for value in series.values()] if large else [], f"{told}{where}"),
    )
    name = f"ES Jacobian, Q={settings.directions}"
    flags, told = [], ""
    if errors is not None and name in found:
        expected = math.sqrt((errors["hyperparameters"] + 1) / settings.directions)
        error = found[name]["relative_error"]
        flags, told = [0.5 < error / expected < 2], f"{error:.3g}, predicted {expected:.3g}; counted within 2"
    yield Claim("the ES Jacobian's error is sqrt((p + 1) / Q)", "derivations, section 7", *verdict(flags, told))


def _style(name: str, place: int) -> dict[str, Any]:
    kind = name.partition(",")[0].rpartition(" ")[0] or name
    found = dict(STYLES.get(name.partition(",")[0], STYLES.get(kind, {"color": SEQUENCE[1], "linestyle": "-."})))
    found["linestyle"] = "-" if place == 0 else "--"
    return {**found, "marker": None, "label": name}


def draw(settings: Any, results: Results, folder: Path) -> list[Path]:
    """``learning.png``: outer loss, accuracy and F1 over processor time."""
    runs = {name: row for name, row in _runs(results).items() if "losses" in row}
    if not runs:
        return []
    figure, (grid,) = panels(1, 3, 4, 3.4)
    kinds: list[str] = []
    for name, row in runs.items():
        kind = name.split(" ")[0]
        style = _style(name, kinds.count(kind))
        kinds.append(kind)
        for axes, key in zip(grid, ("losses", "accuracy", "f1"), strict=True):
            axes.plot(row["seconds"], row[key], **style)
    base = results.get("baselines")
    for axes, label in zip(grid, ("outer loss", "test accuracy [%]", "F1 of the wrong labels"), strict=True):
        axes.set(xlabel="processor time [s]", ylabel=label, xscale="log")
        axes.grid(alpha=0.3)
    grid[0].set_yscale("log")
    if base:
        for value, word in ((base["oracle"], "oracle, fitted for longer"), (base["noisy"], "noisy, fitted for longer")):
            grid[1].axhline(value, color="0.6", linewidth=0.8, linestyle=":")
            grid[1].annotate(word, (0.02, value), xycoords=("axes fraction", "data"), va="bottom", fontsize="small")
        lost = base["oracle"] - base["noisy"]
        grid[1].set_ylim(base["noisy"] - lost, base["oracle"] + lost / 4)  # what failed is below
    legend_below(figure, grid[0], 5)
    return [save(figure, folder / "learning.png")]
