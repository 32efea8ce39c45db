"""Implicit differentiation against closed forms, dense linear algebra, re-solving, and long unrolled loops."""

from __future__ import annotations

import pytest
import torch
from implicit_problems import EXACT, PENALTIES, RIDGE, SIZE, START, TARGET, THETA, leaf, logistic, newton, normal, outer
from oracles import relative_error
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

import diffopt
from diffopt.estimators import Implicit
from diffopt.linear_solve import GMRES, ConjugateGradient, Dense, Neumann, Nystrom

# Systems are solved to 1e-13 and have condition numbers below 100; the bias of Nystrom is its damping over the
# smallest eigenvalue, about 1.
SOLVERS = [EXACT, Neumann(5000, rtol=1e-13), GMRES(rtol=1e-12), Dense(), Nystrom(SIZE, damping=1e-7)]
CLOSED, DAMPED = 1e-10, 1e-6


def ridge_outer(log_penalty: Tensor, solver=EXACT) -> Tensor:
    """The solution keeps its own history here: the implicit gradient must replace it, not add to it."""
    return RIDGE.outer_loss(diffopt.implicit(RIDGE.loss, RIDGE.solution(log_penalty), log_penalty, solver=solver))


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_ridge_has_its_closed_form(solver):
    theta = leaf(PENALTIES[0])
    ridge_outer(theta, solver).backward()
    tolerance = DAMPED if isinstance(solver, Nystrom) else CLOSED
    assert relative_error([theta.grad], [RIDGE.hypergradient(PENALTIES[0])]) < tolerance


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_transforms_over_problems(solver):
    solver = GMRES(SIZE, rtol=1e-12) if isinstance(solver, GMRES) else solver
    tolerance = DAMPED if isinstance(solver, Nystrom) else CLOSED
    each = [torch.stack([RIDGE.hypergradient(p) for p in PENALTIES])]

    def one(p):
        return ridge_outer(p, solver)

    assert relative_error([torch.func.vmap(torch.func.grad(one))(PENALTIES)], each) < tolerance
    assert relative_error([torch.func.grad(lambda p: torch.func.vmap(one)(p).sum())(PENALTIES)], each) < tolerance
    theta = leaf(PENALTIES)
    torch.func.vmap(one)(theta).sum().backward()
    assert relative_error([theta.grad], each) < tolerance
    twice = torch.func.vmap(torch.func.vmap(torch.func.grad(one)))(PENALTIES[None])
    assert relative_error([twice[0]], each) < tolerance


def test_trees_and_arguments_of_every_kind():
    inputs, labels = normal(7, 9, 2), torch.tensor([0, 1, 2, 1, 0, 2, 2, 1, 0])

    def loss(params, weights, labels, extra):
        scores = inputs @ params["layer"][0] + params["bias"]
        errors = torch.nn.functional.cross_entropy(scores, labels, reduction="none")
        penalty = (
            weights["penalty"].exp() * params["layer"][0].square().sum()
            + extra["decay"] * params["bias"] @ params["bias"]
        )
        return (weights["example"].sigmoid() * errors).mean() + penalty

    def flat(w, example, penalty):
        tree = {"layer": (w[:6].reshape(2, 3),), "bias": w[6:]}
        return loss(tree, {"example": example, "penalty": penalty}, labels, {"decay": 0.2})

    example, penalty = leaf(normal(8, 9)), leaf(torch.tensor(-1.5, dtype=torch.float64))
    w = newton(flat, torch.zeros(9, dtype=torch.float64), example.detach(), penalty.detach())
    params = {"layer": (w[:6].reshape(2, 3),), "bias": w[6:]}
    constant = torch.tensor(0.2, dtype=torch.float64)
    found = diffopt.implicit(loss, params, {"example": example, "penalty": penalty}, labels, {"decay": constant})
    assert torch.equal(found["bias"], w[6:])
    (found["layer"][0].square().sum() + found["bias"][0]).backward()
    cotangent = torch.cat([2 * w[:6], torch.tensor([1.0, 0, 0], dtype=torch.float64)])
    v = torch.linalg.solve(hessian(lambda w: flat(w, example.detach(), penalty.detach()), w), cotangent)

    def slope(example, penalty):
        at = leaf(w)
        return torch.autograd.grad(flat(at, example, penalty), at, create_graph=True)[0]

    mixed = jacobian(slope, (example.detach(), penalty.detach()))
    # the default solver stops at 1e-5
    assert relative_error([example.grad, penalty.grad], [-v @ mixed[0], -v @ mixed[1]]) < 1e-3
    assert constant.grad is None


