"""Warm starts against derivations, section 6.3: by hand, over tasks, and to where the theory says that they lead."""

from __future__ import annotations

import pytest
import torch
from oracles import relative_error

import diffopt
from diffopt import SGD, WarmStarts
from diffopt.linear_solve import GMRES, ConjugateGradient, Dense

TASKS, SIZE = 8, 4


def double(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CURVATURES = torch.stack([x @ x.T / SIZE + 0.5 * torch.eye(SIZE) for x in double(TASKS, SIZE, SIZE, seed=1)])
TARGETS = double(TASKS, SIZE, seed=2)


def inner(w, theta, curvature, target):
    """Strongly convex: the minimum is the solution of ``curvature w = theta + target``."""
    return w @ curvature @ w / 2 - w @ (theta + target)


def outer(w, theta, curvature, target):
    return (w - target).square().sum() / 2 + 0.1 * theta.square().sum()


def exact(theta, tasks=slice(None)):
    """The gradient of the mean outer loss at the exact minima."""
    theta = theta.clone().requires_grad_()
    minima = torch.linalg.solve(CURVATURES[tasks], theta + TARGETS[tasks])
    mean = (minima - TARGETS[tasks]).square().sum(1).mean() / 2 + 0.1 * theta.square().sum()
    return torch.autograd.grad(mean, theta)[0]


def test_one_call_is_the_algorithm_by_hand():
    """Two steps of gradient descent, one step of conjugate gradients from the multiplier, one mixed product."""
    method = WarmStarts(inner, outer, optimizer=SGD(0.1), steps=2)
    theta, w, v = double(SIZE, seed=3), double(SIZE, seed=4), double(SIZE, seed=5)
    curvature, target = CURVATURES[0], TARGETS[0]
    value, gradients, warm = method(diffopt.warm_starts.Warm(w, v), theta, curvature, target)
    for _ in range(2):
        w = w - 0.1 * (curvature @ w - theta - target)
    residual = w - target - curvature @ v
    v = v + (residual @ residual) / (residual @ curvature @ residual) * residual
    expected = [0.2 * theta + v, -torch.outer(v, w) / 2 - torch.outer(w, v) / 2, v + target - w]
    torch.testing.assert_close(value, outer(w, theta, curvature, target))
    torch.testing.assert_close((warm.params, warm.multiplier), (w, v), rtol=1e-12, atol=1e-13)
    got = [gradients[0], (gradients[1] + gradients[1].T) / 2, gradients[2]]
    assert relative_error(got, expected) < 1e-12


def test_tasks_under_vmap_are_the_tasks_one_by_one():
    method = WarmStarts(inner, outer, optimizer=SGD(0.1, momentum=0.5), steps=3)
    theta, starts = double(SIZE, seed=3), double(TASKS, SIZE, seed=4)
    batched = torch.func.vmap(method, (0, None, 0, 0))(
        torch.func.vmap(method.start)(starts), theta, CURVATURES, TARGETS
    )
    for i in range(TASKS):
        alone = method(method.start(starts[i]), theta, CURVATURES[i], TARGETS[i])
        row = diffopt.tensors.tree.map_leaves(lambda x, i=i: x[i], batched)
        torch.testing.assert_close(tuple(row), tuple(alone), rtol=1e-12, atol=1e-13)


def descend(iterations, lr, tasks_at_a_time, cold=False, runs=1):
    """Norms of the exact gradient along the way, of runs with draws of tasks of their own, ``[iterations, runs]``."""
    method = WarmStarts(inner, outer, optimizer=SGD(0.2), steps=1)
    theta, generator = double(SIZE, seed=3).expand(runs, SIZE), torch.Generator().manual_seed(0)
    every = torch.func.vmap(torch.func.vmap(method, (0, None, 0, 0)))
    params, multipliers = torch.zeros(2, runs, TASKS, SIZE, dtype=torch.float64)
    numbers, norms = torch.arange(runs)[:, None], []
    for _ in range(iterations):
        rows = torch.stack([torch.randperm(TASKS, generator=generator)[:tasks_at_a_time] for _ in range(runs)])
        warm = diffopt.warm_starts.Warm(params[numbers, rows], multipliers[numbers, rows])
        _, gradients, warm = every(warm, theta, CURVATURES[rows], TARGETS[rows])
        if not cold:
            params[numbers, rows], multipliers[numbers, rows] = warm
        theta = theta - lr * gradients[0].mean(1)
        norms.append([float(exact(x).norm()) for x in theta])
    return torch.tensor(norms)


@pytest.mark.slow
def test_all_tasks_at_a_time_reach_a_stationary_point_with_constants():
    """Theorem 2: one inner step and one iteration for each outer step lead to where the exact gradient is zero."""
    warm, cold = (descend(320, 0.2, TASKS, cold=cold)[:, 0] for cold in (False, True))
    assert warm[-1] < 1e-5 * warm[0]
    assert cold[-1] > 1e-2 * cold[0]


@pytest.mark.slow
def test_the_error_falls_with_the_number_of_tasks_at_a_time():
    """Theorem 1: near a stationary point up to a term like one over the number of tasks."""
    first, second, third = (descend(250, 0.1, count, runs=4)[50:].square().mean() for count in (1, 2, 4))
    # drawn without replacement from 8, the variance of a mean is as 7, 3 and 1 are to one another
    assert 1.5 < first / second < 3.5
    assert 2.0 < second / third < 4.5


def test_trees_and_arguments_that_are_no_tensors():
    def loss(params, settings, x):
        return settings["scale"] * (params["a"] * x - settings["theta"]).square().sum() + params["b"][0].square()

    method = WarmStarts(loss, lambda p, settings, x: (p["a"] - 1).square().sum(), optimizer=SGD(0.1), steps=2)
    params = {"a": torch.ones(3), "b": [torch.tensor(2.0)]}
    settings = {"theta": torch.zeros(3), "scale": 0.5, "kind": "text"}
    value, gradients, warm = method(method.start(params), settings, torch.arange(1, 4))
    assert gradients[0]["kind"] is None
    assert gradients[0]["scale"] is None
    assert gradients[0]["theta"].shape == (3,)
    assert gradients[1] is None
    assert warm.params["b"][0].shape == ()
    assert value.ndim == 0


def test_a_solver_that_is_exact_gives_the_implicit_gradient():
    method = WarmStarts(inner, outer, optimizer=SGD(0.2), steps=400, solver=Dense())
    theta = double(SIZE, seed=3)
    found = method(method.start(torch.zeros(SIZE, dtype=torch.float64)), theta, CURVATURES[2], TARGETS[2])
    assert relative_error([found.gradients[0]], [exact(theta, slice(2, 3))]) < 1e-9


def test_the_multiplier_of_a_field_starts_warm_too():
    field = diffopt.VectorField(lambda w, theta, curvature, target: curvature @ w - theta - target)
    turning = CURVATURES[0] + torch.tensor([[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    method = WarmStarts(field, outer, optimizer=SGD(0.2), steps=400, solver=GMRES())
    theta = double(SIZE, seed=3).requires_grad_()
    found = method(method.start(torch.zeros(SIZE, dtype=torch.float64)), theta, turning, TARGETS[0])
    root = torch.linalg.solve(turning, theta + TARGETS[0])
    expected = torch.autograd.grad(outer(root, theta, turning, TARGETS[0]), theta)
    assert relative_error([found.gradients[0]], expected) < 1e-8


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"loss": 3}, "loss is int 3"),
        ({"outer_loss": None}, "outer_loss is NoneType"),
        ({"steps": -1}, "WarmStarts: steps is int -1"),
        ({"solver": "cg"}, "solver is str 'cg'"),
    ],
)
def test_options_that_are_none_are_refused(change, told):
    options = {"loss": inner, "outer_loss": outer, "optimizer": SGD(0.1), "steps": 1, **change}
    with pytest.raises(diffopt.DiffoptError, match=told):
        WarmStarts(options.pop("loss"), options.pop("outer_loss"), **options)


