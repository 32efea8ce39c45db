"""The command line: what it prints, what it writes, and one readable line for every error."""

from __future__ import annotations

import json
import math
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from limits import PATIENCE, sampled

import diffopt
import diffopt.estimators
from diffopt.cli import main
from diffopt.commands import demo, training
from diffopt.commands.estimator_names import KNOWN_NAMES, EstimatorNameError, estimator
from diffopt.commands.train import IMAGE_SETS
from diffopt.estimators import FirstOrder, ForwardMode, Reptile, Reverse, Truncated, Unrolled
from diffopt.experiments.framework import checkpoint, image_sets, runner, unit_context
from diffopt.experiments.framework.few_shot_problem import Adaptation, evaluate, interval, meta_gradient, sinusoid
from diffopt.experiments.framework.files import save_tensors
from diffopt.experiments.framework.interrupt import Interrupt
from diffopt.experiments.framework.penalties import LR, MOMENTUM, STEPS, Penalties

NUMBERED = ["truncated", "binomial", "krylov", "multi-step", "es"]
BARE = ["unrolled", "forward-mode", "first-order", "reptile", "implicit"]
SMALL = ["--tasks", "2", "--steps", "2", "--eval-steps", "2", "--eval-episodes", "4", "--threads", "1"]


def sine(out: Path, *more: str) -> list[str]:
    return ["train", "sinusoid", "--out", str(out), *SMALL, *more]


