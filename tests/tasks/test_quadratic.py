"""Closed forms of the quadratic problem against autograd through a plain loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffopt.tasks import Quadratic


def by_autograd(problem, initial, linear, lr, steps):
    """Hypergradients through the unrolled loop; the inner gradient comes from the loss itself."""
    initial, linear = (value.clone().requires_grad_() for value in (initial, linear))
    lr = torch.tensor(lr, dtype=initial.dtype, requires_grad=True)
    params = initial
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(problem.loss(params, linear), params, create_graph=True)
        params = params - lr * gradient
    outer = problem.outer_loss(params)
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


def test_random_depends_on_the_generator_alone():
    first, again = (
        Quadratic.random(4, definite=False, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
        for _ in range(2)
    )
    assert torch.equal(first.hessian, again.hessian)
    assert torch.equal(first.target, again.target)
    assert first.hessian.dtype == first.target.dtype == torch.float32


def test_the_minimiser_has_no_gradient(generator):
    problem = Quadratic.random(5, definite=True, generator=generator)
    linear = torch.randn(5, generator=generator, dtype=torch.float64)
    minimiser = problem.minimiser(linear).requires_grad_()
    (gradient,) = torch.autograd.grad(problem.loss(minimiser, linear), minimiser)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
