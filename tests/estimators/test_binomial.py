"""The binomial estimator against the Taylor coefficients of a surrogate, and against enumeration of Hessian factors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import OPTIMIZERS, MetaParameters, expected_hypergradient, hypergradient, small_network, solved
from hypothesis import given
from hypothesis import strategies as st
from limits import sampled
from oracles import relative_error, taylor

import diffopt
from diffopt.adjoint.parallel_curvature import ParallelCurvature
from diffopt.estimators import Binomial

STEPS = 4
TAYLOR = 1e-8  # of the system that the coefficients are the solution of


def graded(problem, case, order, window=STEPS, scale=1.0, steps=STEPS):
    """The sum of the Taylor coefficients up to ``order`` in a factor on the curvature of the last ``window`` steps."""

    def of(e):
        return expected_hypergradient(problem, case, steps, curvature=lambda t: e if t > steps - window else 0.0)

    return taylor(of, steps)(order, scale)


@pytest.mark.parametrize("order", range(STEPS + 2))
@pytest.mark.parametrize("case", sampled(OPTIMIZERS, 2), ids=lambda case: case.name)
def test_orders_are_taylor_coefficients_of_the_surrogate(case, order):
    problem = small_network(seed=21, steps=STEPS)
    got = hypergradient(problem, case, STEPS, Binomial(order))
    assert relative_error(got, graded(problem, case, order)) < TAYLOR


@given(
    seed=st.integers(0, 2**31),
    order=st.integers(0, STEPS + 1),
    window=st.integers(0, STEPS),
    scale=st.sampled_from([1.0, 0.5, 0.25]),
    chunk_size=st.sampled_from([None, 1, 2]),
    case=st.sampled_from(OPTIMIZERS),
)
def test_windows_scales_and_chunks(seed, order, window, scale, chunk_size, case):
    problem = small_network(seed, STEPS)
    got = hypergradient(problem, case, STEPS, Binomial(order, window, scale, chunk_size))
    assert relative_error(got, graded(problem, case, order, window, scale)) < TAYLOR


@pytest.mark.parametrize(
    ("chunk_size", "recorded"), [(None, [5]), (5, [3, 3, 3]), (3, [3, 3, 3]), (2, [2, 1, 2, 1, 2, 1])]
)
def test_a_graph_is_kept_for_all_orders_or_recorded_for_each(monkeypatch, chunk_size, recorded):
    """Three orders of five steps, three steps each: what a chunk size bounds is the graph that is alive."""
    lengths, record = [], ParallelCurvature._record
    noting = lambda self, steps: (lengths.append(len(steps)), record(self, steps))[1]  # noqa: E731
    monkeypatch.setattr(ParallelCurvature, "_record", noting)
    start = torch.tensor([0.3, -0.4], requires_grad=True)
    loss = lambda w: (w.sin() * w).sum()  # noqa: E731
    estimator = Binomial(3, chunk_size=chunk_size)
    found = diffopt.solve(loss, start, optimizer=diffopt.SGD(0.1), steps=5, estimator=estimator)
    found.params.sum().backward()
    assert lengths == recorded


@pytest.mark.parametrize("made", range(1, STEPS))
@pytest.mark.parametrize("window", range(1, STEPS + 1))
@pytest.mark.parametrize("order", [1, 2, STEPS])
def test_a_window_of_a_solve_that_its_caller_stops(order, window, made):
    """The last ``window`` of the steps that were made have curvature, or all of them if there are fewer."""
    problem, case = small_network(seed=22, steps=STEPS), OPTIMIZERS[1]
    meta = MetaParameters.of(problem, case)
    stop = {"on_step": lambda step, loss: step >= made}
    solution = solved(problem, case, STEPS, Binomial(order, window), **meta.given(), **stop)
    assert solution.steps == made
    got = torch.autograd.grad(problem.outer_loss(solution.params), meta.leaves())
    assert relative_error(got, graded(problem, case, order, window, steps=made)) < TAYLOR


@pytest.mark.parametrize(("tol", "made"), [(5.0, 0), (1.2, 3), (0.7, 5)])
@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("order", [0, 1, 2, 8])
def test_a_window_of_a_solve_that_ends_at_a_small_gradient(order, window, tol, made):
    """On ``2 w**2 / 2`` each step of 0.1 takes a fifth off: curvature in ``n`` steps is ``n`` factors ``1 - 0.2``."""
    w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    options = {"optimizer": diffopt.SGD(0.1), "steps": 9, "tol": tol, "estimator": Binomial(order, window)}
    solution = diffopt.solve(torch.square, w, **options)
    assert solution.steps == made  # the gradient before step t is 2 * 0.8**(t - 1)
    (got,) = torch.autograd.grad(solution.params, w)
    curved = min(window, made)
    expected = sum(math.comb(curved, k) * (-0.2) ** k for k in range(min(order, curved) + 1))
    assert float(got) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("order", range(5))
def test_for_gradient_descent_it_enumerates_subsets_of_hessians(order):
    steps, lr = 4, 0.2
    generator = torch.Generator().manual_seed(2)
    hessians = torch.randn(steps, 3, 3, generator=generator, dtype=torch.float64)
    hessians = hessians + hessians.mT
    target = torch.randn(3, generator=generator, dtype=torch.float64)
    w = torch.randn(3, generator=generator, dtype=torch.float64).requires_grad_()
    options = {"optimizer": diffopt.SGD(lr), "steps": steps, "batches": hessians, "estimator": Binomial(order)}
    solution = diffopt.solve(lambda w, h: w @ h @ w / 2, w, **options)
    (got,) = torch.autograd.grad(solution.params @ target, w)
    expected = torch.zeros(3, dtype=torch.float64)
    for size in range(order + 1):
        for chosen in itertools.combinations(range(steps), size):
            term = target
            for t in reversed(chosen):
                term = -lr * hessians[t] @ term
            expected = expected + term
    assert relative_error([got], [expected]) < 1e-12


@pytest.mark.parametrize("estimator", [Binomial(0), Binomial(1, scale=0.5), Binomial(2, window=0, scale=0.5)], ids=str)
def test_without_a_step_the_outer_gradient_is_the_hypergradient(estimator):
    w = torch.tensor(3.0, requires_grad=True)
    diffopt.solve(
        lambda w: w**2, w, optimizer=diffopt.SGD(0.1), steps=0, estimator=estimator
    ).params.square().backward()
    assert float(w.grad) == 6.0