def rows(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"diffopt {diffopt.__version__}\n"


def test_no_command_prints_the_help(capsys):
    assert main([]) == 0
    assert "COMMAND" in capsys.readouterr().out


def test_training_writes_its_three_files(tmp_path, capsys):
    assert main(sine(tmp_path, "--iterations", "6", "--eval-every", "3", "--log-every", "2")) == 0
    told = capsys.readouterr().out
    assert "sine waves from 10 points: mse" in told
    assert str(tmp_path / "curve.png") in told
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    written = [(row["kind"], row["iteration"]) for row in rows(tmp_path)]
    assert written == [("training", 2), ("evaluation", 3), ("training", 4), ("training", 6), ("evaluation", 6)]
    assert set(rows(tmp_path)[0]) == {"kind", "iteration", "outer_loss", "mse", "seconds"}
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["iteration"] == 6
    assert saved["lines"] == 5
    assert saved["options"]["inner_lr"] == 0.01
    last_rate = saved["optimizer"]["param_groups"][0]["lr"]
    assert last_rate == pytest.approx(0.001 * (1 + math.cos(math.pi * 5 / 6)) / 2)  # the sixth of six, along a cosine


@pytest.mark.parametrize("lasts", [0.1, 0.3, 0.7, 1.1])
def test_minutes_stop_in_time_and_still_evaluate(tmp_path, monkeypatch, lasts):
    """By a clock that only the work moves, so that a busy machine does not matter."""
    now = 1000.0

    def taking(seconds, function):
        def run(*given):
            nonlocal now
            now += seconds
            return function(*given)

        return run

    clock = SimpleNamespace(monotonic=lambda: now, process_time=time.process_time)
    for module in (runner, unit_context):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(training, "meta_gradient", taking(lasts, meta_gradient))
    monkeypatch.setattr(training, "evaluate", taking(0.25, evaluate))
    argv = sine(tmp_path, "--iterations", "1000000", "--eval-every", "0", "--log-every", "1")
    assert main([*argv, "--minutes", "0.08"]) == 0
    # evaluated at the start, to see how long it takes, and at the end, with a fifth of the time left for the picture
    left = 0.8 * 0.08 * 60 - (now - 1000)
    assert -1e-9 < left < lasts + 1e-9
    kinds = [row["kind"] for row in rows(tmp_path)]
    assert kinds == ["training"] * (len(kinds) - 1) + ["evaluation"]
    # the minutes are those of all calls together: a second one has none left, and a third goes on to its own
    assert main([*argv, "--resume", "--minutes", "0.08"]) == 0
    assert [row["kind"] for row in rows(tmp_path)] == kinds
    assert main([*argv, "--resume", "--minutes", "0.16"]) == 0
    last = rows(tmp_path)[-1]
    assert last["kind"] == "evaluation"
    assert -1e-3 < 0.8 * 0.16 * 60 - last["seconds"] < lasts + 1e-3  # written with three digits


@pytest.mark.data
def test_omniglot_from_real_drawings(tmp_path, data_folder):
    argv = ["train", "omniglot", "--data-dir", str(data_folder), "--out", str(tmp_path), *SMALL, "--no-rotations"]
    assert main([*argv, "--filters", "4", "--iterations", "2"]) == 0
    last = rows(tmp_path)[-1]
    assert last["kind"] == "evaluation"
    assert 0 <= last["accuracy"] <= 1


def test_images_by_name_of_their_set(tmp_path, fails):
    """Every set of the experiments can be trained on; without its files it says which are missing."""
    argv = ["train", "images", *SMALL, "--filters", "4", "--iterations", "2", "--queries", "2"]
    assert main([*argv, "--dataset", "clusters", "--out", str(tmp_path / "run")]) == 0
    last = rows(tmp_path / "run")[-1]
    assert last["kind"] == "evaluation"
    assert 0 <= last["accuracy"] <= 1
    assert set(IMAGE_SETS) == set(image_sets.SETS) - {"omniglot", "omniglot-vinyals"}
    for name in set(IMAGE_SETS) - {"clusters"}:
        error = fails(*argv, "--dataset", name, "--out", str(tmp_path / name), "--data-dir", str(tmp_path))
        assert str(tmp_path) in error
        assert not (tmp_path / name).exists()
    assert "expected one of" in fails(*argv, "--dataset", "imagenet", "--out", str(tmp_path / "other"))


EXACT_NAMES = ["unrolled", "reverse:graph", "reverse:sqrt", "reverse:2", "truncated:2", "forward-mode"]


@pytest.mark.parametrize("name", EXACT_NAMES)
def test_exact_estimators_by_name_give_the_meta_gradient_of_a_plain_loop(name):
    problem = sinusoid(shot=3, queries=3, generator=torch.Generator().manual_seed(0), device="cpu")
    double = {key: value.detach().double().requires_grad_() for key, value in problem.params.items()}
    generator = torch.Generator().manual_seed(1)
    episodes = type(problem.training(2, generator))(*(x.double() for x in problem.training(2, generator)))
    rule = ForwardMode(chunk_size=500) if name == "forward-mode" else estimator(name)
    meta_gradient(problem, double, Adaptation(diffopt.SGD(0.1, momentum=0.5), 2, rule), episodes)

    total = torch.zeros((), dtype=torch.float64)
    plain = {key: value.detach().clone().requires_grad_() for key, value in double.items()}
    for support_inputs, support_targets, query_inputs, query_targets in zip(*episodes, strict=True):
        now, velocity = plain, dict.fromkeys(plain, 0.0)
        for _ in range(2):
            loss = problem.loss(now, support_inputs, support_targets)
            gradients = torch.autograd.grad(loss, list(now.values()), create_graph=True)
            velocity = {key: 0.5 * velocity[key] + g for key, g in zip(now, gradients, strict=True)}
            now = {key: now[key] - 0.1 * velocity[key] for key in now}
        total = total + problem.loss(now, query_inputs, query_targets) / 2
    expected = torch.autograd.grad(total, list(plain.values()))
    for value, gradient in zip(double.values(), expected, strict=True):
        torch.testing.assert_close(value.grad, gradient, rtol=1e-10, atol=1e-12)  # float64, sums in another order


def test_estimator_names():
    by_reverse = {"reverse": Reverse(), **{f"reverse:{x}": Reverse(x) for x in ("graph", "sqrt", 7)}}
    others = {"truncated:3": Truncated(3), "unrolled": Unrolled(), "first-order": FirstOrder(), "reptile": Reptile()}
    for name, expected in {**by_reverse, **others}.items():
        assert estimator(name) == expected
    assert isinstance(estimator("forward-mode"), ForwardMode)


@pytest.mark.parametrize("name", ["nonsense", "", ":", "truncated 2", "Reverse"])
def test_an_unknown_estimator_name_lists_the_known_ones(name):
    says = f"there is no estimator {name!r}, expected one of {KNOWN_NAMES}"
    with pytest.raises(EstimatorNameError, match=re.escape(says)):
        estimator(name)


CHECKPOINTS = "None, 'graph', 'sqrt', 'log' or an integer >= 1"
WRONG_ARGUMENTS = [
    *((f"{rule}:", f"lacks its argument, expected {rule}:") for rule in [*NUMBERED, "reverse"]),
    *((rule, f"lacks its argument, expected {rule}:K") for rule in NUMBERED),
    *((f"{rule}:{x}", f"has the argument '{x}'") for rule in [*NUMBERED, "reverse"] for x in ("x", "2.5", "1,2")),
    *((f"{rule}:{x}", f"has an argument, expected none; write {rule}") for rule in BARE for x in ("", "2")),
    ("reverse:0", f"cannot be: Reverse: checkpoint is int 0, expected {CHECKPOINTS}"),
    ("truncated:-1", "cannot be: Truncated: steps is int -1, expected an integer >= 0"),
    ("binomial:-1", "cannot be: Binomial: order is int -1, expected an integer >= 0"),
    ("krylov:-1", "cannot be: Krylov: order is int -1, expected an integer >= 0"),
    ("multi-step:0", "cannot be: MultiStep: window is int 0, expected an integer >= 1"),
    ("es:0", "cannot be: ESJacobian: directions is int 0, expected an integer >= 1"),
]


@pytest.mark.parametrize(("name", "message"), WRONG_ARGUMENTS)
def test_a_wrong_argument_of_an_estimator_says_what_is_wrong_with_it(name, message):
    with pytest.raises(EstimatorNameError, match=re.escape(f"the estimator {name!r} {message}")):
        estimator(name)


def test_evaluation_is_the_same_each_time_and_its_interval_is_the_textbook_one():
    problem = sinusoid(shot=5, queries=5, generator=torch.Generator().manual_seed(0), device="cpu")
    adaptation = Adaptation(diffopt.SGD(0.01), 2)
    assert evaluate(problem, problem.params, adaptation, 5) == evaluate(problem, problem.params, adaptation, 5)
    mean, half_width = interval(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert mean == 3.0
    assert half_width == pytest.approx(1.96 * (14 / 3) ** 0.5 / 2)  # squares about the mean: 4 + 1 + 0 + 9


def test_the_problem_of_the_demo_has_the_hypergradient_of_a_plain_loop():
    problem = Penalties.breast_cancer()
    weights, velocity = problem.start.clone().requires_grad_(), 0.0
    for _ in range(STEPS):
        (gradient,) = torch.autograd.grad(problem.loss(weights, problem.log_penalty), weights, create_graph=True)
        velocity = MOMENTUM * velocity + gradient
        weights = weights - LR * velocity
    (exact,) = torch.autograd.grad(problem.outer_loss(weights), problem.log_penalty)
    (got,) = torch.autograd.grad(problem.compare_loss(diffopt.estimators.Reverse("sqrt")), problem.log_penalty)
    assert float((got - exact).norm() / exact.norm()) < 1e-12  # float64 through 200 steps


@pytest.mark.parametrize(
    "task", ["quadratic", *(pytest.param(x, marks=pytest.mark.slow) for x in ("sinusoid", "penalties"))]
)
def test_compare_prints_a_table_and_saves_a_picture(task, tmp_path, capsys):
    picture = tmp_path / "compare.png"
    rules = "reverse:1,truncated:2,krylov:1,multi-step:2"
    assert main(["compare", task, "--estimators", rules, "--repeats", "1", "--out", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "Krylov(order=1)" in out
    assert "MultiStep(window=2)" in out
    assert picture.stat().st_size > 10_000
    assert main(["compare", task, "--estimators", "reverse:1", "--repeats", "1", "--markdown"]) == 0
    assert "| Reverse(checkpoint=1) | " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "package", "shown"),
    [("train", "einops", "einops"), ("train", "matplotlib", "matplotlib"), ("demo", "sklearn", "scikit-learn")],
)
def test_missing_optional_package(fails, tmp_path, monkeypatch, command, package, shown):
    ours = ("diffopt.commands.", "diffopt.experiments.", "diffopt.tasks")
    for name in list(sys.modules):  # what other tests have imported must be imported again
        if name.startswith(ours) or name.partition(".")[0] == package:
            folder, _, own = name.rpartition(".")
            if hasattr(sys.modules.get(folder), own):  # where a new import puts another one
                monkeypatch.setattr(sys.modules[folder], own, sys.modules[name])
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    argv = ["demo", "--out", str(tmp_path)] if command == "demo" else sine(tmp_path)
    assert f"pip install {shown}" in fails(*argv)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ZeroDivisionError("one\ntwo"), "ZeroDivisionError: one two, expected no such error; set DIFFOPT_TRACEBACK=1"),
        (KeyError("x"), "KeyError: 'x', expected no such error"),
        (MemoryError(), "there is not enough memory .*expected a smaller problem"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: x"), "there is not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "there is not enough memory"),
        (ModuleNotFoundError("No module named 'x'", name="x"), "ModuleNotFoundError: No module named 'x', expected"),
        (RecursionError(), "RecursionError: , expected no such error"),
        (OSError(28, "No space left on device"), "a file cannot be written .No space left on device., expected room"),
        (OSError(13, "Permission denied", "x"), "x cannot be used .Permission denied., expected a path to write to"),
    ],
)
def test_any_error_is_one_line_unless_a_traceback_is_asked_for(fails, monkeypatch, error, says):
    def run(given: object) -> int:
        raise error

    monkeypatch.setattr(demo, "run", run)
    assert re.search(says, fails("demo"))
    monkeypatch.setenv("DIFFOPT_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(["demo"])


@pytest.mark.slow
@pytest.mark.parametrize("told", sampled([True, False], 2))
def test_a_reader_that_has_ended_is_no_traceback(tmp_path, told):
    """Rich, which prints tables, ends without a word."""
    argv = sine(tmp_path, "--iterations", "1") if told else ["reproduce", "--list"]
    command = [sys.executable, "-m", "diffopt", *argv]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    error = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=300) == 2
    assert re.fullmatch(r"diffopt: error: what reads standard output has ended[^\n]+\n" if told else "", error), error