@pytest.mark.parametrize(
    ("outer_loss", "told"),
    [
        (lambda w, a: w, "outer_loss returned a float32 tensor of shape"),
        (lambda w, a: (w.sum(), 1), "outer_loss returned tuple"),
        (lambda w, a: (w.sum() * LEAF).sum(), "outer_loss reads a tensor that requires grad"),
        (lambda w, a: torch.ones(()), "outer_loss depends on nothing"),
    ],
)
def test_outer_losses_that_are_none_are_refused(outer_loss, told):
    method = WarmStarts(lambda w, a: (w - a).square().sum(), outer_loss, optimizer=SGD(0.1), steps=1)
    with pytest.raises(diffopt.DiffoptError, match=told):
        method(method.start(torch.ones(2)), torch.zeros(2))


LEAF = torch.ones(2, requires_grad=True)


def test_an_unsolved_system_is_an_error_if_the_solver_throws():
    solver = ConjugateGradient(max_iterations=1, rtol=1e-12)
    method = WarmStarts(inner, outer, optimizer=SGD(0.1), steps=1, solver=solver)
    with pytest.raises(diffopt.LinearSolveError):
        method(method.start(torch.zeros(SIZE, dtype=torch.float64)), double(SIZE), CURVATURES[0], TARGETS[0])
