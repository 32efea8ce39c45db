"""A small inner problem with its plain loop: penalised regression by momentum, every derivative by plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from estimator_names import exact
from torch import Tensor

import diffopt
from diffopt.estimators import Truncated

STEPS, MOMENTUM = 4, 0.6
Loss = Callable[..., Tensor]
EXACT: dict[str, Any] = {
    **exact(STEPS, "default", "graph", "states", "every third", "sqrt", "offloaded", "forward", "forward in chunks"),
    **exact(STEPS, "truncated at all", "binomial of all", "krylov of all", "window of one", "unrolled"),
    "truncated in states": Truncated(STEPS, 1),
}
"""What is exact on so many steps."""


def data() -> tuple[Tensor, Tensor]:
    """Inputs and targets."""
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(size, dtype=torch.float64, generator=generator) for size in ((6, 3), (6,)))
    return x, y


X, Y = data()


def loss(w: Tensor, penalty: Tensor) -> Tensor:
    """Squared errors of a bent model, with a learned penalty."""
    return (torch.tanh(X @ w) - Y).square().mean() + penalty * w.pow(4).sum()


def leaves() -> list[Tensor]:
    """What is learned: the start, the penalty, the learning rate."""
    start = torch.tensor([0.4, -0.3, 0.8], dtype=torch.float64)
    return [x.requires_grad_() for x in (start, start.new_tensor(0.3), start.new_tensor(0.2))]


def outer(w: Tensor) -> Tensor:
    """The loss of a solution."""
    return (w**3).sum() + w.square().sum()


def loop(w: Tensor, penalty: Any, lr: Tensor, of: Loss = loss, steps: int = STEPS) -> Tensor:
    """The final params by plain steps that autograd records."""
    velocity = torch.zeros_like(w)
    for _ in range(steps):
        w = w if w.requires_grad else w.detach().requires_grad_()
        velocity = MOMENTUM * velocity + torch.autograd.grad(of(w, penalty), w, create_graph=True)[0]
        w = w - lr * velocity
    return w


def solved(w: Tensor, penalty: Any, lr: Tensor, of: Loss = loss, **options: Any) -> Tensor:
    """The final params by the library."""
    given = {"optimizer": diffopt.SGD(lr, momentum=MOMENTUM), "steps": STEPS, **options}
    return diffopt.solve(of, w, penalty, **given).params


def wanted(inputs: Sequence[Tensor] | None = None, of: Loss = loss) -> tuple[Tensor, ...]:
    """The plain loop's hypergradient."""
    inputs = leaves() if inputs is None else inputs
    return torch.autograd.grad(outer(loop(*inputs, of=of)), inputs)


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor], rtol: float = 1e-10) -> None:
    """To the rounding of a few steps in double precision, relative to the largest number."""
    for one, other in zip(got, expected, strict=True):
        scale = max(float(other.detach().abs().max()), 1e-6)
        torch.testing.assert_close(one.detach(), other.detach(), rtol=0, atol=rtol * scale)
