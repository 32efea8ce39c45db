"""An estimator of one's own, written step by step, against plain autograd through a loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import OPTIMIZERS, OptimizerCase, expected_hypergradient, hypergradient, small_network
from oracles import relative_error
from torch import Tensor

import diffopt
from diffopt.estimators import Adjoint, Claims, Cotangents, Keep, Reverse, StepByStep, Trajectory
from diffopt.tensors.leaves import Leaves
from diffopt.testing import check_estimator

STEPS = 4


@dataclass(frozen=True)
class Exact(Adjoint):
    """The exact recursion, as the documentation writes it; ``without`` is a step whose curvature is left out."""

    without: int = 0
    gradients: bool = True

    def claims(self, steps: int) -> Claims:
        return Claims("never" if 1 <= self.without <= steps else "always")

    def keep(self, steps: int) -> Keep:
        return Keep(first=1, checkpoint=1, gradients=self.gradients)

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        steps, adjoint = StepByStep(trajectory), cotangent
        for t in range(trajectory.steps, 0, -1):
            push = None if t == self.without else steps.curvature(t, steps.turn(t, adjoint))
            adjoint = steps.through(t, adjoint, push)
        return steps.cotangents(adjoint)


@pytest.mark.parametrize("without", [0, 1, 3])
@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
def test_it_is_what_autograd_gives_with_that_curvature_left_out(case: OptimizerCase, without: int) -> None:
    problem = small_network(0, STEPS)
    found = hypergradient(problem, case, STEPS, Exact(without))
    expected = expected_hypergradient(problem, case, STEPS, curvature=lambda t: float(t != without))
    assert relative_error(found, expected) < 1e-9  # round-off, over the floor of relative_error


def test_it_passes_the_battery() -> None:
    assert not check_estimator(Exact()).broken


def test_random_numbers_of_the_loss_are_drawn_again() -> None:
    def noisy(w: Tensor) -> Tensor:
        return ((w + torch.randn(2, dtype=torch.float64)) ** 4).sum() / 4

    found = []
    for estimator in (Reverse("graph"), Exact()):
        torch.manual_seed(0)
        w = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
        end = diffopt.solve(noisy, w, optimizer=diffopt.SGD(0.02), steps=3, estimator=estimator).params
        found.append(torch.autograd.grad(end.sum(), w)[0])
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def test_a_loss_that_does_not_repeat_itself_is_refused() -> None:
    calls = []

    def changing(w: Tensor) -> Tensor:
        calls.append(1)
        return len(calls) * w.square().sum()

    w = torch.ones(2, requires_grad=True)
    with pytest.raises(diffopt.HiddenStateError, match="keeps a state"):
        diffopt.solve(changing, w, optimizer=diffopt.SGD(0.1), steps=2, estimator=Exact())


def test_counts() -> None:
    w = torch.ones(2, requires_grad=True)
    solution = diffopt.solve(lambda w: w.square().sum(), w, optimizer=diffopt.SGD(0.1), steps=5, estimator=Exact(2))
    solution.params.sum().backward()
    assert (solution.counts.gradients, solution.counts.products, solution.counts.depth) == (5, 4, 4)


def test_an_estimator_that_does_not_keep_what_it_needs_is_told_so() -> None:
    w = torch.ones(2, requires_grad=True)
    estimator: Any = Exact(gradients=False)
    end = diffopt.solve(lambda w: w.square().sum(), w, optimizer=diffopt.SGD(0.1), steps=2, estimator=estimator).params
    with pytest.raises(diffopt.EstimatorError, match="2 states and 0 gradients were kept, expected 2 of each"):
        end.sum().backward()
