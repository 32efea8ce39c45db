"""A run that is killed at any moment and resumed ends where an uninterrupted one ends, to the last bit."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from killed import killed_twice

from diffopt.cli import main
from diffopt.experiments.framework.few_shot_problem import meta_gradient

ITERATIONS = 90
ARGV = [
    *("train", "sinusoid", "--iterations", str(ITERATIONS), "--tasks", "2", "--steps", "2", "--eval-steps", "2"),
    *("--eval-every", "40", "--eval-episodes", "4", "--log-every", "2", "--threads", "1"),
    *("--estimator", "reverse:sqrt", "--inner-momentum", "0.5"),
]


def argv(out: Path, *more: str) -> list[str]:
    return [*ARGV, "--out", str(out), *more]


def run(out: Path, *more: str) -> int:
    return main(argv(out, *more))


def content(out: Path) -> tuple[dict[str, bytes], list[dict[str, object]]]:
    """The final parameters' bytes, and the log without its times."""
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    assert checkpoint["iteration"] == ITERATIONS
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    return {name: value.numpy().tobytes() for name, value in checkpoint["params"].items()}, lines


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    assert run(out) == 0
    return out


@pytest.fixture
def copy(uninterrupted, tmp_path):
    return Path(shutil.copytree(uninterrupted, tmp_path / "copy"))


@pytest.mark.slow
def test_killed_at_random_moments(uninterrupted, tmp_path):
    killed_twice([sys.executable, "-m", "diffopt", *argv(tmp_path, "--save-every", "0")], tmp_path, (".pt",), 0.3)
    assert content(tmp_path) == content(uninterrupted)


def test_interrupted_between_two_checkpoints(uninterrupted, tmp_path, monkeypatch, capsys):
    """The checkpoint of iteration 40 is resumed: the ten iterations after it are done again."""
    left = iter(range(50))

    def interrupted(*args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return meta_gradient(*args)

    with monkeypatch.context() as patch:
        patch.setattr("diffopt.commands.training.meta_gradient", interrupted)
        assert run(tmp_path, "--save-every", "1000") == 130
    assert f"the checkpoint of iteration 40 is {tmp_path / 'checkpoint.pt'}" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == 26  # 25 of training, 1 evaluation
    torch.manual_seed(1)  # what else this process has drawn does not matter
    assert run(tmp_path, "--resume") == 0
    assert content(tmp_path) == content(uninterrupted)


def test_lines_after_the_checkpoint_are_done_again(uninterrupted, copy):
    """As after a kill between two checkpoints, in the middle of writing a line."""
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "training", "iteration": 92}\n{"kind": "trai')
    assert run(copy, "--resume", "--save-every", "3") == 0
    assert content(copy) == content(uninterrupted)


def test_resuming_needs_no_options_and_a_finished_run_stays_as_it_is(uninterrupted, copy, capsys):
    assert main(["train", "sinusoid", "--out", str(copy), "--resume"]) == 0
    assert content(copy) == content(uninterrupted)
    assert f"{ITERATIONS} iterations" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--inner-lr", "0.5"], "--inner-lr is 0.5, expected 0.01, with which the run to resume was started"),
        (["--iterations", "91"], "--iterations is 91, expected 90, with which the run to resume was started"),
        (["--estimator", "unrolled"], "--estimator is unrolled, expected reverse:sqrt, with which"),
        (["--threads", "2"], "--threads is 2, expected 1, with which"),
    ],
)
def test_other_options_are_refused_by_name(copy, fails, changed, message):
    error = fails(*argv(copy, "--resume", *changed))
    assert re.search(message, error)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seed", "0", "'seed' is 0 .of another kind., expected one that --seed takes; start a new run"),
        ("inner_lr", "0.01", "'inner_lr' is 0.01 .of another kind., expected one that --inner-lr takes"),
        ("steps", None, "'steps' is None .got 'None', expected an integer, 1 or more"),
        ("tasks", 2.0, "'tasks' is 2.0 .got '2.0', expected an integer, 1 or more"),
        ("meta_lr_decay", "linear", "'meta_lr_decay' is linear .of another kind., expected one that --meta-lr-decay"),
    ],
)
def test_stored_options_are_what_the_command_line_makes(copy, fails, name, value, message):
    content = torch.load(copy / "checkpoint.pt", weights_only=True)
    content["options"][name] = value
    torch.save(content, copy / "checkpoint.pt")
    assert re.search(f"the stored option {message}", fails(*argv(copy, "--resume")))


def test_a_log_that_lost_lines(copy, fails):
    (copy / "metrics.jsonl").write_text('{"kind": "training"}\n')
    assert "metrics.jsonl has 1 lines" in fails(*argv(copy, "--resume"))
    (copy / "metrics.jsonl").unlink()
    assert "metrics.jsonl" in fails(*argv(copy, "--resume"))
