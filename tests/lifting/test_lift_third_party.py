"""Optimizer classes as other people write them: which ways of writing a step lift, and what is noticed late."""

from __future__ import annotations

import pytest
import torch
from lifted import SHAPES, Doing, off_by, tensors, trained, wavy
from oracles import relative_error

import diffopt
from diffopt import LiftError, from_torch
from diffopt.estimators import ForwardMode, Reverse, Unrolled


class Ordinary(torch.optim.Optimizer):
    """A third-party Adam with decoupled decay, in the style of most of them."""

    def __init__(self, params, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0):
        if lr < 0:
            raise ValueError(f"negative lr {lr}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad, state = p.grad.data, self.state[p]
                if len(state) == 0:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p.data)
                    state["exp_avg_sq"] = torch.zeros_like(p.data)
                    state["previous"] = p.detach().clone()
                mean, square = state["exp_avg"], state["exp_avg_sq"]
                beta1, beta2 = group["betas"]
                state["step"] += 1
                mean.mul_(beta1).add_(grad, alpha=1 - beta1)
                square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                denom = square.sqrt().add_(group["eps"])
                size = group["lr"] * (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
                if group["weight_decay"] != 0:
                    p.data.mul_(1 - group["lr"] * group["weight_decay"])
                inertia = p.data - state["previous"]
                state["previous"].copy_(p.data)
                p.data.addcdiv_(mean, denom, value=-size)
                p.data = p.data.add(inertia, alpha=0.1)


def ordinary_by_hand(start, target, lr, beta1, decay, steps):
    now, previous = list(start), list(start)
    mean, square = [0.0] * len(now), [0.0] * len(now)
    for t in range(1, steps + 1):
        grads = torch.autograd.grad(wavy(now, target), now, create_graph=True)
        for i, (p, g) in enumerate(zip(list(now), grads, strict=True)):
            mean[i] = beta1 * mean[i] + (1 - beta1) * g
            square[i] = 0.99 * square[i] + 0.01 * g**2
            p = p * (1 - lr * decay)
            inertia, previous[i] = p - previous[i], p
            scale = lr * (1 - 0.99**t) ** 0.5 / (1 - beta1**t)
            now[i] = p - scale * mean[i] / (square[i].sqrt() + 0.05) + 0.1 * inertia
    return now


@pytest.mark.parametrize("rule", [Reverse("graph"), Reverse(1), Unrolled(), ForwardMode()], ids=str)
def test_a_class_written_by_someone_else(rule):
    start = [p.requires_grad_() for p in tensors(SHAPES, 0)]
    target, lr, beta1, decay = leaves = [
        torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, 0.1, 0.8, 0.0)
    ]
    optimizer = from_torch(Ordinary, lr=lr, betas=(beta1, 0.99), eps=0.05, weight_decay=decay)
    solution = diffopt.solve(wavy, start, target, optimizer=optimizer, steps=6, estimator=rule)
    expected = ordinary_by_hand(start, target, lr, beta1, decay, 6)
    assert relative_error(solution.params, expected) < 1e-12
    got, reference = (
        torch.autograd.grad(sum(p.square().sum() for p in x), [*start, *leaves]) for x in (solution.params, expected)
    )
    assert relative_error(got, reference) < 1e-11


class ChangesLater(Doing):
    def one(self, p, g, state, group):
        state["n"] = state.get("n", 0) + 1
        if state["n"] == 12:
            getattr(self, group["where"])(p, state, group)
        p.sub_(group["lr"] * g)

    def makes_state(self, p, state, group):
        state["slow"] = p.clone()

    def changes_its_group(self, p, state, group):
        group["lr"] = group["lr"] * 0.1

    def changes_an_attribute(self, p, state, group):
        self.warm = True

    def __init__(self, params, lr=0.1, where="makes_state"):
        super().__init__(params, lr)
        self.param_groups[0]["where"] = where


LATE = [("makes_state", "slow"), ("changes_its_group", "lr"), ("changes_an_attribute", "warm")]


@pytest.mark.parametrize(("where", "what"), LATE)
def test_what_changes_only_after_the_check_is_refused_when_it_does(where, what):
    optimizer = from_torch(ChangesLater, where=where)
    run = lambda steps: diffopt.solve(lambda w: w.square().sum(), torch.ones(2), optimizer=optimizer, steps=steps)  # noqa: E731
    run(11)
    with pytest.raises(LiftError, match=f"'{what}' only some steps after its first"):
        run(12)


