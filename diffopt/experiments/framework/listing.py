"""``diffopt reproduce --list``: what experiments there are and what they need."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from rich import box
from rich.table import Table

from diffopt.experiments.framework import catalogue
from diffopt.experiments.framework.console import plain_console
from diffopt.experiments.framework.experiment import Experiment


def list_all() -> int:
    """Print every experiment with what it needs."""
    grid = Table(box=box.SIMPLE_HEAD)
    grid.add_column("name", no_wrap=True)  # to be copied
    for column in ("what", "paper", "data", "two cores", "a GPU"):
        grid.add_column(column, overflow="fold")
    for name in catalogue.NAMES:
        found = catalogue.experiment(name)
        gpu = "no gain" if found.needs.minutes_gpu is None else _minutes(found.needs.minutes_gpu)
        grid.add_row(name, found.title, found.paper, found.needs.data, _minutes(found.needs.minutes_cpu), gpu)
    plain_console().print(grid)
    return 0


def list_one(experiment: Experiment[Any]) -> int:
    """Print the settings of an experiment at each scale, and its units."""
    grid = Table(title=f"diffopt reproduce {experiment.name}: {experiment.title}", box=box.SIMPLE_HEAD)
    grid.add_column("setting", no_wrap=True)  # to be copied
    for column in ("--quick", "standard", "--full", "what it is"):
        grid.add_column(column, overflow="fold")
    for item in fields(experiment.standard):
        scales = (experiment.quick, experiment.standard, experiment.full)
        grid.add_row(item.name, *(_plain(getattr(scale, item.name)) for scale in scales), item.metadata["help"])
    console = plain_console()
    console.print(grid)
    console.print("Units: " + ", ".join(unit.name for unit in experiment.units(experiment.standard)))
    return 0


def _minutes(number: float) -> str:
    return f"{number:g} min" if number < 120 else f"{number / 60:g} h"


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
