"""Closed forms of the quadratic problem and of ridge regression, against autograd through plain loops."""

from __future__ import annotations

from dataclasses import astuple
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffopt.tasks import Quadratic, Ridge


def descended(problem, params, argument, lr, steps):
    """Plain gradient descent on the inner loss, differentiable."""
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(problem.loss(params, argument), params, create_graph=True)
        params = params - lr * gradient
    return params


def by_autograd(problem, initial, linear, lr, steps):
    """Hypergradients through the unrolled loop; the inner gradient comes from the loss itself."""
    initial, linear = (value.clone().requires_grad_() for value in (initial, linear))
    lr = torch.tensor(lr, dtype=initial.dtype, requires_grad=True)
    outer = problem.outer_loss(descended(problem, initial, linear, lr, steps))
    return torch.autograd.grad(outer, (initial, linear, lr), allow_unused=True, materialize_grads=True)


@given(
    seed=st.integers(0, 2**31),
    dimension=st.integers(2, 6),
    definite=st.booleans(),
    steps=st.integers(0, 12),
    lr=st.floats(0.01, 1.5),
)
def test_hypergradient_is_that_of_the_unrolled_loop(seed, dimension, definite, steps, lr):
    generator = torch.Generator().manual_seed(seed)
    problem = Quadratic.random(dimension, definite=definite, generator=generator)
    initial, linear = torch.randn(2, dimension, generator=generator, dtype=torch.float64)
    expected = by_autograd(problem, initial, linear, lr, steps)
    found = problem.hypergradient(initial, linear, lr, steps)
    for one, other in zip(found, expected, strict=True):
        # Rounding of powers up to (1 + 1.5)^12, relative to the largest entry.
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10 * float(other.abs().max() + 1))


def test_a_hand_computed_case():
    problem = Quadratic(torch.tensor([[2.0]]), torch.tensor([1.0]))
    # phi_2 = 3 - 0.25 * (2 * 3 - 4) = 2.5, so F' = 1.5 and dphi_2 = 0.5 dphi_1 + 0.25 db - 2 dlr.
    found = problem.hypergradient(torch.tensor([3.0]), torch.tensor([4.0]), lr=0.25, steps=1)
    assert [float(value) for value in found] == [0.75, 0.375, -3.0]
    assert float(problem.loss(torch.tensor([3.0]), torch.tensor([4.0]))) == -3.0
    assert float(problem.outer_loss(torch.tensor([3.0]))) == 2.0


def test_a_singular_hessian_loses_no_digits():
    hessian = torch.diag(torch.tensor([0.0, 1e-15, 0.5], dtype=torch.float64))
    problem = Quadratic(hessian, torch.ones(3, dtype=torch.float64))
    initial, linear = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = problem.hypergradient(initial, linear, 0.3, 7)
    for one, other in zip(found, by_autograd(problem, initial, linear, 0.3, 7), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("seed", range(10))
def test_random_eigenvalues_are_as_promised(seed):
    generator = torch.Generator().manual_seed(seed)
    definite = torch.linalg.eigvalsh(Quadratic.random(5, definite=True, generator=generator).hessian)
    indefinite = torch.linalg.eigvalsh(Quadratic.random(2 + seed % 3, definite=False, generator=generator).hessian)
    assert definite.min() >= 0.1 - 1e-12
    assert definite.max() <= 1 + 1e-12
    assert -1 - 1e-12 <= indefinite.min() < 0 < indefinite.max() <= 1 + 1e-12


def test_the_minimiser_has_no_gradient(generator):
    problem = Quadratic.random(5, definite=True, generator=generator)
    linear = torch.randn(5, generator=generator, dtype=torch.float64)
    minimiser = problem.minimiser(linear).requires_grad_()
    (gradient,) = torch.autograd.grad(problem.loss(minimiser, linear), minimiser)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.fixture
def problem(generator):
    return Ridge.random(30, 4, generator=generator, validation_samples=20)


@pytest.fixture
def log_penalty(generator):
    return torch.randn(4, generator=generator, dtype=torch.float64) - 1


def test_solution_and_hypergradient_are_the_limits_of_gradient_descent(problem, log_penalty):
    log_penalty.requires_grad_()
    start = torch.ones(4, dtype=torch.float64, requires_grad=True)  # where nothing vanishes
    params = descended(problem, start, log_penalty, 0.2, 400)
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


@pytest.mark.parametrize("make", [partial(Quadratic.random, 4, definite=False), partial(Ridge.random, 5, 3)])
def test_random_problems_depend_on_the_generator_alone(make):
    drawn = [make(generator=torch.Generator().manual_seed(1), dtype=torch.float32) for _ in range(2)]
    first, again = map(astuple, drawn)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert {value.dtype for value in first} == {torch.float32}
    assert isinstance(drawn[0], Quadratic) or drawn[0].validation_inputs.shape == (5, 3), "as many as for training"
