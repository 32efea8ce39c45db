"""The estimator ``Implicit``, against closed forms, dense linear algebra, and long unrolled loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from implicit_problems import EXACT, INPUTS, SIZE, START, TARGET, THETA, expected, leaf, logistic, newton, normal, outer
from oracles import relative_error
from torch.autograd.functional import hessian, jacobian

import diffopt
from diffopt.estimators import Implicit, Reverse, Truncated
from diffopt.linear_solve import GMRES, Neumann
from diffopt.tasks import Quadratic

# lr times curvature is at most 0.8 * 2.5; 400 steps shrink the distance to below round-off in every case.
OPTIMIZERS = {
    "gd": lambda decay: diffopt.SGD(0.6, weight_decay=decay),
    "momentum": lambda decay: diffopt.SGD(0.4, momentum=0.5, weight_decay=decay),
    "dampened": lambda decay: diffopt.SGD(0.4, momentum=0.5, dampening=0.3, weight_decay=decay),
    "nesterov": lambda decay: diffopt.SGD(0.3, momentum=0.5, nesterov=True, weight_decay=decay),
    "adam": lambda decay: diffopt.Adam(0.05, betas=(0.5, 0.9), eps=0.1, weight_decay=decay),
}


ESTIMATORS = [
    *((name, Implicit(GMRES(rtol=1e-12) if name == "adam" else EXACT)) for name in OPTIMIZERS),
    *((name, Implicit(GMRES(rtol=1e-12), whole_state=True)) for name in ("gd", "momentum", "dampened", "nesterov")),
    ("momentum", Implicit(Neumann(2000, step_size=1.0, rtol=1e-13), whole_state=True)),
]


@pytest.mark.parametrize(("optimizer", "estimator"), ESTIMATORS)
def test_the_fixed_point_of_an_optimizer(optimizer, estimator):
    theta, start, decay = leaf(THETA), leaf(START), leaf(torch.tensor(0.1, dtype=torch.float64))
    options = {"optimizer": OPTIMIZERS[optimizer](decay), "steps": 400, "estimator": estimator}
    outer(diffopt.solve(logistic, start, theta, **options).params).backward()
    right = expected(lambda w, p, d: logistic(w, p) + d / 2 * w @ w, THETA, decay.detach())
    assert relative_error([theta.grad, decay.grad], right) < 1e-9
    assert float(start.grad.abs().max()) < 1e-9


@pytest.mark.parametrize("given_center", [False, True])
def test_implicit_maml(given_center):
    start, theta, strength = leaf(START), leaf(THETA), leaf(torch.tensor(0.7, dtype=torch.float64))
    center = leaf(START) if given_center else None
    options = {"optimizer": diffopt.ProximalGD(0.5, strength, center), "steps": 300, "estimator": Implicit(EXACT)}
    found = diffopt.solve(logistic, start, theta, **options)
    # the center is a buffer of the state: what the outer loss reads of it goes straight to the initial parameters
    (outer(found.params) + (0 if given_center else found.state.buffers["center"] @ INPUTS[0])).backward()
    w = newton(lambda w: logistic(w, THETA) + 0.35 * (w - START).square().sum(), START)
    curvature = hessian(lambda w: logistic(w, THETA), w)
    by_center = torch.linalg.solve(torch.eye(SIZE, dtype=torch.float64) + curvature / 0.7, w - TARGET)
    v = torch.linalg.solve(curvature + 0.7 * torch.eye(SIZE, dtype=torch.float64), w - TARGET)
    got = [center.grad if given_center else start.grad - INPUTS[0], theta.grad, strength.grad]
    assert relative_error(got, [by_center, -v * THETA.exp() * w, -v @ (w - START)]) < 1e-9
    if given_center:
        assert float(start.grad.abs().max()) == 0


def test_tasks_under_vmap_with_shared_and_own_inputs():
    thetas, strength = torch.stack([THETA, THETA + 0.5, THETA - 0.2]), torch.tensor(0.4, dtype=torch.float64)

    def one(theta, start, strength):
        options = {"optimizer": diffopt.ProximalGD(0.5, strength), "steps": 300, "estimator": Implicit(EXACT)}
        return outer(diffopt.solve(logistic, start, theta, INPUTS, **options).params)

    gradient = torch.func.grad(one, argnums=(0, 1, 2))
    got = torch.func.vmap(gradient, (0, None, None))(thetas, START, strength)
    alone = [torch.stack(x) for x in zip(*(gradient(t, START, strength) for t in thetas), strict=True)]
    assert relative_error(got, alone) < 1e-10
    leaves = [leaf(thetas), leaf(START), leaf(strength)]
    torch.func.vmap(one, (0, None, None))(*leaves).sum().backward()
    assert relative_error([x.grad for x in leaves], [alone[0], alone[1].sum(0), alone[2].sum(0)]) < 1e-10


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("terms", [1, 2, 5])
def test_neumann_terms_are_truncated_steps_at_a_stationary_point(terms, momentum):
    solution = newton(logistic, START, THETA)
    solver = Neumann(terms, step_size=1.0, rtol=None, throw=False)
    found, theta = [], leaf(THETA)
    for estimator in (Implicit(solver, whole_state=True), Truncated(terms)):
        options = {"optimizer": diffopt.SGD(0.3, momentum=momentum), "steps": 8, "estimator": estimator}
        end = diffopt.solve(logistic, solution, theta, **options).params
        found.append(torch.autograd.grad(outer(end), theta))
    assert relative_error(*found) < 1e-12


def test_differentiating_the_iterates_comes_to_the_same_in_the_end():
    errors = []
    for steps in (10, 40, 160):
        theta = leaf(THETA)
        found = diffopt.solve(logistic, START, theta, optimizer=diffopt.SGD(0.6), steps=steps, estimator=Reverse())
        (got,) = torch.autograd.grad(outer(found.params), theta)
        errors.append(relative_error([got], expected(logistic, THETA)))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-10


@given(seed=st.integers(0, 2**31), steps=st.integers(1, 25), terms=st.integers(1, 25), lr=st.floats(0.05, 1.0))
def test_the_error_bound_of_approximate_implicit_differentiation(seed, steps, terms, lr):
    """Derivations (6.2) on a quadratic: its constants are known, and those of the second derivatives are zero."""
    problem = Quadratic.random(4, definite=True, generator=torch.Generator().manual_seed(seed))
    b = normal(seed, 4)
    q = 1 - lr * float(torch.linalg.eigvalsh(problem.hessian)[0])
    w, theta = problem.minimiser(b), leaf(b)
    estimator = Implicit(Neumann(terms, step_size=1.0, rtol=None, throw=False))
    zero = torch.zeros(4, dtype=torch.float64)
    found = diffopt.solve(problem.loss, zero, theta, optimizer=diffopt.SGD(lr), steps=steps, estimator=estimator)
    (got,) = torch.autograd.grad(problem.outer_loss(found.params), theta)
    exact = torch.linalg.solve(problem.hessian, w - problem.target)
    slope = float(max((w - problem.target).norm(), (found.params.detach() - problem.target).norm()))
    bound = lr / (1 - q) * (float(w.norm()) * q**steps + slope * q**terms)
    assert float((got - exact).norm()) <= bound * (1 + 1e-9)


@pytest.mark.parametrize("tasks", [None, 2])
def test_costs_and_diagnostics(tasks):
    found = []

    def one(theta, steps):
        options = {"optimizer": diffopt.SGD(0.6), "steps": steps, "estimator": Implicit(EXACT)}
        found.append(diffopt.solve(logistic, START, theta, **options))
        return outer(found[-1].params)

    for steps in (3, 300):
        theta = leaf(THETA if tasks is None else torch.stack([THETA, THETA + 0.1]))
        value = one(theta, steps) if tasks is None else torch.func.vmap(lambda t, n=steps: one(t, n))(theta).sum()
        solution = found[-1]
        assert (solution.kept.states, solution.kept.bytes) == (0, 0)
        assert solution.counts.products == 0
        value.backward()
        iterations, shape = solution.diagnostics["iterations"], () if tasks is None else (tasks,)
        assert {solution.diagnostics[k].shape for k in ("residual", "iterations", "stationarity")} == {shape}
        assert solution.counts.gradients == steps + 1  # one more, for the system
        assert solution.counts.products == int(iterations.max()) + 1
        assert float(solution.diagnostics["residual"].max()) < 1e-11
    far, near = (s.diagnostics["stationarity"].max() for s in found)
    if tasks is None:
        last = found[0].params.detach()
        assert float(far) == pytest.approx(0.6 * float(jacobian(lambda w: logistic(w, THETA), last).norm()), rel=1e-12)
    assert float(near) < 1e-12


@pytest.mark.parametrize("optimizer", [diffopt.SGD(1e-3), diffopt.SGD(1e-3, momentum=0.9)], ids=["sgd", "momentum"])
def test_small_curvature_is_not_lost_beside_the_identity(optimizer):
    """In float32, where ``1 - lr * 1e-4`` keeps one digit of the curvature; the minimiser is ``a``: the slope is 1."""
    a = torch.tensor([2.0, -1.0], requires_grad=True)
    scales = torch.tensor([1.0, 1e-4])

    def loss(w, a):
        return 0.5 * (scales * (w - a).square()).sum()

    end = diffopt.solve(loss, a.detach(), a, optimizer=optimizer, steps=2, estimator=Implicit()).params
    end.sum().backward()
    assert a.grad is not None
    torch.testing.assert_close(a.grad, torch.ones(2), rtol=1e-4, atol=0)


def _averaged(estimator):
    """The gradient of an outer loss of the average of the iterates, for the problem and for the initial params."""
    theta, start = leaf(THETA), leaf(START)
    optimizer = diffopt.EMA(diffopt.SGD(0.4, momentum=0.5), decay=0.5)
    found = diffopt.solve(logistic, start, theta, optimizer=optimizer, steps=400, estimator=estimator)
    outer(found.state.buffers["average"]).backward()
    return theta.grad, start.grad


def test_an_average_of_iterates_is_part_of_the_whole_state():
    theta, start = _averaged(Implicit(GMRES(rtol=1e-13, max_iterations=100), whole_state=True))
    assert relative_error(theta, _averaged(Reverse())[0]) < 1e-9
    assert float(start.abs().max()) == 0


def test_a_loss_of_buffers_that_are_held_fixed_is_told():
    with pytest.warns(diffopt.EstimateWarning, match="depends on the optimizer's buffers, which Implicit holds fixed"):
        theta, start = _averaged(Implicit(EXACT))
    assert float(theta.abs().max()) == 0
    assert float(start.abs().max()) == 0  # the average starts there, and has long forgotten it


def test_a_buffer_that_moves_has_no_derivative_at_the_start():
    theta, velocity = leaf(THETA), leaf(torch.ones(SIZE, dtype=torch.float64))
    start = diffopt.State(START, {"velocity": velocity}, step=3)
    optimizer = diffopt.SGD(0.4, momentum=0.5)
    found = diffopt.solve(logistic, start, theta, optimizer=optimizer, steps=400, estimator=Implicit(EXACT))
    outer(found.params).backward()
    assert theta.grad.any()
    assert not velocity.grad.any()