def test_a_second_ctrl_c_within_the_first_save_names_no_checkpoint(tmp_path, monkeypatch, capsys):
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_tensors", interrupted)
        assert main(sine(tmp_path, "--iterations", "1")) == 130
    assert capsys.readouterr().err == "diffopt: interrupted\n"
    assert main(sine(tmp_path, "--iterations", "1")) == 0


def test_a_second_ctrl_c_within_a_later_save_names_the_checkpoint_before(tmp_path, monkeypatch, capsys):
    saves = iter(range(10))

    def interrupted(content: dict[str, object], path: Path) -> None:
        if next(saves) == 2:
            raise KeyboardInterrupt
        save_tensors(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_tensors", interrupted)
        assert main(sine(tmp_path, "--iterations", "9", "--save-every", "0")) == 130
    assert "the checkpoint of iteration 1 is" in capsys.readouterr().err
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["iteration"] == 1
    assert main(["train", "sinusoid", "--out", str(tmp_path), "--resume"]) == 0


@pytest.mark.parametrize("data", [[], ["--data-dir", "some folder"], ["--data-dir", "a/b"]], ids=" ".join)
@pytest.mark.parametrize("kind", ["train", "reproduce"])
def test_what_is_said_after_ctrl_c_goes_on_with_the_run(tmp_path, monkeypatch, capsys, kind, data):
    """One text for both, with the folder of the data, which no run stores; typed again, it does what is left."""
    argv = {
        "train": ["train", "images", "--dataset", "clusters", *SMALL, "--filters", "2", "--iterations", "3"],
        "reproduce": ["reproduce", "anil", "--quick", "--set", "iterations=3"],
    }[kind]
    with monkeypatch.context() as patch:
        heard = property(lambda self: True, lambda self, value: None)
        patch.setattr(Interrupt, "heard", heard, raising=False)
        assert main([*argv, "--out", str(tmp_path), *data]) == 130
    (said,) = capsys.readouterr().err.splitlines()
    again = shlex.split(said.partition("; continue with: diffopt ")[2])
    assert again == [*argv[:2], "--out", str(tmp_path), "--resume", *data]
    assert main(again) == 0


def test_ctrl_c_says_where_the_checkpoint_is(tmp_path):
    command = [sys.executable, "-m", "diffopt", *sine(tmp_path, "--iterations", "1000000", "--log-every", "1")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_lines(tmp_path / "metrics.jsonl", 5, process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, error
    assert str(tmp_path / "checkpoint.pt") in error
    assert f"--out {tmp_path} --resume" in error
    assert error.count("\n") == 1
    iteration = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["iteration"]
    assert f"the checkpoint of iteration {iteration} is" in error
    assert rows(tmp_path)[-1]["iteration"] == iteration  # nothing is lost


@pytest.fixture
def default_interrupt():
    """Python's own handler of Ctrl-C, which a job started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_interrupt")
def test_a_first_ctrl_c_waits_for_a_safe_place_and_a_second_does_not():
    with Interrupt() as interrupt:
        interrupt.check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until another process has written so many lines."""
    limit = time.monotonic() + PATIENCE
    while not (path.exists() and path.read_bytes().count(b"\n") >= count):
        assert process.poll() is None, "the process has ended"
        assert time.monotonic() < limit, "the process writes nothing"
        time.sleep(0.01)
