"""The error bounds of derivations section 4, as properties of the library's own estimators on random quadratics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import diffopt
from diffopt.estimators import Binomial, FirstOrder, Reverse, Truncated

SIZE = 3
LR = 0.25  # a power of two: curvature x / LR times LR is x again
# Relative round-off of a product of at most 9 matrices: the bounds are attained, so errors may be above by this.
SLACK = 1 + 1e-12


def init_gradient(hessians, target, estimator, shift=0.0):
    """The hypergradient of the start by gradient descent on ``w' H_t w / 2``, outer loss ``target' w``.

    ``shift`` is curvature that stands in the update, as weight decay, instead of in the loss.
    """
    hessians = hessians - shift * np.eye(hessians.shape[-1])
    w = torch.full((hessians.shape[-1],), 0.3, dtype=torch.float64, requires_grad=True)
    options = {"optimizer": diffopt.SGD(LR, weight_decay=shift), "steps": len(hessians), "estimator": estimator}
    end = diffopt.solve(lambda w, h: w @ h @ w / 2, w, batches=torch.as_tensor(hessians), **options).params
    return torch.autograd.grad(end @ torch.as_tensor(target), w)[0].numpy()


def matrix_of(hessians, estimator, shift=0.0):
    """The hypergradients of the start, for every direction of the outer gradient a column."""
    return np.column_stack([init_gradient(hessians, e, estimator, shift) for e in np.eye(hessians.shape[-1])])


def errors(hessians, order, g):
    """Of first order, truncation and the expansion, relative to the outer gradient and for its worst direction.

    They are norms of error matrices, column by column from the estimators; ``g`` is another outer gradient.
    """
    estimators = [FirstOrder(), Truncated(order), Binomial(order)]
    exact, *matrices = (matrix_of(hessians, estimator) for estimator in [Reverse(), *estimators])
    assert init_gradient(hessians, g, estimators[2]) == pytest.approx(matrices[2] @ g)  # linear in the outer gradient
    return [np.linalg.norm(exact - matrix, 2) for matrix in matrices]


def symmetric(g, eigenvalues):
    q, _ = np.linalg.qr(g.normal(size=(len(eigenvalues), len(eigenvalues))))
    return q @ np.diag(eigenvalues) @ q.T


def random_hessians(seed, steps, low, high):
    """One per step, eigenvalues of ``LR * H`` in the interval, both ends likely; eigenvectors do not commute."""
    g = np.random.default_rng(seed)
    values = [g.choice([low, high, g.uniform(low, high)], size=SIZE) / LR for _ in range(steps)]
    return np.stack([symmetric(g, v) for v in values]), g.normal(size=SIZE)


def tail(steps, first, x):
    return sum(math.comb(steps, level) * x**level for level in range(first, steps + 1))


def bounded(steps, order, x):
    """(11a), (11b), (11c)."""
    return ((1 + x) ** steps - 1, ((1 + x) ** (steps - order) - 1) * (1 + x) ** order, tail(steps, order + 1, x))


def below(found, bound):
    # 1e-12: the error of an estimator that is exact is round-off, its bound zero
    return found <= bound * SLACK + 1e-12


problems = st.tuples(st.integers(0, 2**31), st.integers(1, 7), st.integers(0, 7)).filter(lambda p: p[2] <= p[1])


@given(problems, st.floats(0.01, 3))
def test_bounded_curvature(problem, x):
    seed, steps, order = problem
    hessians, g = random_hessians(seed, steps, -x, x)
    bounds = bounded(steps, order, x)
    assert all(below(e, b) for e, b in zip(errors(hessians, order, g), bounds, strict=True))
    assert bounds[2] <= bounds[1] * SLACK
    assert bounds[1] <= bounds[0] * SLACK


@pytest.mark.parametrize("x", [0.125, 1.0, 2.0])
@pytest.mark.parametrize("order", range(6))
def test_negative_curvature_attains_all_three(order, x):
    steps = 5
    hessians = np.stack([-x / LR * np.eye(SIZE)] * steps)
    found = errors(hessians, order, np.ones(SIZE))
    # the bounds cancel by hundreds; exact estimators have an error of round-off and a bound of zero
    assert found == pytest.approx(bounded(steps, order, x), rel=1e-11, abs=1e-12)


@given(problems, st.floats(0.01, 2))
def test_convex_losses(problem, x):
    """(12c), for every step size up to two over the curvature."""
    seed, steps, order = problem
    hessians, g = random_hessians(seed, steps, 0.0, x)
    bound = math.comb(steps, order + 1) * x ** (order + 1)
    assert below(errors(hessians, order, g)[2], bound)
    assert bound <= (math.e * steps * x / (order + 1)) ** (order + 1) * SLACK


@given(problems, st.floats(0.01, 1.99))
def test_what_dropping_steps_costs_on_convex_losses(problem, x):
    """Proposition 4.1, and that its bounds are below 2 and (for first order) ``steps * x``."""
    seed, steps, order = problem
    hessians, g = random_hessians(seed, steps, 0.0, x)
    first_order, truncated, _ = errors(hessians, order, g)
    dropped = steps - order
    bounds = 2 * steps * x / (2 + (steps - 1) * x), 2 * dropped * x / (2 + (dropped - 1) * x) if dropped else 0.0
    assert below(first_order, bounds[0])
    assert below(truncated, bounds[1])
    assert max(bounds) < 2
    assert bounds[0] <= steps * x * SLACK


@pytest.mark.parametrize("x", [0.25, 1.0, 1.5])
@pytest.mark.parametrize("steps", [1, 4])
def test_one_dropped_step_attains_it(steps, x):
    hessians = np.zeros((steps, SIZE, SIZE))
    hessians[0] = x / LR * np.eye(SIZE)
    truncated = errors(hessians, steps - 1, np.ones(SIZE))[1]
    assert truncated == pytest.approx(x, rel=1e-12)


@given(problems, st.floats(0.01, 1), st.floats(0, 1))
def test_strong_convexity_near_the_end(problem, x, share):
    """(34b) and (34c): curvature of any sign first, and of at least ``y`` in the last ``order`` steps."""
    seed, steps, order = problem
    assume(order >= 1)
    y = share * x
    early, g = random_hessians(seed, steps - order, -x, x) if order < steps else (None, np.ones(SIZE))
    late, _ = random_hessians(seed + 1, order, y, x)
    hessians = late if early is None else np.concatenate([early, late])
    _, truncated, binomial = errors(hessians, order, g)
    kept, dropped = (1 - y) ** order, steps - order
    assert below(truncated, ((1 + x) ** dropped - 1) * kept)
    rest = sum(math.comb(k, order) * (1 - y) ** (steps - 1 - k) for k in range(dropped, steps))
    assert below(binomial, kept * tail(dropped, order + 1, x) + x ** (order + 1) * rest)


def shifted_error(hessians, order, shift):
    """Of the expansion in the curvature beyond ``shift``, for the worst outer gradient."""
    return np.linalg.norm(matrix_of(hessians, Reverse(), shift) - matrix_of(hessians, Binomial(order), shift), 2)


def binomial_tail(steps, order, chance):
    """The probability of more than ``order`` hits in ``steps`` tries."""
    return sum(
        math.comb(steps, hits) * chance**hits * (1 - chance) ** (steps - hits) for hits in range(order + 1, steps + 1)
    )


@given(problems, st.floats(0.01, 2))
def test_half_the_curvature_in_the_update(problem, x):
    """(3.10): with the middle of the curvature's range known to the update, the error is a binomial tail."""
    seed, steps, order = problem
    hessians, _ = random_hessians(seed, steps, 0.0, x)
    found, bound = shifted_error(hessians, order, shift=x / 2 / LR), binomial_tail(steps, order, x / 2)
    assert below(found, bound)
    assert bound <= min(1.0, math.comb(steps, order + 1) * (x / 2) ** (order + 1)) * SLACK


