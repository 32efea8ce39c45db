"""``diffopt train`` on several ranks: one folder, the numbers of one process, and resumed with other ranks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from checks_in import cases
from limits import PATIENCE


@pytest.mark.parametrize(("name", "world"), cases("training"))
def test_training_on_ranks(outcomes: Callable[..., dict[str, str]], name: str, world: int) -> None:
    found = outcomes("training", world, world > 2)
    said = found.get(name, found.get("", "not run"))
    assert said == "", said


@pytest.mark.slow
@pytest.mark.usefixtures("outcomes")
def test_torchrun_starts_it(tmp_path: Path) -> None:
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "diffopt"]
    options = ["train", "sinusoid", "--iterations", "2", "--tasks", "2", "--eval-episodes", "2", "--eval-every", "0"]
    command = [*started, *options, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 iterations in") == 1
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint.pt", "curve.png", "metrics.jsonl"]
