"""Checks of ``diffopt train`` on several ranks, beside the same run in one process."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from diffopt.cli import main
from diffopt.commands import training
from diffopt.experiments.framework.few_shot_problem import FewShot
from diffopt.tasks import Episodes

ITERATIONS = 4
ARGV = [
    *("train", "sinusoid", "--iterations", str(ITERATIONS), "--tasks", "3", "--steps", "2", "--eval-steps", "2"),
    *("--eval-every", "2", "--eval-episodes", "150", "--log-every", "1", "--threads", "1", "--save-every", "0"),
]


@contextlib.contextmanager
def as_torchrun_starts_it() -> Iterator[None]:
    """With the variables by which a program knows that it is one rank of several."""
    told = {"RANK": str(distributed.get_rank()), "WORLD_SIZE": str(distributed.get_world_size()), "MASTER_ADDR": "here"}
    os.environ.update(told)
    try:
        yield
    finally:
        for name in told:
            del os.environ[name]


@contextlib.contextmanager
def double() -> Iterator[None]:
    """Let the problem be in float64."""
    made = training._problem

    def problem(options: Any, generator: torch.Generator) -> FewShot:
        found = made(options, generator)
        params = {name: value.detach().double().requires_grad_() for name, value in found.params.items()}
        return replace(found, params=params, training=wide(found.training), evaluation=wide(found.evaluation))

    def wide(sampler: Any) -> Any:
        return lambda tasks, generator: Episodes(*(x.double() for x in sampler(tasks, generator)))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "_problem", problem)
        yield


def run(out: Path, *more: str) -> tuple[int, str]:
    """The exit code of a run, and what it says on stderr."""
    told = io.StringIO()
    with double(), contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        code = main([*ARGV, "--out", str(out), *more])
    return code, told.getvalue()


def folder(name: str) -> Path:
    return Path(os.environ["RANKS_FOLDER"]) / name


def own_folder(name: str) -> Path:
    return folder(f"{name}_{distributed.get_rank()}")


def together(name: str, *more: str) -> tuple[int, str]:
    with as_torchrun_starts_it():
        found = run(folder(name), *more)
    distributed.barrier()
    return found


def content(out: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert saved["iteration"] == ITERATIONS
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return saved["params"], [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def same_run(one: Path, other: Path) -> None:
    (params, rows), (expected, expected_rows) = content(one), content(other)
    assert params.keys() == expected.keys()
    for name, x in params.items():
        assert x.dtype == torch.float64
        torch.testing.assert_close(x, expected[name], rtol=1e-12, atol=1e-12)
    assert len(rows) == len(expected_rows) == ITERATIONS + 2
    for row, right in zip(rows, expected_rows, strict=True):
        assert row.pop("kind") == right.pop("kind")
        assert row == pytest.approx(right, rel=1e-12, abs=1e-12)


def check_a_run_is_that_of_one_process() -> None:
    code, said = run(own_folder("alone"))
    assert code == 0, said
    assert together("ranks") == (0, "")
    same_run(folder("ranks"), own_folder("alone"))
    written = sorted(path.name for path in folder("ranks").iterdir())
    assert written == ["checkpoint.pt", "curve.png", "metrics.jsonl"]


def interrupted(after: int) -> Any:
    """The step of the outer loop, which Ctrl-C ends after so many calls."""
    calls, step = 0, training.meta_gradient

    def counted(*given: Any) -> tuple[float, float]:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return step(*given)

    return counted


def check_slow_runs_go_on_with_another_number_of_ranks() -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "meta_gradient", interrupted(3))
        assert together("to_one")[0] == 130
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "meta_gradient", interrupted(2))
        if distributed.get_rank() == 0:
            assert run(folder("to_ranks"))[0] == 130
    if distributed.get_rank() == 0:
        assert run(folder("to_one"), "--resume") == (0, "")
    distributed.barrier()
    assert together("to_ranks", "--resume") == (0, "")
    same_run(folder("to_one"), own_folder("alone"))
    same_run(folder("to_ranks"), own_folder("alone"))


def check_slow_an_error_is_told_once() -> None:
    code, said = together("ranks")
    assert code == 2
    assert ("already holds a run" in said) == (distributed.get_rank() == 0)
    code, said = together("nothing", "--resume")
    assert code == 2
    assert ("there is no checkpoint" in said) == (distributed.get_rank() == 0)


def check_slow_ctrl_c_stops_all_ranks_together() -> None:
    """Heard by the last rank only, in the midst of the second iteration."""
    calls, step = 0, training.meta_gradient

    def hearing(*given: Any) -> tuple[float, float]:
        nonlocal calls
        calls += 1
        if calls == 2 and distributed.get_rank() == distributed.get_world_size() - 1:
            os.kill(os.getpid(), 2)
        return step(*given)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "meta_gradient", hearing)
        assert together("stopped")[0] == 130
    assert torch.load(folder("stopped") / "checkpoint.pt", weights_only=True)["iteration"] == 2
