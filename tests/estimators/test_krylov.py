"""The Krylov estimator against dense linear algebra in numpy, against Binomial where both agree and where not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from cases import OPTIMIZERS, expected_hypergradient, hypergradient, small_network
from hypothesis import given
from hypothesis import strategies as st
from limits import sampled
from oracles import relative_error
from torch.func import grad, vmap

import diffopt
from diffopt.estimators import Binomial, Krylov, Reverse

STEPS = 6
ROUND_OFF = 1e-9  # as in test_estimators.py
# Least squares on Krylov bases of at most 5 vectors, whose small matrices have condition numbers below 1e6.
LEAST_SQUARES = 1e-8


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
def test_orders_zero_and_one_are_the_binomial_estimators(case, order):
    problem = small_network(seed=41, steps=STEPS)
    got = hypergradient(problem, case, STEPS, Krylov(order))
    assert relative_error(got, hypergradient(problem, case, STEPS, Binomial(order))) < ROUND_OFF


@pytest.mark.parametrize("order", [STEPS, STEPS + 4])
@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.name)
def test_as_many_orders_as_steps_are_exact(case, order):
    problem = small_network(seed=42, steps=STEPS)
    got = hypergradient(problem, case, STEPS, Krylov(order))
    assert relative_error(got, expected_hypergradient(problem, case, STEPS)) < ROUND_OFF


class Dense:
    """Gradient descent (with momentum) on ``w' H_t w / 2 - b' w``, as one linear system for all adjoints."""

    def __init__(self, seed, momentum, lr, top, steps=STEPS, size=3):
        g = np.random.default_rng(seed)
        roots = [np.linalg.qr(g.normal(size=(size, size)))[0] for _ in range(steps)]
        self.hessians = np.stack([q @ np.diag(top * g.uniform(-0.2, 1, size)) @ q.T for q in roots])
        self.start, self.linear, self.target = g.normal(size=(3, size))
        self.lr, self.momentum, self.steps, self.size = lr, momentum, steps, size

    def solve(self, estimator, learned=True):
        tensors = [torch.tensor(x, dtype=torch.float64) for x in (self.start, self.linear, self.lr)]
        w, b, lr = (x.requires_grad_(learned or i == 0) for i, x in enumerate(tensors))
        solution = self.descend(w, b, lr, estimator)
        got = torch.autograd.grad(solution.params @ torch.tensor(self.target), [w, b, lr] if learned else [w])
        return [x.numpy() for x in got], solution

    def descend(self, w, b, lr, estimator, scale=1.0):
        def loss(w, b, scale, h):
            return scale * (w @ h @ w) / 2 - b @ w

        given = {"optimizer": diffopt.SGD(lr, momentum=self.momentum), "batches": torch.tensor(self.hessians)}
        return diffopt.solve(loss, w, b, scale, steps=self.steps, estimator=estimator, **given)

    def system(self):
        """``I - G`` and the start: adjoints of params and velocity, step by step, in one vector."""
        n, t = 2 * self.size, self.steps
        one, zero = np.eye(self.size), np.zeros((self.size, self.size))
        c = np.block([[one, -self.lr * self.momentum * one], [zero, self.momentum * one]])
        e = np.vstack([-self.lr * one, one])
        curvature = [np.vstack([h, zero]) @ e.T for h in self.hessians]
        last = np.concatenate([self.target, np.zeros(self.size)])
        shift, product = np.zeros((2, t * n, t * n))
        known, known_curved = np.zeros((2, t * n))
        for step in range(1, t):
            rows, columns = slice((step - 1) * n, step * n), slice(step * n, (step + 1) * n)
            shift[rows, columns], product[rows, columns] = c.T, curvature[step - 1]
        known[-n:], known_curved[-n:] = c.T @ last, curvature[-1] @ last
        scan = np.linalg.inv(np.eye(t * n) - shift)
        return np.eye(t * n) - scan @ product, scan @ known, scan @ (known + known_curved), e, last

    def answer(self, order):
        """The hypergradient of ``w``, ``b`` and ``lr``, and the relative residual before the free step."""
        matrix, x, right, e, last = self.system()
        start, r = np.linalg.norm(x), right - matrix @ x
        basis = np.zeros((len(x), 0))
        for _ in range(order - 1):
            new = r if basis.shape[1] == 0 else matrix @ basis[:, -1]
            basis, _ = np.linalg.qr(np.column_stack([basis, new]))
        if order > 1:
            x = x + basis @ np.linalg.lstsq(matrix @ basis, r, rcond=None)[0]
            r = right - matrix @ x
        before, after = ([*v.reshape(self.steps, -1), last] for v in (x, x + r))
        linear = -sum(e.T @ before[t] for t in range(1, self.steps + 1))
        lr, w, v = 0.0, self.start, np.zeros(self.size)
        for t, h in enumerate(self.hessians, start=1):
            v = self.momentum * v + h @ w - self.linear
            w, lr = w - self.lr * v, lr - v @ after[t][: self.size]
        return [after[0][: self.size], linear, lr], np.linalg.norm(r) / start


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("top", [1.0, 20.0])  # lr * top * T is 0.6, or 12
@pytest.mark.parametrize("order", range(1, STEPS))
def test_the_iterate_is_the_smallest_residual_in_the_space_and_one_free_step(order, top, momentum):
    dense = Dense(order, momentum, lr=0.1, top=top)
    got, solution = dense.solve(Krylov(order))
    expected, residual = dense.answer(order)
    for g, e in zip(got, expected, strict=True):
        assert g == pytest.approx(e, rel=LEAST_SQUARES, abs=LEAST_SQUARES * np.abs(e).max())
    if order > 1:
        assert float(solution.diagnostics["residual"]) == pytest.approx(residual, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("order", [1, STEPS, STEPS + 1])
def test_the_first_order_and_the_exact_ones_report_a_residual_too(order):
    dense = Dense(9, 0.8, lr=0.1, top=1.0)
    _, solution = dense.solve(Krylov(order))
    expected = dense.answer(1)[1] if order == 1 else 0.0
    assert float(solution.diagnostics["residual"]) == pytest.approx(expected, rel=1e-6)


@given(
    seed=st.integers(0, 2**31),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    top=st.floats(0.1, 50),
    steps=st.integers(3, 7),
)
def test_the_residual_does_not_grow(seed, momentum, top, steps):
    dense = Dense(seed, momentum, 0.1, top, steps)
    residuals = [float(dense.solve(Krylov(n), False)[1].diagnostics["residual"]) for n in range(2, steps)]
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(residuals)), residuals


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_stays_bounded_where_the_binomial_series_diverges(momentum):
    dense = Dense(3, momentum, lr=0.1, top=15.0, steps=20)  # T * lr * top is 30
    size = np.linalg.norm(dense.target)
    for order in (3, 5, 8, 11):
        series, krylov = (
            np.linalg.norm(dense.solve(estimator(order), False)[0][0]) for estimator in (Binomial, Krylov)
        )
        assert series > 200 * size
        assert krylov < 10 * size


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", sampled(OPTIMIZERS, 2), ids=lambda case: case.name)
def test_it_is_never_clearly_worse_than_the_series(case, seed):
    """The start's hypergradient; smallest residual is not smallest error, so not never worse at all."""
    steps = 8

    def start(problem, estimator):
        return torch.cat([x.flatten() for x in hypergradient(problem, case, steps, estimator)[:3]])

    problem = small_network(seed, steps)
    exact = start(problem, Reverse())
    for order in range(2, steps):
        series, krylov = (float((start(problem, estimator(order)) - exact).norm()) for estimator in (Binomial, Krylov))
        assert krylov <= 2 * series + 1e-10 * float(exact.norm()), order