@pytest.mark.parametrize("x", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("order", range(5))
def test_no_curvature_at_all_attains_it(order, x):
    found = shifted_error(np.zeros((4, SIZE, SIZE)), order, shift=x / 2 / LR)
    assert found == pytest.approx(binomial_tail(4, order, x / 2), rel=1e-12, abs=1e-13)


@given(problems, st.floats(0, 3))
def test_as_many_orders_as_steps_are_exact_whatever_the_update_knows(problem, shift):
    seed, steps, _ = problem
    hessians, g = random_hessians(seed, steps, -1.0, 1.0)
    bare, shifted = init_gradient(hessians, g, Reverse()), init_gradient(hessians, g, Binomial(steps), shift)
    # products of up to 7 matrices of norm below 3, of which the bare one knows nothing
    assert shifted == pytest.approx(bare, rel=1e-9, abs=1e-9)


class TestWhatThePaperClaims:
    """First order and truncation on convex losses: (12a) and (12b) hold only if the Hessians commute."""

    @given(problems, st.floats(0.01, 1))
    def test_they_hold_for_one_hessian(self, problem, x):
        seed, steps, order = problem
        hessians, g = random_hessians(seed, 1, 0.0, x)
        first_order, truncated, _ = errors(np.repeat(hessians, steps, axis=0), order, g)
        assert below(first_order, 1 - (1 - x) ** steps)
        assert below(truncated, 1 - (1 - x) ** (steps - order))

    def test_two_projections_are_a_counterexample(self):
        a, b = np.array([1.0, 0.0]), np.array([np.sqrt(1 / 3), np.sqrt(2 / 3)])  # cos**2 of their angle is 1/3
        hessians = np.stack([(np.eye(2) - np.outer(v, v)) / LR for v in (a, b)])  # x = 1: the claim is 1
        assert errors(hessians, 0, np.ones(2))[:2] == pytest.approx([2 / np.sqrt(3)] * 2, rel=1e-12)
        assert 2 / np.sqrt(3) <= 2 * 2 / (2 + 1)  # Proposition 4.1 holds

    @pytest.mark.parametrize("steps", [4, 5, 8, 12])
    def test_turning_projections_go_towards_two(self, steps):
        angles = np.arange(steps) * np.pi / (steps - 1)
        lines = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
        hessians = np.stack([(np.eye(2) - np.outer(v, v)) / LR for v in lines])
        found = errors(hessians, 0, np.ones(2))[0]
        assert found == pytest.approx(1 + np.cos(np.pi / (steps - 1)) ** (steps - 1), rel=1e-12)
        assert found > 1

    def test_low_orders_of_the_expansion_can_be_worse_than_dropping_steps(self):
        hessians = np.stack([0.9 / LR * np.eye(1)] * 5)
        one = np.ones(1)
        found = [init_gradient(hessians, one, estimator)[0] for estimator in (Reverse(), Truncated(1), Binomial(1))]
        assert found == pytest.approx([1e-5, 0.1, -3.5], rel=1e-10)
