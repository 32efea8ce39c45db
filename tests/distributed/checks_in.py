"""The names of the checks in a file, which cannot be imported where torch has no process groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

START = "def check_"


def names_of(module: str) -> list[str]:
    """The names of all checks."""
    text = (Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8")
    return [line[len(START) :].partition("(")[0] for line in text.splitlines() if line.startswith(START)]


def cases(module: str) -> list[Any]:
    """Each check on two ranks and, as a slow test, on four; the slow ones on four only."""
    names = names_of(module)
    fast = [(name, 2) for name in names if not name.startswith("slow")]
    return [*fast, *(pytest.param(name, 4, marks=pytest.mark.slow) for name in names)]
