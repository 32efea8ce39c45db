"""Optimizers of optimizers: every exact estimator in every memory mode beside plain autograd through a plain loop."""

from __future__ import annotations

import pytest
import torch
from compositions import COMPOSITIONS, STEPS, Setting, gradient
from hypothesis import given
from hypothesis import strategies as st
from limits import sampled
from oracles import relative_error, taylor

from diffopt.estimators import Binomial, ForwardMode, Krylov, MultiStep, Reverse, Truncated, Unrolled

OF_ALL = (Truncated(STEPS), MultiStep(1), Binomial(STEPS), Krylov(STEPS))
EXACT = [*map(Reverse, [None, "graph", 1, 3, "sqrt"]), Unrolled(), ForwardMode(), *OF_ALL]
ROUND_OFF = 1e-10
"""Of some thousand operations in float64, on numbers of size one."""


@pytest.mark.parametrize("case", sampled(COMPOSITIONS, 2), ids=str)
@pytest.mark.parametrize("estimator", EXACT, ids=str)
def test_hypergradients_are_those_of_a_plain_loop(case, estimator):
    setting = Setting.random(seed=1)
    inputs = setting.inputs(case)
    expected = gradient(lambda x: setting.expected(case, x, setting.query), inputs)
    got = gradient(lambda x: setting.value(case, x, estimator, setting.query), inputs)
    assert relative_error(got, expected) < (1e-8 if isinstance(estimator, Krylov) else ROUND_OFF)
    unused = [name for name, g in zip(case.learned, expected[6:], strict=True) if not g.any()]
    assert unused == [], "a hyperparameter without a derivative tests nothing"


@pytest.mark.parametrize("case", sampled(COMPOSITIONS, 2), ids=str)
@pytest.mark.parametrize("estimator", [Reverse(), Reverse(1), Unrolled(), Binomial(STEPS)], ids=str)
def test_tasks_under_vmap_are_those_of_a_loop(case, estimator):
    """Every task has its own start, weights, data and hyperparameters; then all share these but the data."""
    settings = [Setting.random(seed) for seed in (2, 3, 4)]
    query = settings[0].query
    rows = [[x * (1 - 0.1 * k) for x in s.inputs(case)] for k, s in enumerate(settings)]
    alone = [gradient(lambda x: settings[0].expected(case, x, query), row) for row in rows]

    def value(*inputs):
        return settings[0].value(case, list(inputs), estimator, query)

    stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
    got = torch.func.vmap(torch.func.grad(value, argnums=tuple(range(len(stacked)))))(*stacked)
    for k, row in enumerate(alone):
        assert relative_error([g[k] for g in got], row) < ROUND_OFF
    got = gradient(lambda x: torch.func.vmap(value)(*x).sum(), stacked)
    assert relative_error(got, [torch.stack(column) for column in zip(*alone, strict=True)]) < ROUND_OFF

    shared = [x if i in (4, 5) else rows[0][i] for i, x in enumerate(stacked)]
    dims = tuple(0 if i in (4, 5) else None for i in range(len(shared)))
    got = gradient(lambda x: torch.func.vmap(value, in_dims=dims)(*x).sum(), shared)
    mixed = [[row[i] if i in (4, 5) else rows[0][i] for i in range(len(shared))] for row in rows]
    alone = [gradient(lambda x: settings[0].expected(case, x, query), row) for row in mixed]
    for i, g in enumerate(got):
        column = [row[i] for row in alone]
        assert relative_error([g], [torch.stack(column) if i in (4, 5) else sum(column)]) < ROUND_OFF


@pytest.mark.parametrize("case", sampled(COMPOSITIONS, 4), ids=str)
def test_tasks_under_vmap_in_forward_mode_too(case):
    test_tasks_under_vmap_are_those_of_a_loop(case, ForwardMode())


@pytest.mark.parametrize("case", COMPOSITIONS, ids=str)
@pytest.mark.parametrize("order", [1, 2])
def test_orders_are_taylor_coefficients_of_the_curvature(case, order):
    setting = Setting.random(seed=5)
    inputs = setting.inputs(case)
    got = gradient(lambda x: setting.value(case, x, Binomial(order), setting.query), inputs)
    graded = taylor(lambda e: gradient(lambda x: setting.expected(case, x, setting.query, e), inputs), STEPS)
    assert relative_error(got, graded(order)) < 1e-8, "a 5 by 5 Vandermonde system of condition 30"


ANY = {"case": st.sampled_from(COMPOSITIONS), "estimator": st.sampled_from(EXACT)}


@given(seed=st.integers(0, 2**31), factor=st.floats(0.6, 1.0), **ANY)
def test_hypergradients_are_right_wherever_one_starts(seed, case, estimator, factor):
    setting = Setting.random(seed)
    inputs = [*setting.inputs(case)[:6], *(factor * x for x in setting.inputs(case)[6:])]
    expected = gradient(lambda x: setting.expected(case, x, setting.query), inputs)
    got = gradient(lambda x: setting.value(case, x, estimator, setting.query), inputs)
    assert relative_error(got, expected) < (1e-7 if isinstance(estimator, Krylov) else 1e-9)