def test_a_tolerance_stops_early():
    dense = Dense(5, 0.5, lr=0.1, top=1.0, steps=20)
    (full, _), (short, solution) = dense.solve(Reverse(), False), dense.solve(Krylov(19, rtol=1e-4), False)
    used = solution.counts.depth
    assert 2 <= used < 10
    assert solution.counts.products == 20 + (used - 1) * 19
    assert float(solution.diagnostics["residual"]) <= 1e-4 < dense.answer(used - 1)[1]
    assert short[0] == pytest.approx(dense.answer(used)[0][0], rel=1e-6)
    assert np.linalg.norm(short[0] - full[0]) < 1e-3 * np.linalg.norm(full[0])


@pytest.mark.parametrize("order", [2, 4])
@pytest.mark.parametrize("case", sampled(OPTIMIZERS, 2), ids=lambda case: case.name)
def test_chunks_do_not_matter(case, order):
    problem = small_network(seed=43, steps=STEPS)
    whole = hypergradient(problem, case, STEPS, Krylov(order))
    for size in (1, 4):
        assert relative_error(hypergradient(problem, case, STEPS, Krylov(order, chunk_size=size)), whole) < ROUND_OFF


SCALES = [0.0, 0.3, 8.0, 1.0]  # of the tasks' curvature: none, some, and too much for the series


def batch_of_tasks(order, scales):
    dense = Dense(7, 0.6, 0.1, 1.0)
    start, linear, target = (torch.tensor(x) for x in (dense.start, dense.linear, dense.target))

    def run(scale, w, b):
        solution = dense.descend(w, b, dense.lr, Krylov(order), scale)
        return solution.params @ target, solution.diagnostics

    return run, torch.tensor(scales, dtype=torch.float64), start, linear


@pytest.mark.parametrize("order", [2, 3, 5])
def test_every_task_has_its_own_coefficients(order):
    run, scales, w, b = batch_of_tasks(order, SCALES)
    derivative = grad(lambda *inputs: run(*inputs)[0], argnums=(0, 1, 2))
    together = vmap(derivative, in_dims=(0, None, None))(scales, w, b)
    for i, scale in enumerate(scales):
        assert relative_error([x[i] for x in together], derivative(scale, w, b)) < LEAST_SQUARES


def test_every_task_has_its_own_residual():
    run, scales, w, b = batch_of_tasks(3, SCALES)
    seen = []

    def outer(scale, w):
        value, diagnostics = run(scale, w, b)
        seen.append(diagnostics)
        return value

    w.requires_grad_()
    vmap(outer, in_dims=(0, None))(scales, w).sum().backward()
    alone = []
    for scale in scales:
        value, diagnostics = run(scale, w, b)
        value.backward()
        alone.append(diagnostics["residual"])
    assert seen[0]["residual"].shape == (len(SCALES),)
    assert seen[0]["residual"] == pytest.approx(torch.stack(alone), rel=1e-6, abs=1e-12)
