"""What the few-shot runs say: tables beside the papers', answers to their claims, pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from diffopt.experiments.few_shot_notes import NOTES
from diffopt.experiments.few_shot_papers import printed, spread
from diffopt.experiments.framework import image_sets
from diffopt.experiments.framework.claims import Compare, Frame, answers, ask, long_table
from diffopt.experiments.framework.equal_time import COLUMNS, TIMED, beside_exact, episodes, validated
from diffopt.experiments.framework.experiment import Results, Row, Summary, Table, Unit
from diffopt.experiments.framework.outer_loop import smoothed
from diffopt.experiments.framework.pictures import SEQUENCE, STYLES, curves
from diffopt.experiments.framework.tables import Value, listed

BINOMIAL, MULTI_STEP = "binomial paper", "multi-step paper"
HERE = ["way", "shot", "group"]


def table_of(settings: Any, units: Sequence[Unit], results: Results) -> Frame:
    """One row per run and test episode."""
    data = long_table(units, results, lambda row: episodes(row, settings.episodes))
    return beside_exact(data, ("MAML", "momentum: MAML"), HERE) if len(data) else data


_ask = partial(ask, crossed=True)  # the test episodes are the same for every start


def _order(value: str) -> tuple[str, ...]:
    """The order of the binomial paper, in formulas."""
    return (
        f"{value}: binomial - MAML <= 0 by way, shot; L",
        f"{value}: krylov - MAML <= 0 by way, shot; L",
        f"{value}: binomial - truncated >= 0 by way, shot, L",
        f"{value}: krylov - truncated >= 0 by way, shot, L",
        f"{value}: truncated - FOMAML >= 0 by way, shot; L",
    )


CLAIMS: tuple[Compare, ...] = (
    _ask(
        "the order is MAML >= binomial, Krylov >= truncated >= first order",
        f"{BINOMIAL}, table 1",
        _order("accuracy"),
        order=True,
        headline=True,
    ),
    _ask(
        "that order holds in equal time, too",
        "no paper: cost counted in",
        _order(TIMED),
        order=True,
        note="validation accuracy when the fastest method had finished",
    ),
    _ask(
        "binomial is above truncated at equal L",
        f"{BINOMIAL}, table 1",
        "accuracy: binomial - truncated > 0 by way, shot, L",
        headline=True,
    ),
    _ask(
        "binomial is above iMAML at equal L", f"{BINOMIAL}, table 1", "accuracy: binomial - iMAML > 0 by way, shot, L"
    ),
    _ask(
        "binomial is within one point of MAML",
        f"{BINOMIAL}, table 1",
        "accuracy: binomial - MAML >= -1 by way, shot; L",
    ),
    _ask(
        "hybrid lies between truncated and binomial",
        f"{BINOMIAL}, table 2",
        ("accuracy: hybrid - truncated >= 0 by way, shot, L", "accuracy: hybrid - binomial <= 0 by way, shot, L"),
        order=True,
    ),
    _ask(
        "multi-step(2) and (4) are as accurate as MAML (within one point)",
        f"{MULTI_STEP}, tables 4 and 5",
        "accuracy: multi-step [L < 8] - momentum: MAML >= -1 by way, shot; L",
        headline=True,
    ),
    _ask(
        "multi-step(4) is twice as fast as MAML (0.55 of its time) at a loss of 0.1 points",
        f"{MULTI_STEP}, abstract and table 4",
        (
            "seconds: multi-step [L == 4] / momentum: MAML <= 0.55 by way, shot",
            "accuracy: multi-step [L == 4] - momentum: MAML >= -0.1 by way, shot",
        ),
    ),
    _ask(
        "multi-step(8) loses at most 2.59 points",
        f"{MULTI_STEP}, table 5",
        "accuracy: multi-step [L == 8] - momentum: MAML >= -2.59 by way, shot",
    ),
    _ask(
        "binomial and Krylov of level 1, the same rule, end within one point: the noise floor",
        "derivations, section 3",
        "accuracy: binomial [L == 1] - krylov ~ 1 by way, shot",
    ),
)


def summary(settings: Any, units: Sequence[Unit], results: Results) -> Summary:
    """Tables and claims."""
    data = table_of(settings, units, results)
    tables: list[Table] = []
    for (way, shot), rows in data.groupby(["way", "shot"], sort=False) if len(data) else ():
        title = f"{image_sets.SETS[settings.dataset].title}, {way}-way {shot}-shot"
        title += (
            f", {'head only (ANIL)' if settings.anil else 'all layers adapted'}: {settings.iterations} outer iterations"
        )
        said = {name: printed(settings.dataset, way, shot, name) for name in rows["method"]}

        def paper(at: Mapping[str, Any], said: Mapping[str, Any] = said) -> str | None:
            found: str | None = said[at["method"]]
            return found

        title += f", {rows['seed'].nunique()} start{'s' * (rows['seed'].nunique() > 1)}"
        title += f"; printed: {spread(settings.dataset)}" if any(said.values()) else ""
        values: dict[str, Value] = {
            **COLUMNS,
            **({"diverged": "diverged"} if rows["diverged"].any() else {}),
            **({"starts": ("seed", "nunique")} if rows.groupby("method")["seed"].nunique().nunique() > 1 else {}),
        }
        tables += listed(title, rows, {"method": "method"}, values, paper=paper, said="printed")
    return Summary(tuple(tables), tuple(answers(data, CLAIMS)), NOTES)


def _style(name: str) -> dict[str, Any]:
    kind = name.removeprefix("momentum: ").rpartition(" ")[0] or name.removeprefix("momentum: ")
    known = {"MAML": "exact", "FOMAML": "first-order", "Reptile": "reptile", "iMAML": "implicit"}
    found = STYLES.get(known.get(kind, kind), {"color": SEQUENCE[0], "marker": "o"})
    line = ":" if name.startswith("momentum") else {"2": "--", "3": ":", "4": "-."}.get(name.rpartition(" ")[2], "-")
    return {"color": found["color"], "marker": found["marker"], "linestyle": line}


def pictures(settings: Any, units: Sequence[Unit], results: Results, folder: Path) -> list[Path]:
    """``accuracy-WAY-SHOT.png``: test accuracy over time; validation accuracy over time and iterations; loss."""

    def records(row: Row) -> Iterator[Row]:
        if "each" in row:
            yield {"time": row["seconds"][-1], "test": fmean(row["each"]), "at": 0}
            for at, (after, clock, value) in enumerate(zip(row["after"], *validated(row), strict=True)):
                yield {"after": after, "clock": clock, "validation": value, "at": at}
            for at, loss in enumerate(smoothed(row["losses"], 31)):
                yield {"iteration": at + 1, "loss": loss, "at": at}

    data, found = long_table(units, results, records), list[Path]()
    for (way, shot), rows in data.groupby(["way", "shot"]) if len(data) else ():
        found += curves(
            rows,
            folder / f"accuracy-{way}-{shot}.png",
            x=("time", "clock", "after", "iteration"),
            y=("test", "validation", "validation", "loss"),
            hue="method",
            over="at",
            style=_style,
            scales={"loss": "log"},
            labels={
                "time": "processor time of training [s]",
                "clock": "processor time of training [s]",
                "test": "test accuracy [%]",
                "after": "outer iteration",
                "validation": "validation accuracy [%]",
                "iteration": "outer iteration",
                "loss": "outer training loss",
            },
            legend=6,
        )
    return found
