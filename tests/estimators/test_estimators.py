"""Every estimator against plain autograd through a plain loop, for every optimizer and every kind of meta-parameter."""

from __future__ import annotations

import pytest
import torch
from cases import OPTIMIZERS, OptimizerCase, expected_hypergradient, hypergradient, small_network
from hypothesis import given
from hypothesis import strategies as st
from limits import sampled
from oracles import relative_error

import diffopt
from diffopt.estimators import FirstOrder, ForwardMode, Reverse, Truncated, Unrolled
from diffopt.tasks import Quadratic

EXACT = [*map(Reverse, [None, "graph", 1, 2, "sqrt"]), Unrolled(), ForwardMode(), ForwardMode(chunk_size=2)]
# Round-off (1e-15) of terms of order 1, over the floor 1e-6 of relative_error: some derivatives are zero in exact
# arithmetic, such as those for Adam's betas after one step.
ROUND_OFF = 1e-9


def by_name(case: OptimizerCase) -> str:
    return case.name


@pytest.mark.parametrize("estimator", EXACT[:-1], ids=str)
@pytest.mark.parametrize("case", OPTIMIZERS, ids=by_name)
def test_exact_estimators_equal_autograd_through_a_plain_loop(case, estimator):
    problem = small_network(seed=1, steps=5)
    expected = expected_hypergradient(problem, case, 5)
    assert min(float(g.abs().max()) for g in expected) > 1e-7, "a meta-parameter without effect proves nothing"
    assert relative_error(hypergradient(problem, case, 5, estimator), expected) < ROUND_OFF


@pytest.mark.parametrize("case", sampled(OPTIMIZERS, 4), ids=by_name)
def test_so_does_forward_mode_in_chunks(case):
    test_exact_estimators_equal_autograd_through_a_plain_loop(case, EXACT[-1])


@given(seed=st.integers(0, 2**31), steps=st.integers(1, 12), definite=st.booleans(), estimator=st.sampled_from(EXACT))
def test_quadratics_have_their_closed_form_hypergradient(seed, steps, definite, estimator):
    generator = torch.Generator().manual_seed(seed)
    problem = Quadratic.random(4, definite=definite, generator=generator)
    initial = torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_()
    linear = torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_()
    lr = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    solution = diffopt.solve(problem.loss, initial, linear, optimizer=diffopt.SGD(lr), steps=steps, estimator=estimator)
    got = torch.autograd.grad(problem.outer_loss(solution.params), [initial, linear, lr])
    closed = problem.hypergradient(initial.detach(), linear.detach(), 0.3, steps)
    assert relative_error(got, [closed.initial, closed.linear, closed.lr]) < ROUND_OFF


@pytest.mark.parametrize("case", sampled(OPTIMIZERS, 2), ids=by_name)
@pytest.mark.parametrize("last", [0, 1, 3, 6])
@pytest.mark.parametrize("checkpoint", [None, 1, 2])
def test_truncation_equals_a_straight_through_plain_loop(case, last, checkpoint):
    steps = 6
    problem = small_network(seed=3, steps=steps)
    expected = expected_hypergradient(problem, case, steps, detach_until=steps - last)
    assert relative_error(hypergradient(problem, case, steps, Truncated(last, checkpoint)), expected) < ROUND_OFF


@pytest.mark.parametrize("estimator", [Reverse(), Reverse(1), Truncated(3), FirstOrder(), Unrolled()], ids=str)
def test_a_sparse_constant_is_read_like_a_dense_one(estimator):
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(4, 3, generator=generator, dtype=torch.float64).clamp(min=0)
    w, target = torch.ones(3, dtype=torch.float64), torch.randn(4, generator=generator, dtype=torch.float64)

    def loss(w, matrix, target):
        return ((matrix @ w[:, None])[:, 0] - target).square().mean() + (w**4).sum()

    def gradients(matrix, target=target):
        leaves = [x.clone().requires_grad_() for x in (w, target)]
        options = {"optimizer": diffopt.SGD(0.05), "steps": 3, "estimator": estimator}
        final = diffopt.solve(loss, leaves[0], matrix, leaves[1], **options).params
        return torch.autograd.grad(final.sum(), leaves, materialize_grads=True)

    assert relative_error(gradients(dense.to_sparse()), gradients(dense)) < ROUND_OFF
    with pytest.raises(diffopt.NonFiniteLossError, match=r"args\[1\] is not finite itself"):
        gradients(dense.to_sparse(), target / 0)


@pytest.mark.parametrize("estimator", EXACT, ids=str)
def test_an_empty_input_gets_an_empty_hypergradient(estimator):
    w, empty = (torch.ones(n, dtype=torch.float64, requires_grad=True) for n in (2, 0))
    options = {"optimizer": diffopt.SGD(0.1), "steps": 2, "estimator": estimator}
    final = diffopt.solve(lambda w, x: w.square().sum() + x.sum(), w, empty, **options).params
    got = torch.autograd.grad(final.sum(), (w, empty), materialize_grads=True)
    assert got[1].shape == (0,)
    assert relative_error(got[0], torch.full_like(w, 0.8**2)) < ROUND_OFF
