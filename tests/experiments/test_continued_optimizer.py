"""An optimizer that goes on from another run: solves in a chain are one."""

from __future__ import annotations

import pytest
import torch
from oracles import relative_error

from diffopt import SGD, Adam, solve
from diffopt.estimators import MultiStep, Reverse
from diffopt.experiments.framework.continued_optimizer import Continued


def loss(params, slope):
    return (slope * params["a"]).sin().sum() + (params["b"] * slope.sum()).square().sum() / 8


@pytest.fixture
def start():
    values = torch.linspace(-1, 1, 5, dtype=torch.float64)
    return {"a": values[:3], "b": values[3:]}


@pytest.mark.parametrize("optimizer", [SGD(0.1), SGD(0.1, momentum=0.9, weight_decay=0.01), Adam(0.1, amsgrad=True)])
@pytest.mark.parametrize("rule", [Reverse(), MultiStep(2)])
def test_solves_in_a_chain_are_one(start, optimizer, rule):
    """Seven steps, and four and then three: solutions and hypergradients; windows of two divide the four."""
    slope = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    whole, first = (solve(loss, start, slope, optimizer=optimizer, steps=n, estimator=rule) for n in (7, 4))
    going_on = Continued(optimizer, first.state.buffers, 4)
    second = solve(loss, first.params, slope, optimizer=going_on, steps=3, estimator=rule)
    torch.testing.assert_close(second.params, whole.params, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(second.state.buffers, whole.state.buffers, rtol=1e-12, atol=1e-13)
    chained, plain = (torch.autograd.grad(found.params["a"].square().sum(), slope) for found in (second, whole))
    assert plain[0].norm() > 0.01
    assert relative_error(chained, plain) < 1e-11  # rounding in seven steps


def test_the_velocity_that_came_in_moves_what_has_no_slope(start):
    kept = {"velocity": {name: torch.ones_like(x) for name, x in start.items()}}
    going_on = Continued(SGD(0.5, momentum=0.9), kept, 4)
    moved = solve(lambda params: params["a"].sum(), start, optimizer=going_on, steps=1)
    torch.testing.assert_close(moved.params["b"], start["b"] - 0.45, rtol=1e-12, atol=0)
