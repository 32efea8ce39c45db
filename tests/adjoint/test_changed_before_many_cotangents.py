"""What changes between a solve and a backward pass of many cotangents, which takes the steps again, is noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jacrev, vmap

import diffopt
from diffopt.errors import RandomnessError
from diffopt.estimators import Binomial, Reverse

START = torch.tensor([1.0, 0.5, -0.2], dtype=torch.float64)
TARGETS = torch.tensor([[0.3, -0.4, 0.5], [1.0, 0.2, 0.1]], dtype=torch.float64)
MATRIX = torch.tensor([[3.0, 0.2, 0.1], [0.2, 2.0, 0.4], [0.1, 0.4, 4.0]], dtype=torch.float64)


class Loss:
    """A loss that reads what the caller can change: a number, data, a module's mode."""

    def __init__(self) -> None:
        self.factor = 1.0
        self.data = MATRIX.clone()
        self.module = torch.nn.Identity().eval()

    def __call__(self, w: Tensor, target: Tensor) -> Tensor:
        penalty = w.sin().sum() if self.module.training else w.square().sum()
        return self.factor * ((w @ self.data - target) ** 2).sum() / 2 + 0.1 * penalty


CHANGES: dict[str, Any] = {
    "a number": lambda loss: setattr(loss, "factor", 2.0),
    "data": lambda loss: loss.data.mul_(1.5),
    "a module's mode": lambda loss: loss.module.train(),
}


def _solved(loss: Any, target: Tensor, estimator: Any) -> Any:
    return diffopt.solve(loss, START, target, optimizer=diffopt.SGD(0.02), steps=3, estimator=estimator).params


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("estimator", [Reverse(), Reverse(1), Binomial(1)], ids=repr)
@pytest.mark.parametrize("of_tasks", [False, True])
def test_a_loss_that_has_changed_is_refused(change: Any, estimator: Any, of_tasks: bool) -> None:
    loss = Loss()
    targets = (TARGETS if of_tasks else TARGETS[0]).clone().requires_grad_()
    solve = lambda target: _solved(loss, target, estimator)  # noqa: E731
    found = vmap(solve)(targets) if of_tasks else solve(targets)
    change(loss)
    directions = torch.eye(found.numel(), dtype=torch.float64).reshape(-1, *found.shape)
    with pytest.raises(RandomnessError, match="step 1 came out differently"):
        torch.autograd.grad(found, targets, directions, is_grads_batched=True)


def test_so_it_is_at_a_minimiser() -> None:
    loss = Loss()
    target = TARGETS[0].clone().requires_grad_()
    found = diffopt.implicit(lambda w, a: loss.factor * (w @ MATRIX @ w / 2 - a @ w), MATRIX.inverse() @ target, target)
    loss.factor = 2.0
    with pytest.raises(RandomnessError, match="step 1 came out differently"):
        torch.autograd.grad(found, target, torch.eye(3, dtype=torch.float64), is_grads_batched=True)


def test_one_that_has_not_changed_is_compared_task_by_task() -> None:
    """Two tasks, three cotangents: the losses of each task are those of its own, whichever vmap is around the other."""
    loss = Loss()
    jacobian = lambda target: jacrev(lambda a: _solved(loss, a, Reverse()))(target)  # noqa: E731
    alone = [torch.autograd.functional.jacobian(lambda a: _solved(loss, a, Reverse()), x) for x in TARGETS]
    expected = torch.stack(alone)
    whole = jacrev(lambda targets: vmap(lambda a: _solved(loss, a, Reverse()))(targets))(TARGETS)
    assert torch.allclose(vmap(jacobian)(TARGETS), expected, rtol=1e-12, atol=1e-14)
    assert torch.allclose(torch.stack([whole[i, :, i] for i in range(2)]), expected, rtol=1e-12, atol=1e-14)
