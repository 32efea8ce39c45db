"""Inner problems whose minimiser and its hypergradient are known by dense linear algebra."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

from diffopt.linear_solve import ConjugateGradient
from diffopt.tasks import Ridge

SIZE = 5
EXACT = ConjugateGradient(rtol=1e-13)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


RIDGE = Ridge.random(20, SIZE, generator=torch.Generator().manual_seed(1))
PENALTIES = 0.3 * normal(2, 3, SIZE)
# A curved, strongly convex inner problem: logistic regression with one penalty per weight.
INPUTS, TARGET, START = normal(3, 12, SIZE), normal(4, SIZE), normal(5, SIZE)
THETA = 0.3 * normal(6, SIZE) - 0.5


def logistic(w: Tensor, theta: Tensor, inputs: Tensor = INPUTS) -> Tensor:
    return torch.nn.functional.softplus(inputs @ w).mean() + (theta.exp() * w.square()).sum() / 2


def outer(w: Tensor) -> Tensor:
    return (w - TARGET).square().sum() / 2


def newton(loss, w: Tensor, *args: Tensor) -> Tensor:
    for _ in range(12):
        slope = jacobian(lambda w: loss(w, *args), w)
        w = w - torch.linalg.solve(hessian(lambda w: loss(w, *args), w), slope)
    return w


def expected(loss, *args: Tensor) -> list[Tensor]:
    """The minimiser's hypergradients under ``outer``, by dense linear algebra."""
    w = newton(loss, torch.zeros(SIZE, dtype=torch.float64), *args)
    multiplier = torch.linalg.solve(hessian(lambda w: loss(w, *args), w), w - TARGET)

    def slope(*args):
        at = leaf(w)
        return torch.autograd.grad(loss(at, *args), at, create_graph=True)[0]

    mixed = jacobian(slope, args)
    return [-(multiplier @ m.reshape(SIZE, -1)).reshape(x.shape) for m, x in zip(mixed, args, strict=True)]