class CountsToTen(Doing):
    """Its count of the steps starts anew after ten of them, when the check is over."""

    def one(self, p, g, state, group):
        if "n" not in state or state["n"] == 10:
            state["n"] = torch.zeros((), dtype=p.dtype)
        state["n"] += 1
        p.sub_(group["lr"] * g / state["n"])


class DoublesAnInteger(Doing):
    """It keeps an integer tensor, the same in all steps of the check."""

    def one(self, p, g, state, group):
        state["n"] = state.get("n", 0) + 1
        state.setdefault("slower", torch.tensor(1))
        if state["n"] == 11:
            state["slower"].mul_(2)
        p.sub_(group["lr"] * g / state["slower"])


@pytest.mark.parametrize(("kind", "what"), [(CountsToTen, "n"), (DoublesAnInteger, "slower")])
def test_a_count_or_a_constant_that_is_none_later_is_refused_when_it_shows(kind, what):
    start, target = tensors(SHAPES, 0), torch.tensor(0.7, dtype=torch.float64)
    run = lambda steps: diffopt.solve(wavy, start, target, optimizer=from_torch(kind), steps=steps)  # noqa: E731
    assert relative_error(run(10).params, trained(kind, {}, start, target, 10)) < 1e-12
    with pytest.raises(LiftError, match=f"changes '{what}' only some steps after its first"):
        run(11)


class NoGradInside(Doing):
    def one(self, p, g, state, group):
        with torch.no_grad():
            move = g * group["lr"]
        p.data[...] = p.data - move


class ClipsByItsNorm(Doing):
    def one(self, p, g, state, group):
        torch.nn.utils.clip_grad_norm_([p], 0.5)
        p.sub_(group["lr"] * p.grad)


class DecaysAnOptionOfItsGroup(Doing):
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            group["factor"] = group["factor"] * 0.8
            group["k"] = group.get("k", 0) + 1

    def one(self, p, g, state, group):
        p.sub_(group["lr"] * group["factor"] * g / (1 + group.get("k", 0)))


class AveragesInPlace(Doing):
    def one(self, p, g, state, group):
        if "slow" not in state:
            state["slow"], state["scale"], state["on"] = p.clone(), 1.0, True
        p -= group["lr"] * g * state["scale"]
        state["scale"] = state["scale"] * 0.9
        state["slow"].lerp_(p, 0.5)
        p.copy_(state["slow"])


class MixesLeavesByItem(Doing):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            norm = torch.stack([p.grad.square().sum() for p in group["params"]]).sum().sqrt().item()
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"] / (1 + norm))


LIFTABLE = [NoGradInside, ClipsByItsNorm, DecaysAnOptionOfItsGroup, AveragesInPlace, MixesLeavesByItem]


@pytest.mark.parametrize("kind", LIFTABLE, ids=lambda kind: kind.__name__)
def test_ways_of_writing_a_step_that_lift(kind):
    start, target = tensors(SHAPES, 0), torch.tensor(0.7, dtype=torch.float64)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    solution = diffopt.solve(wavy, start, target, optimizer=from_torch(kind, lr=lr), steps=12)
    assert relative_error(solution.params, trained(kind, {"lr": 0.1}, start, target, 12)) < 1e-12

    def outer(final):
        return torch.stack([p.square().sum() for p in final]).sum()

    (got,) = torch.autograd.grad(outer(solution.params), lr)
    assert off_by(lambda x: float(outer(trained(kind, {"lr": 0.1 + x}, start, target, 12))), float(got)) < 1e-7


class KeepsAScalar(Doing):
    def one(self, p, g, state, group):
        if "scale" not in state:
            state["scale"] = torch.ones((), dtype=p.dtype)
        state["scale"].mul_(1 - group["lr"])
        p.sub_(group["lr"] * state["scale"] * g)


def test_an_option_for_each_coordinate_that_does_not_fit_the_state():
    optimizer = from_torch(KeepsAScalar, lr={"a": torch.full((2, 3), 0.1)})
    with pytest.raises(LiftError, match=r"in place into one of shape \(2, 3\), expected its own shape \(\)"):
        diffopt.solve(lambda p: p["a"].square().sum(), {"a": torch.ones(2, 3)}, optimizer=optimizer, steps=2)
