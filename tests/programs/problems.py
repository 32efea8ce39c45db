"""The problems that the programs share, small and in the default precision, with loops that autograd records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from oracles import adam_step, sgd_step
from programs.table import leaves
from torch import Tensor, nn

import diffopt

Params = dict[str, Tensor]


def grad(value: Tensor, *inputs: Any) -> list[Tensor]:
    """Derivatives of a scalar by all tensors in trees."""
    return list(torch.autograd.grad(value, leaves(inputs), materialize_grads=True))


def learned(*numbers: float) -> Tensor:
    """A tensor that is to be learned: a scalar, or a vector of more than one."""
    return torch.tensor(numbers[0] if len(numbers) == 1 else numbers).requires_grad_()


class Fit:
    """A network that is fitted to weighted examples, and judged on others; of the second layer's bias none is left."""

    def __init__(self, steps: int = 5) -> None:
        torch.manual_seed(0)
        self.steps = steps
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.x, self.y, self.query_x, self.query_y = torch.randn(4, 6, 3).unbind()
        self.y, self.query_y = self.y[:, :2], self.query_y[:, :2].sin()
        self.batches = {"x": torch.randn(steps, 5, 3), "y": torch.randn(steps, 5, 2)}
        self.function, self.params = diffopt.functional(self.net)
        self.weights = torch.linspace(0.5, 1.5, 6).requires_grad_()

    def weighted(self, out: Tensor, weights: Tensor) -> Tensor:
        """The inner loss of a prediction."""
        return (weights * (out - self.y).square().sum(1)).mean()

    def loss(self, params: Params, weights: Tensor) -> Tensor:
        """The inner loss of parameters."""
        return self.weighted(self.function(params, self.x), weights)

    def batch_loss(self, params: Params, batch: Params) -> Tensor:
        """That of a batch."""
        return (self.function(params, batch["x"]) - batch["y"]).square().mean()

    def judged(self, out: Tensor) -> Tensor:
        """The outer loss of a prediction."""
        return (out - self.query_y).square().mean()

    def outer(self, params: Params) -> Tensor:
        """The outer loss of parameters."""
        return self.judged(self.function(params, self.query_x))


def loop(
    loss: Callable[..., Tensor],
    params: Any,
    steps: int,
    step: Callable[..., Tensor] = sgd_step,
    each: Callable[[Any, int, Tensor], None] | None = None,
    buffers: list[dict[str, Tensor]] | None = None,
    start: int = 0,
    clip: Callable[[Sequence[Tensor]], Sequence[Tensor]] = lambda grads: grads,
    **options: Any,
) -> Any:
    """A loop that autograd records: ``loss(params, t)``; options may be functions of the leaf's place and the step."""
    named = params if isinstance(params, dict) else {"": params}

    def given(now: list[Tensor]) -> Any:
        return dict(zip(named, now, strict=True)) if named is params else now[0]

    now, buffers = list(named.values()), [{} for _ in named] if buffers is None else buffers
    for t in range(start, start + steps):
        now = [x.view_as(x) for x in now]  # a gradient by these alone, not by what else was made of them
        value = loss(given(now), t)
        grads = clip(torch.autograd.grad(value, now, create_graph=True))
        now = [
            step(p, g, b, t + 1, **{name: x(i, t) if callable(x) else x for name, x in options.items()})
            for i, (p, g, b) in enumerate(zip(now, grads, buffers, strict=True))
        ]
        if each is not None:
            each(given(now), t, value)
    return given(now)


def adam_loop(*given: Any, **options: Any) -> Any:
    """The same with Adam."""
    return loop(*given, step=adam_step, **options)


class Ridge:
    """Squares with one penalty for each weight: the minimiser is the solution of a linear system."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x, self.query_x = (torch.randn(n, 4, generator=generator) for n in (12, 9))
        self.y, self.query_y = (torch.randn(n, generator=generator) for n in (12, 9))
        self.penalty = learned(0.2, 0.5, 0.3, 0.7)

    def loss(self, w: Tensor, penalty: Tensor) -> Tensor:
        """The inner loss."""
        return (self.x @ w - self.y).square().mean() / 2 + (penalty * w.square()).sum() / 2

    def gram(self, penalty: Tensor) -> Tensor:
        """Its Hessian."""
        return self.x.T @ self.x / 12 + torch.diag(penalty)

    def minimiser(self, penalty: Tensor) -> Tensor:
        """Where it is smallest, through ``torch.linalg``."""
        return torch.linalg.solve(self.gram(penalty), self.x.T @ self.y / 12)

    def outer(self, w: Tensor) -> Tensor:
        """The loss on other data."""
        return (self.query_x @ w - self.query_y).square().mean()

    def answer(self) -> list[Tensor]:
        """The hypergradient, through the minimiser's formula."""
        return grad(self.outer(self.minimiser(self.penalty)), self.penalty)


def newton(gradient: Callable[[Tensor], Tensor], w: Tensor, steps: int = 30) -> Tensor:
    """A root found by Newton's method: stands for whatever finds solutions."""
    w = w.detach()
    for _ in range(steps):
        w = w - torch.linalg.solve(torch.func.jacrev(gradient)(w).detach(), gradient(w).detach())
    return w


def implicit_function(field: Callable[..., Tensor], root: Tensor, theta: Tensor, outer: Tensor) -> list[Tensor]:
    """The implicit function theorem in full matrices: derivative of ``outer`` (by the root: its gradient) by theta."""
    by_root, by_theta = torch.func.jacrev(field, (0, 1))(root.detach(), theta.detach())
    return [-(torch.linalg.solve(by_root.T, outer.detach()) @ by_theta.reshape(len(root), -1)).reshape(theta.shape)]
