"""The names of the checks in a file, which cannot be imported where torch has no process groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

START = "def check_"


def cases(module: str) -> list[Any]:
    """Each check on two ranks and, as a slow test, on four; the slow ones on four only."""
    text = (Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8")
    names = [line[len(START) :].partition("(")[0] for line in text.splitlines() if line.startswith(START)]
    fast = [(name, 2) for name in names if not name.startswith("slow")]
    return [*fast, *(pytest.param(name, 4, marks=pytest.mark.slow) for name in names)]
