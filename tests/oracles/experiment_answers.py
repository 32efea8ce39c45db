"""What a small experiment measures, and what its claims are answered."""

from __future__ import annotations

from typing import Any

from diffopt.experiments.framework import catalogue
from diffopt.experiments.framework.run_folder import json_row
from diffopt.experiments.framework.unit_context import Work


def rows(name: str, settings: Any) -> dict[str, Any]:
    """The rows of all units of an experiment, each run here."""
    units = catalogue.experiment(name).units(settings)
    return {unit.name: json_row(unit.name, unit.run(Work(0))) for unit in units}


def answers(summary: Any) -> dict[str, str]:
    """Of each claim."""
    return {claim.text: claim.answer for claim in summary.claims}
