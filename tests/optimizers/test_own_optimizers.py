"""Optimizers that a user might write: that mix coordinates, hold networks, name their numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from oracles import relative_error
from stateless import Stateless

import diffopt
from diffopt import Leaves, Schedule
from diffopt.estimators import ForwardMode, Reverse, Unrolled
from diffopt.optimizers.base import EACH, TREE


@dataclass(frozen=True)
class NormalisedDescent(diffopt.Optimizer):
    """A user's optimizer that mixes coordinates: the gradient's norm over all leaves."""

    lr: Any

    def init(self, params):
        return {"count": Leaves([torch.zeros((), dtype=params[0].dtype)])}

    def update(self, params, grads, buffers, step):
        norm = sum(g.square().sum() for g in grads).sqrt()
        return params - self.lr * grads.map(lambda g: g / (1 + norm)), {"count": buffers["count"] + 1}


@pytest.mark.parametrize("estimator", [Reverse("graph"), Reverse(1), Unrolled(), ForwardMode()], ids=str)
def test_a_users_optimizer_is_right_under_vmap_even_if_it_mixes_coordinates(estimator):
    lr = torch.tensor([0.1, 0.3], dtype=torch.float64, requires_grad=True)
    start = {"a": torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64), "b": torch.ones(2, dtype=torch.float64)}

    def loss(p):
        return p["a"].square().sum() + (p["a"].sum() * p["b"]).sin()

    def run(p, lr):
        solution = diffopt.solve(loss, p, optimizer=NormalisedDescent(lr), steps=3, estimator=estimator)
        return solution.params["a"].square().sum() + solution.params["b"] + 0 * solution.state.buffers["count"][0]

    (got,) = torch.autograd.grad(torch.func.vmap(run)(start, lr).sum(), lr)
    total = 0.0
    for i in range(2):
        a, b = start["a"][i], start["b"][i]
        for _ in range(3):
            a, b = (x if x.requires_grad else x.detach().requires_grad_() for x in (a, b))
            ga, gb = torch.autograd.grad(loss({"a": a, "b": b}), (a, b), create_graph=True)
            norm = (ga.square().sum() + gb.square()).sqrt()
            a, b = a - lr[i] * ga / (1 + norm), b - lr[i] * gb / (1 + norm)
        total = total + a.square().sum() + b
    assert relative_error([got], torch.autograd.grad(total, [lr])) < 1e-12


@dataclass(frozen=True)
class Learned(Stateless):
    """A learned optimizer: a small network applied to every coordinate; it claims to be elementwise, which it is."""

    weights: Any = field(metadata=TREE)
    elementwise = True

    def update(self, params, grads, buffers, step):
        first, second = self.weights
        return params - grads.map(lambda g: (torch.tanh(g[..., None] * first) @ second)[..., 0]), buffers


def test_the_weights_of_a_learned_optimizer_may_differ_from_task_to_task():
    generator = torch.Generator().manual_seed(8)
    weights = [torch.randn(3, *s, generator=generator, dtype=torch.float64) for s in [(3,), (3, 1)]]
    w = torch.randn(3, 2, generator=generator, dtype=torch.float64)

    def run(*weights):
        return diffopt.solve(lambda w: w.pow(4).sum(), w, optimizer=Learned(list(weights)), steps=2).params.sum()

    got = torch.func.vmap(torch.func.grad(run, argnums=(0, 1)))(*weights)
    for i in range(3):
        leaves = [x[i].clone().requires_grad_() for x in weights]
        now = w
        for _ in range(2):
            now = now if now.requires_grad else now.detach().requires_grad_()
            (g,) = torch.autograd.grad(now.pow(4).sum(), now, create_graph=True)
            now = now - (torch.tanh(g[..., None] * leaves[0]) @ leaves[1])[..., 0]
        assert relative_error([g[i] for g in got], torch.autograd.grad(now.sum(), leaves)) < 1e-12


@dataclass(frozen=True)
class Named(Stateless):
    """Gradient descent with its rates in a dictionary."""

    rates: dict[str, Any] = field(metadata=EACH)
    elementwise = True

    def update(self, params, grads, buffers, step):
        return params - self.rates["slow"] * grads - self.rates["fast"] * grads, buffers


def test_hyperparameters_in_a_dictionary_are_named_by_their_keys():
    fast = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    w = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for slow, expected in [(0.05, 1 - 0.15 * 2), (Schedule([0.2]), 1 - 0.3 * 2)]:
        optimizer = Named({"slow": slow, "fast": fast})
        end = diffopt.solve(lambda w: w.square().sum(), w, optimizer=optimizer, steps=1).params
        assert torch.allclose(end, w * expected, rtol=1e-12)
        assert float(torch.autograd.grad(end.sum(), fast)[0]) == -6.0
    with pytest.raises(diffopt.ShapeError, match=r"^fast has shape \(3,\)"):
        diffopt.solve(lambda w: w.sum(), w, optimizer=Named({"slow": 0.1, "fast": torch.ones(3).double()}), steps=1)
    end = diffopt.solve(lambda w: w.sum(), w, optimizer=Named({"slow": 0.1, "fast": 0.1}), steps=1).params
    assert end[0] == pytest.approx(0.8)
