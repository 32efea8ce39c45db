"""What the few-shot runs say: tables beside the papers', claims and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from diffopt.experiments.few_shot_papers import printed, spread
from diffopt.experiments.framework import image_sets
from diffopt.experiments.framework.claims import Finished, Frame
from diffopt.experiments.framework.equal_time import COLUMNS, LABELS, beside_exact, episodes, looks
from diffopt.experiments.framework.experiment import Row, Summary, Table
from diffopt.experiments.framework.pictures import SEQUENCE, STYLES, curves
from diffopt.experiments.framework.tables import Value, listed
from diffopt.experiments.framework.texts import asked

HERE = ["way", "shot", "group"]


def table_of(settings: Any, done: Finished) -> Frame:
    """One row per run and test episode."""
    data = done.table(lambda row: episodes(row, settings.episodes))
    return beside_exact(data, ("MAML", "momentum: MAML"), HERE) if len(data) else data


def summary(settings: Any, done: Finished) -> Summary:
    """Tables and claims."""
    data = table_of(settings, done)
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
    return Summary(tuple(tables), asked("few-shot", "accuracy", data))


def _style(name: str) -> dict[str, Any]:
    kind = name.removeprefix("momentum: ").rpartition(" ")[0] or name.removeprefix("momentum: ")
    known = {"MAML": "exact", "FOMAML": "first-order", "Reptile": "reptile", "iMAML": "implicit"}
    found = STYLES.get(known.get(kind, kind), {"color": SEQUENCE[0], "marker": "o"})
    line = ":" if name.startswith("momentum") else {"2": "--", "3": ":", "4": "-."}.get(name.rpartition(" ")[2], "-")
    return {"color": found["color"], "marker": found["marker"], "linestyle": line}


def pictures(settings: Any, done: Finished, folder: Path) -> list[Path]:
    """``accuracy-WAY-SHOT.png``: test accuracy over time; validation accuracy over time and iterations; loss."""

    def records(row: Row) -> Iterator[Row]:
        if "each" in row:
            yield {"time": row["seconds"][-1], "test": fmean(row["each"]), "at": 0}
            yield from looks(row)

    data, found = done.table(records), list[Path]()
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
            labels={**LABELS, "time": LABELS["clock"], "test": "test accuracy [%]"},
            legend=6,
        )
    return found
