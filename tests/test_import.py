"""``import diffopt``: light, with every subpackage at hand that messages name."""

from __future__ import annotations

import subprocess
import sys

import pytest

import diffopt

LATER = ["estimators", "tasks", "testing"]
AT_HAND = ["errors", "linear_solve", *LATER]


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_imports_no_more_than_the_core() -> None:
    loaded = run("import sys, diffopt; print(*sorted(x for x in sys.modules if x.startswith('diffopt.')))").split()
    assert [x for x in loaded if x.split(".")[1] in (*LATER, "commands", "cli")] == []


@pytest.mark.parametrize("name", AT_HAND)
def test_a_subpackage_is_an_attribute(name: str) -> None:
    printed = run(f"import diffopt; print(diffopt.{name}.__name__, {name!r} in dir(diffopt))").split()
    assert printed == [f"diffopt.{name}", "True"]


def test_anything_else_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'diffopt' has no attribute 'estimator_'"):
        diffopt.estimator_  # noqa: B018
    assert not hasattr(diffopt, "nothing")
