"""A run that is killed at any moment and resumed ends where an uninterrupted one ends, to the last bit."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from limits import PATIENCE

from diffopt.cli import main
from diffopt.experiments.framework.few_shot_problem import meta_gradient

ITERATIONS = 90
ARGV = [
    *("train", "sinusoid", "--iterations", str(ITERATIONS), "--tasks", "2", "--steps", "2", "--eval-steps", "2"),
    *("--eval-every", "40", "--eval-episodes", "4", "--log-every", "2", "--threads", "1"),
    *("--estimator", "reverse:sqrt", "--inner-momentum", "0.5"),
]


def run(out: Path, *more: str) -> int:
    return main([*ARGV, "--out", str(out), *more])


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


@pytest.fixture
def error_of(capsys):
    def run_and_read(out: Path, *more: str) -> str:
        assert run(out, *more) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    return run_and_read


@pytest.mark.slow
def test_killed_at_random_moments(uninterrupted, tmp_path):
    moments, command = random.Random(0), [sys.executable, "-m", "diffopt", *ARGV, "--out", str(tmp_path)]
    kills, resume, checkpoint = 0, [], tmp_path / "checkpoint.pt"
    while True:
        process = subprocess.Popen([*command, *resume, "--save-every", "0"], stdout=subprocess.DEVNULL)
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while kills < 2 and process.poll() is None:
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns != before:  # it has begun to iterate
                time.sleep(moments.uniform(0, 0.3))
                process.kill()
                kills += 1
                break
            time.sleep(0.01)
        code = process.wait(timeout=PATIENCE)
        if code == 0:
            break
        assert code < 0, "it ended by itself, with an error"
        resume = ["--resume"]
    assert kills == 2
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
def test_other_options_are_refused_by_name(copy, error_of, changed, message):
    error = error_of(copy, "--resume", *changed)
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
def test_stored_options_are_what_the_command_line_makes(copy, error_of, name, value, message):
    content = torch.load(copy / "checkpoint.pt", weights_only=True)
    content["options"][name] = value
    torch.save(content, copy / "checkpoint.pt")
    assert re.search(f"the stored option {message}", error_of(copy, "--resume"))


def test_a_log_that_lost_lines(copy, error_of):
    (copy / "metrics.jsonl").write_text('{"kind": "training"}\n')
    assert "metrics.jsonl has 1 lines" in error_of(copy, "--resume")
    (copy / "metrics.jsonl").unlink()
    assert "metrics.jsonl" in error_of(copy, "--resume")
