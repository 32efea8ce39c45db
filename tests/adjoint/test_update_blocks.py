"""Updates of every shape, taken apart.

Exact rules are compared with unrolling; those that read off the diagonals of an update with the same rules on the same
update where it is not said to be elementwise, which go through one graph per step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from oracles import relative_error
from stateless import Stateless
from torch import Tensor
from torch.func import vmap

import diffopt
from diffopt import Leaves
from diffopt.estimators import Binomial, Krylov, MultiStep, Reverse, Truncated, Unrolled


class Cube(torch.autograd.Function):
    """``x**3``, keeping what its derivative needs where a look at saved tensors does not find it."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.slope = 3 * inputs[0].detach() ** 2

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return cotangents[0] * ctx.slope

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        return Cube.apply(x), in_dims[0]


@dataclass(frozen=True)
class Rule(diffopt.Optimizer):
    """Momentum whose gradient is rescaled in a way that may look at the step's number, or be curved."""

    lr: Any
    kind: str

    def init(self, params: Leaves) -> dict[str, Leaves]:
        return {"velocity": params.zeros()}

    def update(self, params: Leaves, grads: Leaves, buffers: dict[str, Leaves], step: int) -> Any:
        scale = 1.0
        if self.kind == "list":
            scale = [0.0, 0.5, 1.0, 0.7, 0.3, 0.9, 1.0][step]
        elif self.kind == "modulo":
            scale = 0.5 if step % 2 else 1.0
        elif self.kind == "tensor":
            scale = float(torch.tensor(step) ** 0.5)
        elif self.kind == "min":
            scale = float(min(step, 3))
        push = scale * grads
        if self.kind == "branch":
            push = push.map(lambda x: torch.where(x > 0, x, x**2))
        elif self.kind == "function":
            push = push.map(lambda x: Cube.apply(x) + x)
        elif self.kind == "frozen" and step % 2:
            push = Leaves([push[0], *push[1:].zeros()])
        velocity = 0.5 * buffers["velocity"] + push
        return params - self.lr * velocity, {"velocity": velocity}


@dataclass(frozen=True)
class Elementwise(Rule):
    elementwise = True


KINDS = ["plain", "list", "modulo", "tensor", "min", "branch", "function", "frozen"]
STEPS = 6


def inner(params: dict[str, Tensor], a: Tensor, x: Tensor) -> Tensor:
    return ((torch.tanh(x @ params["w"]) + params["b"] - a) ** 2).mean() + 0.1 * (params["w"] ** 4).sum()


def hypergradient(optimizer: Any, rule: Any, tasks: int | None) -> list[Tensor]:
    """Of the start (one leaf of which the loss does not read), an argument and the learning rate."""
    g = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    params = {"w": draw(3).requires_grad_(), "b": draw(1).requires_grad_(), "unread": draw(2).requires_grad_()}
    a, x = draw(5).requires_grad_(), draw(5, 3)
    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)

    def outer(a: Tensor) -> Tensor:
        options = {"optimizer": replace(optimizer, lr=lr), "steps": STEPS, "estimator": rule}
        end = diffopt.solve(inner, params, a, x, **options).params
        return (end["w"] ** 2).sum() + end["b"].sin().sum() + (end["unread"] ** 3).sum()

    factors = torch.linspace(0.5, 1.5, tasks or 1, dtype=torch.float64)
    total = outer(a) if tasks is None else vmap(outer)(a * factors[:, None]).sum()
    return list(torch.autograd.grad(total, [*params.values(), a, lr]))


@pytest.mark.parametrize("tasks", [None, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_any_update_is_taken_apart_rightly(kind: str, tasks: int | None) -> None:
    optimizer, whole = Elementwise(0.0, kind), Rule(0.0, kind)
    expected = hypergradient(whole, Unrolled(), tasks)
    for rule in (Reverse("graph"), Reverse(1), Reverse(4), Truncated(STEPS), MultiStep(1)):
        assert relative_error(hypergradient(optimizer, rule, tasks), expected) < 1e-11, rule
    for rule in (Binomial(2), Binomial(5), Krylov(2), Krylov(5), Binomial(2, window=4), Binomial(3, chunk_size=2)):
        found = hypergradient(optimizer, rule, tasks)
        assert relative_error(found, hypergradient(whole, rule, tasks)) < 1e-11, rule


@dataclass(frozen=True)
class Linked(Stateless):
    """Gradient descent that computes one new leaf from another, or cuts it off."""

    lr: float
    cut_off: bool

    def update(self, params: Leaves, grads: Leaves, buffers: dict[str, Leaves], step: int) -> Any:
        first, second = params - self.lr * grads
        return Leaves([first, second.detach() if self.cut_off else second - first.mean()]), buffers


@pytest.mark.parametrize("cut_off", [False, True])
def test_the_gradient_of_a_leaf_is_not_that_of_another_computed_from_it(cut_off: bool) -> None:
    def loss(params: tuple[Tensor, Tensor], a: Tensor) -> Tensor:
        return ((params[0] * a).sum() - 1) ** 2 + (params[1] ** 4).sum() + (params[0][:2] * params[1]).sum()

    def hypergradients(rule: Any) -> list[Tensor]:
        g = torch.Generator().manual_seed(0)
        first, second, a = (torch.randn(n, generator=g, dtype=torch.float64).requires_grad_() for n in (3, 2, 3))
        solution = diffopt.solve(loss, (first, second), a, optimizer=Linked(0.05, cut_off), steps=STEPS, estimator=rule)
        end = sum((leaf**2).sum() for leaf in solution.params)
        return list(torch.autograd.grad(end, [first, second, a]))

    expected = hypergradients(Unrolled())
    for rule in (Reverse("graph"), Reverse(1), Reverse(4), Binomial(STEPS), MultiStep(1)):
        assert relative_error(hypergradients(rule), expected) < 1e-11, rule


def test_a_loss_that_changes_its_params_in_place_at_a_later_step_is_refused() -> None:
    def loss(w: Tensor, late: Tensor) -> Tensor:
        if bool(late):
            w.mul_(2.0)
        return (w**2).sum()

    late = torch.tensor([False, False, True, False])
    for rule in (Reverse("graph"), Reverse(1), Reverse(3)):
        options = {"optimizer": diffopt.SGD(0.1), "steps": 4, "batches": late, "estimator": rule}
        with pytest.raises(diffopt.InPlaceError, match="in place"):
            diffopt.solve(loss, torch.ones(2, requires_grad=True), **options).params.sum().backward()
