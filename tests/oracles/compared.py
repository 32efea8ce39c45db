"""The small problem that the tests of ``compare`` run."""

from __future__ import annotations

import torch

import diffopt
from diffopt.tasks import Quadratic

STEPS = 4


def quadratic_problem():
    """Descent on a quadratic: a function of an estimator, with its solve, its quadratic and its closed form."""
    quadratic = Quadratic.random(5, definite=True, generator=torch.Generator().manual_seed(1))
    initial = torch.ones(5, dtype=torch.float64, requires_grad=True)
    linear = torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()

    def solve(estimator, start=initial, lr=0.5):
        optimizer = diffopt.SGD(lr)
        return diffopt.solve(quadratic.loss, start, linear, optimizer=optimizer, steps=STEPS, estimator=estimator)

    def run(estimator):
        return quadratic.outer_loss(solve(estimator).params)

    run.solve = solve
    run.quadratic, run.closed = quadratic, quadratic.hypergradient(initial.detach(), linear.detach(), 0.5, STEPS)
    return run