@pytest.mark.parametrize("unit", [1e-2, 1e-3, 1e-9])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_units_of_the_loss_do_not_hide_that_it_was_not_minimised(unit: float, axis: int) -> None:
    """Of a quadratic, off along an eigenvector, the Newton step is the distance; 0.1 * (1 + |w|) of it are allowed."""
    scales, minimum = torch.tensor([0.5, 4.0], dtype=torch.float64), torch.tensor([2.0, 3.0], dtype=torch.float64)

    def gradient(distance: float) -> torch.Tensor:
        w, a = minimum.clone(), leaf(minimum)
        w[axis] -= distance

        def loss(w: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
            return unit * (scales * (w - a).square()).sum()

        torch.func.vmap(lambda w: diffopt.implicit(loss, w, a, solver=EXACT))(w[None]).sum().backward()
        assert a.grad is not None
        return a.grad

    torch.testing.assert_close(gradient(0.4), torch.ones(2, dtype=torch.float64))  # |w| is 3.3 to 3.4
    with pytest.raises(diffopt.StationarityError, match=r"5\.0e-01 or more from the stationary point"):
        gradient(0.5)


@pytest.mark.parametrize("unit", [1.0, 1e-8, 1e-16])
@pytest.mark.parametrize("least", [1.0, 1e-6])
def test_small_curvature_is_not_lost_beside_the_identity(unit: float, least: float) -> None:
    """The Hessian is diagonal, so each product has the relative precision of float32, whatever its size."""
    a, minimum = torch.ones(2, requires_grad=True), torch.ones(2)
    scales = unit * torch.tensor([1.0, least])

    def loss(w: Tensor, a: Tensor) -> Tensor:
        return (scales * (w - a).square()).sum()

    diffopt.implicit(loss, minimum, a).sum().backward()
    torch.testing.assert_close(a.grad, torch.ones(2), rtol=1e-5, atol=0)
    found = diffopt.implicit_gradients(loss, minimum, a, cotangent=torch.ones(2)).args[0]
    torch.testing.assert_close(found, torch.ones(2), rtol=1e-5, atol=0)


def test_a_solution_of_scikit_learn_against_refitting():
    linear_model = pytest.importorskip("sklearn.linear_model")
    inputs, labels = normal(9, 40, 3), (normal(9, 40, 3)[:, 0] + normal(10, 40) > 0).double()

    def fit(c, inputs):
        model = linear_model.LogisticRegression(C=c, solver="newton-cholesky", tol=1e-12)
        model.fit(inputs.numpy(), labels.numpy())
        return {"coef": torch.from_numpy(model.coef_[0]), "intercept": torch.from_numpy(model.intercept_)}

    def loss(params, c, inputs):
        scores = inputs @ params["coef"] + params["intercept"]
        errors = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels, reduction="sum")
        return c * errors + params["coef"].square().sum() / 2

    def judge(params):
        return params["coef"].square().sum() + params["intercept"].sum()

    c, data = leaf(torch.tensor(0.7, dtype=torch.float64)), leaf(inputs)
    judge(diffopt.implicit(loss, fit(0.7, inputs), c, data, solver=EXACT)).backward()
    # central differences with step 1e-4: truncation of order 1e-8, round-off 1e-12 / 1e-4
    step = 1e-4
    by_c = (judge(fit(0.7 + step, inputs)) - judge(fit(0.7 - step, inputs))) / (2 * step)
    direction = normal(11, 40, 3)
    by_data = (judge(fit(0.7, inputs + step * direction)) - judge(fit(0.7, inputs - step * direction))) / (2 * step)
    assert relative_error([c.grad, (data.grad * direction).sum()], [by_c, by_data]) < 1e-6


def test_a_point_that_is_no_minimum_is_refused_unless_asked_for():
    theta = leaf(PENALTIES[0])
    point = torch.ones(SIZE, dtype=torch.float64)
    with pytest.raises(diffopt.StationarityError, match="minimise further"):
        diffopt.implicit(RIDGE.loss, point, theta)
    with pytest.raises(diffopt.StationarityError):
        torch.func.vmap(torch.func.grad(lambda p: diffopt.implicit(RIDGE.loss, point, p).sum()))(PENALTIES)
    diffopt.implicit(RIDGE.loss, point, theta, stationarity=None)


def test_a_second_derivative_is_refused():
    theta = leaf(PENALTIES[0])
    (first,) = torch.autograd.grad(ridge_outer(theta), theta, create_graph=True)
    with pytest.raises(diffopt.SecondDerivativeError):
        first.sum().backward()


