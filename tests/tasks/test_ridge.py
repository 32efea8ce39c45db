"""Closed forms of ridge regression against long gradient descent and finite differences."""

from __future__ import annotations

import pytest
import torch

from diffopt.tasks import Ridge


@pytest.fixture
def problem(generator):
    return Ridge.random(30, 4, generator=generator, validation_samples=20)


@pytest.fixture
def log_penalty(generator):
    return torch.randn(4, generator=generator, dtype=torch.float64) - 1


def descend(problem, log_penalty, steps=400, lr=0.2):
    """Plain gradient descent from a point where nothing vanishes, differentiable in the penalty."""
    params = torch.ones(4, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(problem.loss(params, log_penalty), params, create_graph=True)
        params = params - lr * gradient
    return params


def test_solution_and_hypergradient_are_the_limits_of_gradient_descent(problem, log_penalty):
    log_penalty.requires_grad_()
    params = descend(problem, log_penalty)
    (expected,) = torch.autograd.grad(problem.outer_loss(params), log_penalty)
    # 400 steps contract by less than 0.9 each: nothing is left but rounding.
    torch.testing.assert_close(problem.solution(log_penalty), params, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(problem.hypergradient(log_penalty), expected, rtol=1e-10, atol=1e-12)


def test_losses_are_means_without_halves():
    problem = Ridge(torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 1.0]), torch.tensor([[3.0]]), torch.tensor([1.0]))
    weight = torch.tensor([2.0])
    assert float(problem.loss(weight, torch.tensor([3.0]).log())) == pytest.approx((4 + 9) / 2 + 3 * 4)
    assert float(problem.outer_loss(weight)) == 25.0


def test_one_penalty_for_all_features_is_the_sum(problem):
    penalty = torch.tensor(-0.7, dtype=torch.float64)
    outer = [float(problem.outer_loss(problem.solution((penalty + shift).expand(4)))) for shift in (-1e-5, 1e-5)]
    difference = (outer[1] - outer[0]) / 2e-5
    # Central differences at 1e-5: error about 1e-10 from truncation and 1e-11 from rounding.
    assert float(problem.hypergradient(penalty.expand(4)).sum()) == pytest.approx(difference, rel=1e-7)


def test_solution_is_differentiable(problem, log_penalty):
    log_penalty.requires_grad_()
    (through,) = torch.autograd.grad(problem.outer_loss(problem.solution(log_penalty)), log_penalty)
    torch.testing.assert_close(problem.hypergradient(log_penalty), through, rtol=1e-11, atol=1e-13)
    assert not problem.hypergradient(log_penalty).requires_grad


def test_random_depends_on_the_generator_alone():
    first, again = (
        Ridge.random(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float32) for _ in range(2)
    )
    assert torch.equal(first.targets, again.targets)
    assert torch.equal(first.validation_targets, again.validation_targets)
    assert first.validation_inputs.shape == (5, 3)
    assert first.targets.dtype == torch.float32
