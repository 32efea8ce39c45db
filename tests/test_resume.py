"""Windows that go on from files: killed by SIGKILL in both phases to the same bits, and exact for every optimizer."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (its usual name)

import diffopt
from diffopt import SGD, Adam, AdamW, Optimizer, Schedule
from diffopt.estimators import Reverse


@pytest.fixture
def example(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(checkout / "examples")
    return importlib.import_module("resume")


def content(folder: Path) -> dict[str, Any]:
    return {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return bool(a.dtype == b.dtype and torch.equal(a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def test_the_windows_are_a_chain_in_one_process(example: ModuleType, tmp_path: Path) -> None:
    """Parameters, momentum, dropout's numbers and the stream of batches: every hypergradient to round-off."""
    training = example.Training(3, 5)
    found = example.run(training, tmp_path)
    learned = {name: x.clone().requires_grad_() for name, x in training.learned.items()}
    params = {name: x.detach().clone().requires_grad_() for name, x in training.params.items()}
    state = example.Training.window(training, 0, params, learned, steps=0)
    for number in (1, 2, 3):
        state = training.window(number, state, learned)
    expected = torch.autograd.grad(training.validation(state.params), [*params.values(), *learned.values()])
    for x, y in zip([*found["state"][: len(params)], *found["learned"].values()], expected, strict=True):
        assert float(y.norm()) > 0
        assert float((x - y).norm()) < 1e-12 * float(y.norm())


def test_a_file_that_was_being_written_is_not_read(example: ModuleType, tmp_path: Path) -> None:
    training, (one, other) = example.Training(2, 3), (tmp_path / "one", tmp_path / "other")
    one.mkdir()
    other.mkdir()
    whole = example.run(training, one)
    for stopped_at in ("state-0", "state-2", "adjoint-1", "adjoint-0"):
        (other / f"{stopped_at}.partial").write_bytes(b"half of a fi")
    for _ in range(5):
        assert example.run(training, other, most=1) is None
    assert same(whole, example.run(training, other))
    assert same(content(one), content(other))


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def begin(checkout: Path) -> Callable[[Path], subprocess.Popen[bytes]]:
    """Starts a process that runs, or goes on, in a folder."""

    def start(folder: Path) -> subprocess.Popen[bytes]:
        program = [sys.executable, str(checkout / "examples" / "resume.py"), "--quick", "--folder", str(folder)]
        return subprocess.Popen(program, env={**ENVIRONMENT, "PYTHONPATH": str(checkout)}, stdout=subprocess.PIPE)

    return start


@pytest.fixture(scope="module")
def alone(begin: Callable[[Path], subprocess.Popen[bytes]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The files of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("alone")
    with begin(folder) as process:
        assert b"done" in process.communicate()[0]
    return content(folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("kills", [("state-1",), ("adjoint-2",), ("state-2", "adjoint-3", "adjoint-1")])
def test_a_killed_process_goes_on_to_the_same_bits(
    begin: Callable[[Path], subprocess.Popen[bytes]], alone: dict[str, Any], tmp_path: Path, kills: tuple[str, ...]
) -> None:
    """In the forward phase, in the backward phase, and in both: as soon as this file is there."""
    for name in kills:
        with begin(tmp_path) as process:
            while not (tmp_path / f"{name}.pt").exists() and process.poll() is None:
                time.sleep(0.0005)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "adjoint-0.pt").exists()
    with begin(tmp_path) as process:
        assert b"done" in process.communicate()[0]
    assert len(alone) == 8
    assert same(content(tmp_path), alone)


x, y = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def moved(w: Tensor, scale: Tensor, batch: Tensor) -> Tensor:
    return (scale * (x[batch] @ w).tanh() - y[batch, 0]).square().mean()


def dropping(w: Tensor, scale: Tensor, batch: Tensor) -> Tensor:
    return (scale * F.dropout(x[batch], 0.3) @ w - y[batch, 0]).square().mean()


def optimizers(rate: Tensor) -> dict[str, Optimizer]:
    return {
        "momentum": SGD(rate[0], momentum=rate[1]),
        "Adam": Adam(rate[0], betas=(rate[1], 0.99)),
        "AdamW": AdamW(rate[0], weight_decay=rate[1]),
        "schedule": SGD(Schedule(rate[0] * rate[1] ** torch.arange(6.0).double())),
    }


@pytest.mark.parametrize("name", optimizers(torch.ones(2)))
@pytest.mark.parametrize("loss", [moved, dropping])
def test_windows_from_files_are_exact(name: str, loss: Callable[..., Tensor], tmp_path: Path) -> None:
    """Two windows of three steps, each pulled back alone from its saved state, beside both in one graph."""
    rate, scale = torch.tensor([0.1, 0.7]).double(), torch.tensor(1.3).double()
    data = diffopt.Batches(torch.utils.data.TensorDataset(torch.arange(12)), 4, seed=1)

    def window(number: int, start: Any, scale: Tensor, rate: Tensor) -> diffopt.State[Tensor]:
        torch.manual_seed(number)
        options = {"steps": 3, "batches": lambda step: data(step)[0], "estimator": Reverse("sqrt")}
        return diffopt.solve(loss, start, scale, optimizer=optimizers(rate)[name], **options).state

    def leaf(x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_()

    def flat(state: diffopt.State[Tensor]) -> list[Tensor]:
        return [state.params, *state.buffers.values()]

    start = torch.tensor([0.3, -0.2, 0.5]).double()
    own = [leaf(start), leaf(scale), leaf(rate)]
    end = window(1, window(0, own[0], *own[1:]), *own[1:])
    expected = torch.autograd.grad(end.params.square().sum(), own)

    torch.save(window(0, start, scale, rate).state_dict(), tmp_path / "state.pt")
    state = diffopt.State.from_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    between, learned = [x.requires_grad_() for x in flat(state)], [leaf(scale), leaf(rate)]
    outer = window(1, state, *learned).params.square().sum()
    second = torch.autograd.grad(outer, [*between, *learned])
    first = [leaf(start), leaf(scale), leaf(rate)]
    cotangents = second[: len(between)]
    terms = torch.autograd.grad(flat(window(0, first[0], *first[1:])), first, cotangents)
    found = [terms[0], *(a + b for a, b in zip(terms[1:], second[len(between) :], strict=True))]
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm()) <= 1e-12 * float(b.norm())
