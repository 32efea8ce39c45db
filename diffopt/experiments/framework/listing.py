"""``diffopt reproduce --list``: what experiments there are and what they need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from diffopt.experiments.framework import catalogue
from diffopt.experiments.framework.console import grid, plain_console
from diffopt.experiments.framework.experiment import Experiment


def list_all() -> int:
    """Print every experiment with what it needs."""
    rows = []
    for name in catalogue.NAMES:
        found = catalogue.experiment(name)
        gpu = "no gain" if found.needs.minutes_gpu is None else _minutes(found.needs.minutes_gpu)
        rows.append((name, found.title, found.paper, found.needs.data, _minutes(found.needs.minutes_cpu), gpu))
    plain_console().print(grid(("name", "what", "paper", "data", "two cores", "a GPU"), rows, whole=1))
    return 0


def list_one(experiment: Experiment[Any]) -> int:
    """Print the settings of an experiment at each scale beside the paper's, and its units."""
    scales, rows = (experiment.quick, experiment.standard, experiment.full), []
    for item in fields(experiment.standard):
        values = [plain(getattr(scale, item.name)) for scale in scales]
        rows.append((item.name, *values, experiment.papers.get(item.name, "-"), item.metadata["help"]))
    columns, title = ("setting", "--quick", "standard", "--full", "the paper", "what it is"), experiment.title
    console = plain_console()
    console.print(grid(columns, rows, f"diffopt reproduce {experiment.name}: {title}", whole=1))
    units = experiment.units(experiment.standard)
    first = [unit.name for unit in units if not unit.keys.get("seed", 0)]
    again = f", and so for {len(units) - len(first)} of other starts" if len(first) < len(units) else ""
    console.print(f"Units: {', '.join(first)}{again}")
    return 0


def _minutes(number: float) -> str:
    return f"{number:g} min" if number < 120 else f"{number / 60:g} h"


def differing(experiment: Experiment[Any], settings: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The settings of a run for which the paper's are known: name, ours, the paper's."""
    known = experiment.papers.items()
    return [(name, plain(settings[name]), said) for name, said in known if name in settings]


def plain(value: Any) -> str:
    """A setting as it is given on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
