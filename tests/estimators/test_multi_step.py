"""Windows of updates that share a gradient, against a plain loop that reuses gradients, under plain autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import OPTIMIZERS, InnerProblem, expected_hypergradient, hypergradient, small_network, solved
from limits import sampled
from oracles import relative_error, taylor, unrolled
from torch.func import grad, vmap

import diffopt
from diffopt.estimators import Binomial, ForwardMode, Krylov, MultiStep, Reverse, Truncated, Unrolled

STEPS = 7
WINDOWS = [1, 2, 3, 7]  # 2 and 3 leave a short window at the end
ROUND_OFF = 1e-9  # as in test_estimators.py
TAYLOR = 1e-8  # of the system that the coefficients are the solution of


def count(window, steps=STEPS):
    return -(-steps // window)


def expected(problem, case, window, **more):
    """The hypergradient of the loop in which so many updates share a gradient."""
    return expected_hypergradient(problem, case, STEPS, window=window, **more)


@pytest.fixture(scope="module", params=sampled(OPTIMIZERS, 2), ids=lambda case: case.name)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def problem() -> InnerProblem:
    return small_network(seed=31, steps=STEPS)


@pytest.mark.parametrize("window", WINDOWS)
def test_exact_estimators(problem, case, window):
    answer = expected(problem, case, window)
    slow = [ForwardMode()] if window == 3 else []
    for estimator in [Reverse("graph"), Reverse(2), Unrolled(), Krylov(99), *slow]:
        got = hypergradient(problem, case, STEPS, MultiStep(window, estimator))
        assert relative_error(got, answer) < ROUND_OFF, estimator


@pytest.mark.parametrize("window", WINDOWS[1:])
def test_truncation_counts_windows(problem, case, window):
    for kept in range(min(count(window), 3)):
        got = hypergradient(problem, case, STEPS, MultiStep(window, Truncated(kept)))
        assert relative_error(got, expected(problem, case, window, detach_until=count(window) - kept)) < ROUND_OFF


@pytest.mark.parametrize("window", WINDOWS[1:])
def test_orders_of_curvature_count_windows(problem, case, window):
    degree = count(window)
    graded = taylor(lambda e: expected(problem, case, window, curvature=lambda t: e), degree)
    for order in {0, 1, 2, degree - 1, degree}:
        answer = graded(order)
        for estimator in [Binomial(order), *([Krylov(order)] if order <= 1 else [])]:
            assert relative_error(hypergradient(problem, case, STEPS, MultiStep(window, estimator)), answer) < TAYLOR


def test_losses_counts_and_windows_longer_than_the_problem(problem, case):
    x, y = problem.batches
    for window in (3, 9):
        params = [p.clone().requires_grad_() for p in problem.params]
        solution = solved(problem, case, STEPS, MultiStep(window, Reverse("graph")), params=params)

        def loss(p, t):
            return problem.loss(p, problem.weights, (x[t - 1], y[t - 1]))

        losses: list[float] = []
        more = {"batch": lambda t: (t,), "initial_buffers": case.buffers, "window": window, "losses": losses}
        final = unrolled(case.step, loss, problem.params, STEPS, case.options(case.learned), **more)
        assert relative_error(solution.params, final) < 1e-12
        assert solution.losses.tolist() == pytest.approx(losses, rel=1e-12)
        assert solution.counts.gradients == count(window)
        problem.outer_loss(solution.params).backward()
        assert (solution.counts.gradients, solution.counts.products) == (count(window), count(window))


@pytest.mark.parametrize("per_leaf", [False, True])
@pytest.mark.parametrize("name", ["momentum", "adam", "diagonal"])
@pytest.mark.parametrize("n", [2, 3, 7])
def test_schedules_inside_windows_are_each_updates_own(problem, name, n, per_leaf):
    case = next(c for c in OPTIMIZERS if c.name == name)
    g = torch.Generator().manual_seed(4)
    shapes = [p.shape for p in problem.params] if per_leaf else [()]
    values = [0.02 + 0.1 * torch.rand(STEPS, *shape, generator=g, dtype=torch.float64) for shape in shapes]
    data = tuple(batch[0] for batch in problem.batches)

    def loss(params):
        return problem.loss(params, problem.weights, data)

    leaves = [x.requires_grad_() for x in values]
    at = [lambda t, x=x: x[t - 1] for x in leaves]
    options = {**case.options(case.learned), "lr": at if per_leaf else at[0]}
    final = unrolled(case.step, loss, problem.params, STEPS, options, initial_buffers=case.buffers, window=n)
    answer = torch.autograd.grad(problem.outer_loss(final), leaves)
    assert min(float(x.abs().min()) for x in answer) > 1e-7, "an entry without effect proves nothing"
    for estimator in [
        Reverse("graph"),
        Reverse(2),
        ForwardMode(),
        Binomial(4, scale=1.0),
        Krylov(4),
        Truncated(count(n)),
    ]:
        optimizer = case.optimizer({**case.learned, "lr": diffopt.Schedule(leaves if per_leaf else leaves[0])})
        inputs = {"optimizer": optimizer, "steps": STEPS, "estimator": MultiStep(n, estimator)}
        solution = diffopt.solve(loss, problem.params, **inputs)
        assert relative_error(torch.autograd.grad(problem.outer_loss(solution.params), leaves), answer) < ROUND_OFF


@pytest.mark.parametrize("name", ["momentum", "diagonal"])  # an elementwise one, and one that is not
@pytest.mark.parametrize("estimator", [Reverse(2), Binomial(2, chunk_size=2), Krylov(2), ForwardMode()], ids=str)
def test_schedules_and_batches_of_windows_per_task(problem, name, estimator):
    case, tasks = next(c for c in OPTIMIZERS if c.name == name), 2
    g = torch.Generator().manual_seed(5)
    lr = 0.02 + 0.1 * torch.rand(STEPS, tasks, generator=g, dtype=torch.float64)  # tasks on the last axis
    x = torch.randn(STEPS, tasks, 4, 2, generator=g, dtype=torch.float64)

    def run(lr, x):
        values, batches = {**case.learned, "lr": diffopt.Schedule(lr)}, (x, problem.batches[1])
        solution = solved(problem, case, STEPS, MultiStep(3, estimator), values=values, batches=batches)
        return problem.outer_loss(solution.params)

    together = vmap(grad(run, argnums=(0, 1)), in_dims=(1, 1))(lr, x)
    for i in range(tasks):
        assert relative_error([t[i] for t in together], grad(run, argnums=(0, 1))(lr[:, i], x[:, i])) < ROUND_OFF


@pytest.mark.parametrize("n", [2, 3, 6])
def test_for_plain_descent_it_is_descent_with_a_larger_step_size(problem, n):
    steps, found = 6, []
    for window in (n, 1):
        params = [p.clone().requires_grad_() for p in problem.params]
        weights, lr = problem.weights.clone().requires_grad_(), torch.tensor(0.03, dtype=torch.float64)
        lr.requires_grad_()
        larger, every = (1, 1) if window == n else (n, n)
        given = {"params": params, "weights": weights, "values": {"lr": larger * lr}}
        batches = tuple(b[:steps:every] for b in problem.batches)
        solution = solved(problem, OPTIMIZERS[0], steps // every, MultiStep(window), batches=batches, **given)
        found.append(torch.autograd.grad(problem.outer_loss(solution.params), [*params, weights, lr]))
    assert relative_error(found[0], found[1]) < ROUND_OFF


class TestPropositionOne:
    """Windows of momentum SGD are not momentum SGD with other hyperparameters (derivations, section 5)."""

    LR, MOMENTUM, DECAY = 0.1, 0.9, 1e-4

    @staticmethod
    def coefficients(lr, momentum, decay, steps, estimator):
        """Of the gradient and of the start in the last params and velocity, when the gradient never changes."""
        start, g = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.7, -1.3))
        optimizer = diffopt.SGD(lr, momentum=momentum, weight_decay=decay)
        end = diffopt.solve(lambda w, g: w * g, start, g, optimizer=optimizer, steps=steps, estimator=estimator).state
        rows = [torch.autograd.grad(x, [g, start], retain_graph=True) for x in (end.params, end.buffers["velocity"])]
        return np.array([[float(x) for x in row] for row in rows])

    def windowed(self, steps, window):
        return self.coefficients(self.LR, self.MOMENTUM, self.DECAY, steps, MultiStep(window))

    @pytest.mark.parametrize("n", [1, 2, 4, 6])
    def test_composite_matrices(self, n):
        c = np.array([[1 - self.LR * self.DECAY, -self.LR * self.MOMENTUM], [self.DECAY, self.MOMENTUM]])
        e = np.array([-self.LR, 1.0])
        composite = sum(np.linalg.matrix_power(c, i) @ e for i in range(n))
        got = self.windowed(n, n)
        assert got[:, 0] == pytest.approx(composite, rel=1e-12)
        assert got[:, 1] == pytest.approx(np.linalg.matrix_power(c, n)[:, 0], rel=1e-12)

    @pytest.mark.parametrize("window", [2, 3, 6])
    def test_the_numbers(self, window):
        b5, b7 = self.windowed(4, 2)[0, 0], self.windowed(6, window)[0, 0]
        lr = self.LR * (self.MOMENTUM + 2 - self.LR * self.DECAY)
        momentum = -b5 / lr + lr * self.DECAY - 2
        other = [self.coefficients(lr, momentum, self.DECAY, n, MultiStep(1))[0, 0] for n in (1, 2, 3)]
        assert (lr, momentum) == pytest.approx((0.289999, 1.120337), abs=5e-7)
        assert other[:2] == pytest.approx([self.windowed(2, 2)[0, 0], b5], rel=1e-12)  # two windows can be matched
        assert (other[2], b7) == pytest.approx((-1.883740, -1.782909), abs=5e-7)  # the third cannot


LONG_ENDS = (MultiStep(2, Truncated(3)), 4, 2), (MultiStep(4, Truncated(5)), 10, 3)
TOO_LONG = [*LONG_ENDS, (MultiStep(3, Binomial(1, 3)), 5, 2)]


@pytest.mark.parametrize(("estimator", "steps", "windows"), TOO_LONG, ids=str)
def test_more_windows_than_there_are(estimator, steps, windows):
    told = rf"at most {windows}; .* only {windows} steps \(each window of MultiStep counts as one\): take fewer"
    with pytest.raises(diffopt.StepsError, match=told):
        diffopt.solve(lambda w: w**2, torch.tensor(1.0), optimizer=diffopt.SGD(0.1), steps=steps, estimator=estimator)


def test_windows_of_windows(problem, case):
    twice = hypergradient(problem, case, STEPS, MultiStep(2, MultiStep(2)))
    assert relative_error(twice, expected(problem, case, 4)) < ROUND_OFF
