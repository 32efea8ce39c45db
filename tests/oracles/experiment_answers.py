"""What a small experiment measures, and what its claims are answered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffopt.experiments.framework import catalogue
from diffopt.experiments.framework.run_folder import json_row
from diffopt.experiments.framework.unit_context import OutOfTime, Work


def rows(name: str, settings: Any) -> dict[str, Any]:
    """The rows of all units of an experiment, each run here."""
    units = catalogue.experiment(name).units(settings)
    return {unit.name: json_row(unit.name, unit.run(Work(0))) for unit in units}


def answers(summary: Any) -> dict[str, str]:
    """Of each claim."""
    return {claim.text: claim.answer for claim in summary.claims}


def gone_on(folder: Path, stops: int, learn: Callable[..., Any], *given: Any) -> Any:
    """What a unit returns that runs out of time after every iteration, and is gone on with each time."""
    folder.mkdir(exist_ok=True)
    work = Work(0, unit="x", store=folder / "x.pt", deadline=0.0)
    for _ in range(stops):
        with pytest.raises(OutOfTime):
            learn(*given, work)
    return learn(*given, work)
