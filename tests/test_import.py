"""``import diffopt``: light, with every subpackage at hand that messages name."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import diffopt

LATER = ["estimators", "tasks", "testing"]
AT_HAND = ["errors", "linear_solve", *LATER]
EACH_IN_A_FORK = f"""
import os, sys, torch
for name in {AT_HAND}:
    child = os.fork()
    if not child:
        import diffopt
        print(getattr(diffopt, name).__name__, name in dir(diffopt))
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_imports_no_more_than_the_core() -> None:
    loaded = run("import sys, diffopt; print(*sorted(x for x in sys.modules if x.startswith('diffopt.')))").split()
    assert [x for x in loaded if x.split(".")[1] in (*LATER, "commands", "cli")] == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_subpackage_is_an_attribute() -> None:
    """Whether or not another one has been asked for: each in a process of its own."""
    assert run(EACH_IN_A_FORK).splitlines() == [f"diffopt.{name} True" for name in AT_HAND]


def test_anything_else_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'diffopt' has no attribute 'estimator_'"):
        diffopt.estimator_  # noqa: B018
    assert not hasattr(diffopt, "nothing")
