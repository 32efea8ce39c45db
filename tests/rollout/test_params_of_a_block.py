"""The params that a loss is given in a linked step: views, or, under a vmap, the state's own where that is as good.

The oracle is one task after the other, by plain autograd through the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.multiprocessing.reductions import StorageWeakRef

import diffopt
from diffopt import prox
from diffopt.estimators import FirstOrder, Implicit, Reptile, Reverse, Truncated, Unrolled
from diffopt.optimizers.base import OPTION, Buffers
from diffopt.rollout import checks
from diffopt.tensors import random_state
from diffopt.tensors.leaves import Leaves

TASKS, STEPS = 3, 4
Params = tuple[Tensor, Tensor]


def loss(params: Params, a: Tensor) -> Tensor:
    return ((params[0] * a).sum() - 1) ** 2 + (params[1] ** 4).sum() + (params[0][:2] * params[1]).sum()


def start() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second, a = (torch.randn(TASKS, n, generator=generator, dtype=torch.float64) for n in (3, 2, 3))
    return first.requires_grad_(), second.requires_grad_(), a.requires_grad_()


def end(estimator: Any, optimizer: diffopt.Optimizer, inner: Callable[..., Any] = loss) -> Callable[..., Tensor]:
    """An outer loss of one task, which depends on the way, too."""

    def outer(first: Tensor, second: Tensor, a: Tensor) -> Tensor:
        solution = diffopt.solve(inner, (first, second), a, optimizer=optimizer, steps=STEPS, estimator=estimator)
        return (solution.params[0] ** 2).sum() + solution.params[1].prod() + solution.losses.prod()

    return outer


def agree(optimizer: diffopt.Optimizer, inner: Callable[..., Any] = loss) -> None:
    leaves = start()
    together = torch.autograd.grad(vmap(end(Reverse(), optimizer, inner))(*leaves).sum(), leaves)
    one = end(Unrolled(), optimizer, inner)
    apart = torch.autograd.grad(torch.stack([one(*task) for task in zip(*leaves, strict=True)]).sum(), leaves)
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-12)


@dataclass(frozen=True)
class Linked(diffopt.Optimizer):
    """Gradient descent that computes one new leaf from another."""

    lr: float = 0.05
    elementwise: ClassVar[bool] = False

    def init(self, params: Leaves) -> Buffers:
        return {}

    def update(self, params: Leaves, grads: Leaves, buffers: Buffers, step: int) -> Any:
        first, second = params - self.lr * grads
        return Leaves([first, second - first.mean()]), buffers


@dataclass(frozen=True)
class Lazy(diffopt.Optimizer):
    """Gradient descent that hands one leaf on as it is, and moves the other by it."""

    def init(self, params: Leaves) -> Buffers:
        return {}

    def update(self, params: Leaves, grads: Leaves, buffers: Buffers, step: int) -> Any:
        first, second = params
        return Leaves([first, second - 0.05 * grads[1] - 0.01 * first.mean()]), buffers


OPTIMIZERS = {
    "linked": Linked(),
    "lazy": Lazy(),
    "sgd": diffopt.SGD(0.05, momentum=0.9, nesterov=True),
    "adam": diffopt.Adam(0.05),
    "clip": diffopt.Clip(diffopt.SGD(0.05), max_norm=0.5),
    "groups": diffopt.Groups({"0": diffopt.SGD(0.05), "1": diffopt.SGD(0.0)}),
    "box": diffopt.Proximal(diffopt.SGD(0.05), prox.Box(-0.3, 0.3)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_tasks_together_give_what_each_gives_alone(name: str) -> None:
    agree(OPTIMIZERS[name])


@pytest.mark.parametrize(
    "inner",
    [
        lambda p, a: p[0][0] + 0 * a.sum(),
        lambda p, a: p[0].sum() * a.sum(),  # which does not depend on the other leaf
        lambda p, a: (p[1] - p[0][:2].detach() * a[:2]).square().sum() + p[0].prod(),
    ],
    ids=["a view of a leaf", "one leaf of two", "a leaf cut off"],
)
def test_losses_that_hand_on_what_they_are_given(inner: Callable[..., Any]) -> None:
    agree(diffopt.SGD(0.05), inner)


def test_params_that_an_observer_hands_to_the_loss_are_refused() -> None:
    seen: list[Tensor] = []

    def reading(params: Params, a: Tensor) -> Tensor:
        return loss(params, a) + (seen[-1].sum() if seen else 0)

    def observe(params: Params, a: Tensor) -> Tensor:
        seen.append(params[0] * 2)
        return a.sum()

    def outer(first: Tensor, second: Tensor, a: Tensor) -> Tensor:
        given: Any = {"optimizer": diffopt.SGD(0.05), "steps": STEPS, "observe": observe}
        return diffopt.solve(reading, (first, second), a, **given).params[0].sum()

    with pytest.raises(diffopt.DiffoptError):
        vmap(outer)(*start())


class _Counted(torch.autograd.Function):
    """The identity, which counts how often it is differentiated."""

    generate_vmap_rule = True
    calls = 0

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        _Counted.calls += 1
        return cotangent


def test_inner_gradients_are_not_taken_of_what_is_read() -> None:
    _Counted.calls = 0
    outer = end(Reverse(), diffopt.SGD(0.05), lambda p, a: loss(p, _Counted.apply(a)))
    value = vmap(outer)(*start()).sum()
    assert _Counted.calls == 0
    torch.autograd.grad(value, start()[2], allow_unused=True)


@dataclass(frozen=True)
class Noting(diffopt.Optimizer):
    """Gradient descent that notes where the params lie that it makes."""

    made: Any = field(default_factory=list, metadata=OPTION)

    def init(self, params: Leaves) -> Buffers:
        return {}

    def update(self, params: Leaves, grads: Leaves, buffers: Buffers, step: int) -> Any:
        after = params - 0.1 * grads
        self.made.append(StorageWeakRef(after[0].untyped_storage()))
        return after, buffers


@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_graph_from_a_later_step_on_keeps_no_state_that_it_does_not_need(last: int) -> None:
    optimizer, slope = Noting(), torch.linspace(0, 1, 5).requires_grad_()
    solution = diffopt.solve(
        lambda w, slope: (w * slope.detach()).sum() + slope.sum(),
        torch.ones(5, requires_grad=True),
        slope,
        optimizer=optimizer,
        steps=5,
        estimator=Truncated(last),
    )
    assert [place.expired() for place in optimizer.made] == [True] * 4 + [False]
    assert solution.params.requires_grad


@pytest.mark.parametrize("estimator", [FirstOrder(), Reptile()], ids=str)
def test_no_state_is_looked_for_that_no_backward_pass_reads(estimator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def looked(function: object) -> Any:
        raise AssertionError("looked for")

    monkeypatch.setattr(checks, "HiddenState", looked)
    first, second, a = (x[0].detach().requires_grad_() for x in start())
    end(estimator, diffopt.SGD(0.05))(first, second, a.detach())
    with pytest.raises(AssertionError, match="looked for"):
        end(Implicit(), diffopt.SGD(0.05))(first, second, a)


@pytest.mark.parametrize("count", [1, 2, 624, 2 * 624])
@pytest.mark.parametrize("kind", ["rand", "randn", "randperm"])
def test_whatever_is_drawn_is_noticed(kind: str, count: int) -> None:
    device = torch.device("cpu")
    before = random_state.snapshot(device)
    assert not random_state.changed(before, random_state.snapshot(device))
    getattr(torch, kind)(count + 1 if kind == "randperm" else count)
    assert random_state.changed(before, random_state.snapshot(device))
    random_state.restore(before, device)
    assert not random_state.changed(before, random_state.snapshot(device))
