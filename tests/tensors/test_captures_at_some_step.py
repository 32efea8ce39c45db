"""Captured tensors that a loss reads at one step only, or keeps from one step for another, are refused wherever it is.

Each step is looked at by itself: quickly where its graph ends in what it was given, else closely.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import diffopt
from diffopt.errors import CapturedTensorError
from diffopt.estimators import FirstOrder, Reverse, Truncated
from diffopt.tensors import autograd_graph

STEPS = 5
ESTIMATORS = [FirstOrder(), Reverse(1), Reverse(), Reverse(memory="1GB"), Truncated(2)]
Loss = Callable[..., Tensor]


def made(kind: str) -> Tensor:
    """A tensor that requires grad: a leaf, or the result of operations on one that nothing else holds."""
    leaf = torch.tensor([0.3, 0.2], dtype=torch.float64, requires_grad=True)
    return leaf if kind == "leaf" else leaf.exp() * 2


def solved(estimator: Any, loss: Loss, **how: Any) -> Tensor:
    w = torch.tensor([0.5, -0.4], dtype=torch.float64, requires_grad=True)
    found = diffopt.solve(loss, w, optimizer=diffopt.SGD(0.1), steps=STEPS, estimator=estimator, **how).params
    return torch.autograd.grad(found.square().sum(), w)[0]


@pytest.mark.parametrize("kind", ["leaf", "result"])
@pytest.mark.parametrize("step", [1, 2, STEPS])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_what_is_read_at_one_step_is_refused(estimator: Any, step: int, kind: str) -> None:
    captured = made(kind)

    def loss(w: Tensor, now: Tensor) -> Tensor:
        return w.square().sum() + ((captured * w).sum() if int(now) == step else 0)

    with pytest.raises(CapturedTensorError):
        solved(estimator, loss, batches=torch.arange(1, STEPS + 1))


@pytest.mark.parametrize("estimator", [FirstOrder(), Reverse(1), Truncated(2)], ids=str)
@pytest.mark.parametrize("after", [1, 2, 3])
def test_what_one_step_has_kept_for_another_is_refused(estimator: Any, after: int) -> None:
    kept: list[Tensor] = []

    def loss(w: Tensor, now: Tensor) -> Tensor:
        if int(now) == after:
            kept.append(w.sin())
        return w.square().sum() + ((kept[0] * w).sum() if int(now) == after + 1 else 0)

    with pytest.raises(CapturedTensorError):
        solved(estimator, loss, batches=torch.arange(1, STEPS + 1))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_what_a_loss_makes_for_itself_is_not(estimator: Any) -> None:
    def loss(w: Tensor) -> Tensor:
        own = torch.ones(2, dtype=torch.float64, requires_grad=True)
        return (w * own).square().sum() * (2 * own).mean()

    torch.testing.assert_close(solved(estimator, loss), solved(estimator, lambda w: 2 * w.square().sum()))


def test_the_quick_look_tells_what_is_given_from_what_is_not() -> None:
    given, other = made("leaf"), made("leaf")
    root = (given * 2).exp()

    def ends(output: Tensor, nodes: list[Any], leaves: set[int]) -> bool:
        return autograd_graph.ends_in_given(output.grad_fn, nodes, leaves)

    assert ends(given.sin() + given, [], {id(given)})
    assert not ends(given.sin() + other, [], {id(given)})
    assert not ends(root * other, [root.grad_fn], set())
    assert ends(root.sin() * root, [root.grad_fn], set())
    assert not ends(root.sin() + given, [root.grad_fn], set())  # not through the root
    assert ends(root.detach() * given, [], {id(given)})
