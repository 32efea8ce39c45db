"""Where the checks are, and their names; the files cannot be imported where torch has no process groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

START = "def check_"


def files_of(module: str) -> list[Path]:
    """The files of a module: itself, or, of a folder, all in it."""
    here = Path(__file__).parent
    return sorted((here / module).glob("*.py")) or [here / f"{module}.py"]


def names_of(module: str) -> list[str]:
    """The names of all checks."""
    lines = [line for file in files_of(module) for line in file.read_text(encoding="utf-8").splitlines()]
    names = [line[len(START) :].partition("(")[0] for line in lines if line.startswith(START)]
    assert len(names) == len(set(names)), names
    return names


def cases(module: str) -> list[Any]:
    """Each check on two ranks and, as a slow test, on four; the slow ones on four only."""
    names = names_of(module)
    fast = [(name, 2) for name in names if not name.startswith("slow")]
    return [*fast, *(pytest.param(name, 4, marks=pytest.mark.slow) for name in names)]
