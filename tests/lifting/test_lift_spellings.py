"""Torch takes an argument under several names, and in old orders: a lifted step may use all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import diffopt
from diffopt import LiftError, from_torch

Rule: Any = Callable[[Tensor, Tensor, dict[str, Tensor], Any, Any], Any]


def optimizer_class(rule: Any) -> Any:
    """An optimizer class whose step is ``rule(p, grad, state, lr, beta)``."""

    class Spelled(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9) -> None:
            super().__init__(params, {"lr": lr, "beta": beta})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    if not state:
                        state["mean"] = torch.full_like(input=p, fill_value=0.5)
                        state["square"] = torch.zeros_like(p)
                    rule(p, p.grad, state, group["lr"], group["beta"])

    return Spelled


def adam_like(p: Tensor, g: Tensor, s: dict[str, Tensor], lr: Any, beta: Any) -> None:
    s["square"].mul_(other=beta).addcmul_(tensor1=g, tensor2=g, value=1 - beta)
    p.addcdiv_(tensor1=g, tensor2=s["square"].sqrt().add_(other=1e-3), value=-lr)


def in_old_orders(p: Tensor, g: Tensor, s: dict[str, Tensor], lr: Any, beta: Any) -> None:
    s["square"].mul_(beta).addcmul_(1 - beta, g, g)
    p.addcdiv_(-lr, g, s["square"].sqrt().add_(1e-3))
    p.sub_(lr, g).add_(-lr, g)


def averaged(p: Tensor, g: Tensor, s: dict[str, Tensor], lr: Any, beta: Any) -> None:
    s["mean"].lerp_(end=g, weight=1 - beta)
    s["square"].copy_(torch.lerp(input=s["square"], end=g, weight=1 - beta))
    p.subtract_(other=s["mean"], alpha=lr).sub_(other=s["square"], alpha=lr)


def powers(p: Tensor, g: Tensor, s: dict[str, Tensor], lr: Any, beta: Any) -> None:
    s["square"].mul_(beta).add_(torch.pow(input=g, exponent=2), alpha=1 - beta)
    p.sub_(g / (s["square"].pow(exponent=0.5) + 1e-3) * lr)
    p.sub_(torch.pow(self=2.0, exponent=-g.abs()) * g * lr)
    p.sub_(lr * g / torch.sqrt(input=g * g + 1))


def clamped(p: Tensor, g: Tensor, s: dict[str, Tensor], lr: Any, beta: Any) -> None:
    s["mean"].fill_(value=0.0).add_(other=g)
    p.sub_(torch.clamp(input=s["mean"], min=-3.0, max=3.0).clip(max=2.5) * lr)


def out_of_place(p: Tensor, g: Tensor, s: dict[str, Tensor], lr: Any, beta: Any) -> None:
    p.copy_(other=torch.sub(input=p, other=g, alpha=lr))
    p.copy_(torch.add(x1=p, x2=torch.clone(input=g, memory_format=torch.preserve_format), alpha=-lr))
    p.copy_(torch.rsub(input=g, other=p, alpha=lr))
    torch.add(input=p, other=g, alpha=-lr, out=p)


RULES = [adam_like, in_old_orders, averaged, powers, clamped, out_of_place]


@pytest.mark.filterwarnings("ignore:This overload")
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_step_in_any_spelling_is_the_class_itself(rule: Any, learned: bool) -> None:
    kind, start = optimizer_class(rule), torch.tensor([1.0, 2.0], dtype=torch.float64)
    lr = torch.tensor(0.03, dtype=torch.float64, requires_grad=True) if learned else 0.03

    def final(rate: float) -> Tensor:
        p = torch.nn.Parameter(start.clone())
        optimizer = kind([p], lr=rate)
        for _ in range(3):
            optimizer.zero_grad()
            p.square().sum().backward()
            optimizer.step()
        return p.detach()

    got = diffopt.solve(lambda w: w.square().sum(), start, optimizer=from_torch(kind, lr=lr), steps=3).params
    torch.testing.assert_close(got, final(0.03), rtol=1e-6 if learned else 1e-11, atol=0)
    if learned:
        (slope,) = torch.autograd.grad(got.sum(), lr)
        torch.testing.assert_close(slope, (final(0.03001) - final(0.02999)).sum() / 2e-5, rtol=1e-4, atol=1e-6)


def test_an_argument_that_torch_does_not_have_is_refused() -> None:
    def unknown(p: Tensor, g: Tensor, s: Any, lr: Any, beta: Any) -> None:
        p.add_(g, gamma=-lr)

    with pytest.raises(LiftError, match="cannot be lifted: its step"):
        from_torch(optimizer_class(unknown))
