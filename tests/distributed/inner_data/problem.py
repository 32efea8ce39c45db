"""A regression whose examples are spread over ranks, and the whole of it in one process."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from beside import numbers
from torch import Tensor, distributed

import diffopt
from diffopt.distributed import copied, summed

PER_RANK = 5
STEPS = 4


class Problem:
    """Robust regression: what all ranks share, what they hold apart, and the whole of it."""

    def __init__(self) -> None:
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        n = PER_RANK * self.world
        self.x, self.y, self.weights = numbers(n, 3, seed=1), numbers(n, seed=2), 1 + 0.1 * numbers(n, seed=3)
        self.own = slice(PER_RANK * self.rank, PER_RANK * (self.rank + 1))
        self.start = {"w": numbers(3, seed=4), "b": numbers(1, seed=5)}
        self.penalty, self.lr = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.05, dtype=torch.float64)

    def loss(self, params: Any, weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The terms of some examples, summed."""
        return (weights * (x @ params["w"] + params["b"] - y).square().add(1).log()).sum()

    def whole(self, params: Any, weights: Tensor, penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
        norm = params["w"].pow(4).sum()
        return self.loss(params, weights, x, y) / len(self.x) + penalty.exp() * norm

    def shared(self, params: Any, weights: Tensor, penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The same, of a rank's own examples; the penalty, which all ranks know, is not summed."""
        norm = params["w"].pow(4).sum()
        return summed(self.loss(copied(params), weights, x, y) / len(self.x)) + penalty.exp() * norm

    def spread(self, params: Any, weights: Tensor, penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Again the same: of the penalty, too, every rank has its part."""
        params, penalty = copied((params, penalty))
        norm = params["w"].pow(4).sum() / self.world
        return summed(self.loss(params, weights, x, y) / len(self.x) + penalty.exp() * norm)

    def gradients(self, loss: Any, own: slice, **options: Any) -> list[Tensor]:
        """The hypergradients for the start, the weights of these examples, the penalty and the learning rate."""
        given = [self.start["w"], self.start["b"], self.weights[own], self.penalty, self.lr]
        w, b, weights, penalty, lr = given = [x.clone().requires_grad_() for x in given]
        solution = diffopt.solve(
            loss,
            {"w": w, "b": b},
            weights,
            penalty,
            self.x[own],
            self.y[own],
            optimizer=diffopt.SGD(lr, momentum=0.5),
            steps=STEPS,
            **options,
        )
        found = torch.autograd.grad(outer(solution.params), given, allow_unused=True)
        return [
            solution.losses.detach(),
            *(torch.zeros_like(x) if g is None else g for g, x in zip(found, given, strict=True)),
        ]

    def expected(self, **options: Any) -> list[Tensor]:
        found = self.gradients(self.whole, slice(None), **options)
        return [*found[:3], found[3][self.own], *found[4:]]


def outer(params: Any) -> Tensor:
    return params["w"].pow(3).sum() + params["b"].cos().sum()


def gradient_of(loss: Any, start: Tensor, data: Tensor, objective: Any = None, **options: Any) -> Tensor:
    """The hypergradient of the initial params, after three steps."""
    w = start.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its collectives, which are heard all the same
        solution = diffopt.solve(loss, w, data, optimizer=diffopt.SGD(0.1), steps=3, **options)
        (found,) = torch.autograd.grad((objective or (lambda w: w.pow(3).sum()))(solution.params), w)
    return found


def local(w: Tensor, x: Tensor) -> Tensor:
    return (x @ w - 1).square().add(1).log().mean()