@pytest.mark.parametrize("solver", [ConjugateGradient(1), GMRES(1), Neumann(1)], ids=lambda s: type(s).__name__)
def test_an_unsolved_system_raises_in_the_backward_pass(solver):
    theta = leaf(PENALTIES[0])
    value = ridge_outer(theta, solver)
    with pytest.raises(diffopt.LinearSolveError):
        value.backward()
    with pytest.raises(diffopt.LinearSolveError):
        torch.func.vmap(torch.func.grad(lambda p: ridge_outer(p, solver)))(PENALTIES)
    found = diffopt.solve(logistic, START, theta, optimizer=diffopt.SGD(0.6), steps=50, estimator=Implicit(solver))
    with pytest.raises(diffopt.LinearSolveError):
        outer(found.params).backward()
    with pytest.raises(diffopt.LinearSolveError):
        diffopt.implicit_gradients(RIDGE.loss, RIDGE.solution(PENALTIES[0]), theta, cotangent=TARGET, solver=solver)


def test_a_saddle_is_refused():
    theta = leaf(torch.tensor([0.0, 0.0]))
    w = diffopt.implicit(lambda w, p: (w[0] ** 2 - w[1] ** 2) / 2 - p @ w, torch.zeros(2), theta)
    with pytest.raises(diffopt.LinearSolveError, match="minimum"):
        w.sum().backward()


@pytest.mark.parametrize("make", ["implicit", "Implicit"])
def test_a_random_loss_is_refused(make):
    theta = leaf(THETA)

    def noisy(w, p):
        return logistic(w, p) + 1e-3 * (torch.rand_like(w) * w).sum()

    with pytest.raises(diffopt.RandomnessError):  # noqa: PT012
        if make == "implicit":
            w = diffopt.implicit(noisy, newton(logistic, START, THETA), theta)
        else:
            w = diffopt.solve(noisy, START, theta, optimizer=diffopt.SGD(0.5), steps=3, estimator=Implicit()).params
        w.sum().backward()


@pytest.mark.parametrize("check", [True, False])
def test_an_infinite_outer_gradient_is_not_a_hypergradient_of_zero(check):
    theta = leaf(PENALTIES[0])
    w = diffopt.implicit(RIDGE.loss, RIDGE.solution(PENALTIES[0]), theta, check=check)
    with pytest.raises((diffopt.LinearSolveError, diffopt.NonFiniteGradientError)):
        (w.sum() * float("inf")).backward()


def counted(calls: list[None]):
    def loss(w, penalty):
        calls.append(None)
        return RIDGE.loss(w, penalty)

    return loss


def test_the_inner_gradient_is_recorded_once_and_again_for_a_second_backward_pass():
    calls, theta = [], leaf(PENALTIES[0])
    point = RIDGE.solution(PENALTIES[0])
    value = RIDGE.outer_loss(diffopt.implicit(counted(calls), point, theta, solver=EXACT, stationarity=None))
    for evaluations in (1, 2):
        (found,) = torch.autograd.grad(value, theta, retain_graph=True)
        assert relative_error([found], [RIDGE.hypergradient(PENALTIES[0])]) < CLOSED
        assert len(calls) == evaluations


def test_a_graph_that_is_too_large_is_recorded_in_the_backward_pass(monkeypatch):
    monkeypatch.setattr("diffopt.rollout.keeper.GRAPH_BUDGET", 0)
    calls, theta = [], leaf(PENALTIES[0])
    point = RIDGE.solution(PENALTIES[0])
    solution = diffopt.implicit(counted(calls), point, theta, solver=EXACT)
    before = len(calls)
    RIDGE.outer_loss(solution).backward()
    assert len(calls) > before
    assert relative_error([theta.grad], [RIDGE.hypergradient(PENALTIES[0])]) < CLOSED


def test_implicit_gradients_evaluate_the_loss_once():
    calls, theta = [], PENALTIES[0]
    point = RIDGE.solution(theta)
    cotangent = torch.func.grad(RIDGE.outer_loss)(point)
    found = diffopt.implicit_gradients(counted(calls), point, theta, cotangent=cotangent, solver=EXACT)
    assert relative_error([found.args[0]], [RIDGE.hypergradient(theta)]) < CLOSED
    assert len(calls) == 1


def test_a_number_that_changes_before_the_backward_pass_does_not_change_what_was_recorded():
    factor, theta = [1.0], leaf(PENALTIES[0])
    point = RIDGE.solution(PENALTIES[0])
    solution = diffopt.implicit(lambda w, p: factor[0] * RIDGE.loss(w, p), point, theta, solver=EXACT)
    factor[0] = 5.0
    RIDGE.outer_loss(solution).backward()
    assert relative_error([theta.grad], [RIDGE.hypergradient(PENALTIES[0])]) < CLOSED
