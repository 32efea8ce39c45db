"""Losses of more steps than are written at a time, and of solves that end early, against a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import diffopt
from diffopt.estimators import FirstOrder, Reverse

ESTIMATORS: list[Any] = [Reverse("graph"), Reverse(1), Reverse("sqrt")]
LR = 0.1


def bowl(w: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (w - target).square().sum()


def by_hand(w: Tensor, target: Tensor, steps: int) -> Tensor:
    losses = []
    for _ in range(steps):
        losses.append(bowl(w, target))
        w = w - LR * (w - target)
    return torch.stack(losses) if losses else w.new_empty(0)


def start() -> tuple[Tensor, Tensor]:
    w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    return w, torch.tensor([0.5, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("steps", [1, 15, 16, 17, 40])
def test_losses_and_their_gradient_are_those_of_a_loop(steps: int, estimator: Any) -> None:
    w, target = start()
    found = diffopt.solve(bowl, w, target, optimizer=diffopt.SGD(LR), steps=steps, estimator=estimator).losses
    expected, weights = by_hand(w, target, steps), torch.arange(1.0, steps + 1, dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((weights * losses).sum(), w)[0] for losses in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("last", [1, 16, 17, 31, 32, 33])
def test_losses_up_to_an_early_end(last: int, estimator: Any) -> None:
    w, target = start()
    options = {
        "optimizer": diffopt.SGD(LR),
        "steps": 40,
        "estimator": estimator,
        "on_step": lambda step, loss: step == last,
    }
    found = diffopt.solve(bowl, w, target, **options)
    assert found.steps == last
    torch.testing.assert_close(found.losses, by_hand(w, target, last))


@pytest.mark.parametrize("last", [0, 1, 16, 20, 32])
def test_losses_up_to_a_tolerance(last: int) -> None:
    w, target = start()
    norm = float((w - target).detach().norm()) * (1 - LR) ** last
    found = diffopt.solve(bowl, w, target, optimizer=diffopt.SGD(LR), steps=40, tol=1.01 * norm)
    assert found.steps == last
    torch.testing.assert_close(found.losses, by_hand(w, target, last))


@pytest.mark.parametrize("steps", [5, 20, 33])
def test_losses_of_tasks(steps: int) -> None:
    w, target = start()
    targets = target + torch.arange(3.0, dtype=torch.float64)[:, None]

    def losses(target: Tensor) -> Tensor:
        return diffopt.solve(
            bowl, w, target, optimizer=diffopt.SGD(LR), steps=steps, estimator=FirstOrder()
        ).losses.detach()

    expected = torch.stack([by_hand(w, target, steps) for target in targets])
    torch.testing.assert_close(vmap(losses)(targets), expected)


@pytest.mark.parametrize("late", [5, 16, 17, 18, 35])
def test_losses_that_become_wider_are_not_rounded(late: int) -> None:
    w, target = (x.detach().float() for x in start())
    seen = 0

    def loss(w: Tensor, target: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        return bowl(w, target).double() + 1e-12 if seen >= late else bowl(w, target)

    found = diffopt.solve(loss, w, target, optimizer=diffopt.SGD(LR), steps=40, check=False).losses
    assert found.dtype == torch.float64
    small = found[late - 1 :] - found[late - 1 :].float().double()  # what single precision has no room for
    assert bool((small != 0).all())
