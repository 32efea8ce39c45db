"""Implicit differentiation against closed forms, dense linear algebra, re-solving, and long unrolled loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import relative_error
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

import diffopt
from diffopt.estimators import Implicit, Reverse, Truncated
from diffopt.linear_solve import GMRES, ConjugateGradient, Dense, Neumann, Nystrom
from diffopt.tasks import Quadratic, Ridge

SIZE = 5
EXACT = ConjugateGradient(rtol=1e-13)
# Systems are solved to 1e-13 and have condition numbers below 100; the bias of Nystrom is its damping over the
# smallest eigenvalue, about 1.
SOLVERS = [EXACT, Neumann(5000, rtol=1e-13), GMRES(rtol=1e-12), Dense(), Nystrom(SIZE, damping=1e-7)]
CLOSED, DAMPED = 1e-10, 1e-6


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


RIDGE = Ridge.random(20, SIZE, generator=torch.Generator().manual_seed(1))
PENALTIES = 0.3 * normal(2, 3, SIZE)


def ridge_outer(log_penalty: Tensor, solver=EXACT) -> Tensor:
    """The solution keeps its own history here: the implicit gradient must replace it, not add to it."""
    return RIDGE.outer_loss(diffopt.implicit(RIDGE.loss, RIDGE.solution(log_penalty), log_penalty, solver=solver))


# A curved, strongly convex inner problem: logistic regression with one penalty per weight.
INPUTS, TARGET, START = normal(3, 12, SIZE), normal(4, SIZE), normal(5, SIZE)
THETA = 0.3 * normal(6, SIZE) - 0.5


def logistic(w: Tensor, theta: Tensor, inputs: Tensor = INPUTS) -> Tensor:
    return torch.nn.functional.softplus(inputs @ w).mean() + (theta.exp() * w.square()).sum() / 2


def outer(w: Tensor) -> Tensor:
    return (w - TARGET).square().sum() / 2


def newton(loss, w: Tensor, *args: Tensor) -> Tensor:
    for _ in range(12):
        slope = jacobian(lambda w: loss(w, *args), w)
        w = w - torch.linalg.solve(hessian(lambda w: loss(w, *args), w), slope)
    return w


def expected(loss, *args: Tensor) -> list[Tensor]:
    """The minimiser's hypergradients under ``outer``, by dense linear algebra."""
    w = newton(loss, torch.zeros(SIZE, dtype=torch.float64), *args)
    multiplier = torch.linalg.solve(hessian(lambda w: loss(w, *args), w), w - TARGET)

    def slope(*args):
        at = leaf(w)
        return torch.autograd.grad(loss(at, *args), at, create_graph=True)[0]

    mixed = jacobian(slope, args)
    return [-(multiplier @ m.reshape(SIZE, -1)).reshape(x.shape) for m, x in zip(mixed, args, strict=True)]


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


def test_errors_come_early():
    theta = leaf(PENALTIES[0])
    solution, point = RIDGE.solution(PENALTIES[0]), torch.ones(SIZE, dtype=torch.float64)
    with pytest.raises(diffopt.StationarityError, match="Minimise further"):
        diffopt.implicit(RIDGE.loss, point, theta)
    with pytest.raises(diffopt.StationarityError):
        torch.func.vmap(torch.func.grad(lambda p: diffopt.implicit(RIDGE.loss, point, p).sum()))(PENALTIES)
    diffopt.implicit(RIDGE.loss, point, theta, stationarity=None)
    with pytest.raises(diffopt.DisconnectedError):
        diffopt.implicit(lambda w, p: p.sum(), solution, theta)
    with pytest.raises(diffopt.CapturedTensorError):
        diffopt.implicit(lambda w: RIDGE.loss(w, theta), solution)
    with pytest.raises(diffopt.LossError):
        diffopt.implicit(lambda w, p: w * p, solution, theta)
    with pytest.raises(diffopt.EstimatorError, match="linear_solve"):
        diffopt.implicit(RIDGE.loss, solution, theta, solver=ConjugateGradient)
    with pytest.raises(diffopt.EstimatorError, match="linear_solve"):
        Implicit(solver="cg")


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


def test_implicit_gradients_checks_what_it_is_given():
    theta = leaf(PENALTIES[0])
    solution = RIDGE.solution(PENALTIES[0])
    for bad in ([TARGET, TARGET], [TARGET], TARGET[:1], TARGET[:, None]):
        with pytest.raises((diffopt.StructureError, diffopt.ShapeError)):
            diffopt.implicit_gradients(RIDGE.loss, solution, theta, cotangent=bad)
        with pytest.raises((diffopt.StructureError, diffopt.ShapeError)):
            diffopt.implicit_gradients(RIDGE.loss, solution, theta, cotangent=TARGET, start=bad)
    with pytest.raises(diffopt.CapturedTensorError):
        diffopt.implicit_gradients(lambda w: RIDGE.loss(w, theta), solution, cotangent=TARGET)
    with pytest.raises(diffopt.DisconnectedError):
        diffopt.implicit_gradients(lambda w, p: p.sum(), solution, theta, cotangent=TARGET)
    with pytest.raises(diffopt.RandomnessError):
        diffopt.implicit_gradients(
            lambda w, p: RIDGE.loss(w, p) + (torch.rand_like(w) * w).sum(), solution, theta, cotangent=TARGET
        )
    with pytest.raises(diffopt.DiffoptError):
        torch.func.vmap(lambda p: diffopt.implicit_gradients(RIDGE.loss, solution, p, cotangent=TARGET).args[0])(
            PENALTIES
        )


# lr times curvature is at most 0.8 * 2.5; 400 steps shrink the distance to below round-off in every case.
OPTIMIZERS = {
    "gd": lambda decay: diffopt.SGD(0.6, weight_decay=decay),
    "momentum": lambda decay: diffopt.SGD(0.4, momentum=0.5, weight_decay=decay),
    "dampened": lambda decay: diffopt.SGD(0.4, momentum=0.5, dampening=0.3, weight_decay=decay),
    "nesterov": lambda decay: diffopt.SGD(0.3, momentum=0.5, nesterov=True, weight_decay=decay),
    "adam": lambda decay: diffopt.Adam(0.05, betas=(0.5, 0.9), eps=0.1, weight_decay=decay),
}


@pytest.mark.parametrize(
    ("optimizer", "estimator"),
    [(name, Implicit(GMRES(rtol=1e-12) if name == "adam" else EXACT)) for name in OPTIMIZERS]
    + [(name, Implicit(GMRES(rtol=1e-12), whole_state=True)) for name in ("gd", "momentum", "dampened", "nesterov")]
    + [("momentum", Implicit(Neumann(2000, step_size=1.0, rtol=1e-13), whole_state=True))],
)
def test_the_fixed_point_of_an_optimizer(optimizer, estimator):
    theta, start, decay = leaf(THETA), leaf(START), leaf(torch.tensor(0.1, dtype=torch.float64))
    found = diffopt.solve(
        logistic, start, theta, optimizer=OPTIMIZERS[optimizer](decay), steps=400, estimator=estimator
    )
    outer(found.params).backward()
    right = expected(lambda w, p, d: logistic(w, p) + d / 2 * w @ w, THETA, decay.detach())
    assert relative_error([theta.grad, decay.grad], right) < 1e-9
    assert float(start.grad.abs().max()) < 1e-9


@pytest.mark.parametrize("given_center", [False, True])
def test_implicit_maml(given_center):
    start, theta, strength = leaf(START), leaf(THETA), leaf(torch.tensor(0.7, dtype=torch.float64))
    center = leaf(START) if given_center else None
    found = diffopt.solve(
        logistic,
        start,
        theta,
        optimizer=diffopt.ProximalGD(0.5, strength, center),
        steps=300,
        estimator=Implicit(EXACT),
    )
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
        found = diffopt.solve(
            logistic,
            start,
            theta,
            INPUTS,
            optimizer=diffopt.ProximalGD(0.5, strength),
            steps=300,
            estimator=Implicit(EXACT),
        )
        return outer(found.params)

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
    got, truncated = (
        torch.autograd.grad(
            outer(
                diffopt.solve(
                    logistic,
                    solution,
                    theta,
                    optimizer=diffopt.SGD(0.3, momentum=momentum),
                    steps=8,
                    estimator=estimator,
                ).params
            ),
            theta,
        )[0]
        for theta in [leaf(THETA)]
        for estimator in (Implicit(solver, whole_state=True), Truncated(terms))
    )
    assert relative_error([got], [truncated]) < 1e-12


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
    found = diffopt.solve(
        problem.loss,
        torch.zeros(4, dtype=torch.float64),
        theta,
        optimizer=diffopt.SGD(lr),
        steps=steps,
        estimator=Implicit(Neumann(terms, step_size=1.0, rtol=None, throw=False)),
    )
    (got,) = torch.autograd.grad(problem.outer_loss(found.params), theta)
    exact = torch.linalg.solve(problem.hessian, w - problem.target)
    slope = float(max((w - problem.target).norm(), (found.params.detach() - problem.target).norm()))
    bound = lr / (1 - q) * (float(w.norm()) * q**steps + slope * q**terms)
    assert float((got - exact).norm()) <= bound * (1 + 1e-9)


@pytest.mark.parametrize("tasks", [None, 2])
def test_costs_and_diagnostics(tasks):
    found = []

    def one(theta, steps):
        found.append(
            diffopt.solve(logistic, START, theta, optimizer=diffopt.SGD(0.6), steps=steps, estimator=Implicit(EXACT))
        )
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
        assert solution.counts.gradients == steps + 2  # one for the system, one to check that the loss repeats itself
        assert solution.counts.products == int(iterations.max()) + 1
        assert float(solution.diagnostics["residual"].max()) < 1e-11
    far, near = (s.diagnostics["stationarity"].max() for s in found)
    if tasks is None:
        last = found[0].params.detach()
        assert float(far) == pytest.approx(0.6 * float(jacobian(lambda w: logistic(w, THETA), last).norm()), rel=1e-12)
    assert float(near) < 1e-13


def test_implicit_gradients_is_the_same_as_a_plain_function():
    solution, index = RIDGE.solution(PENALTIES[0]), torch.arange(SIZE)
    cotangent = jacobian(RIDGE.outer_loss, solution)

    def loss(w, tree, index, factor):
        return factor * RIDGE.loss(w["w"], tree["p"][index])

    options = {"cotangent": {"w": cotangent}, "solver": EXACT}
    first = diffopt.implicit_gradients(loss, {"w": solution}, {"p": PENALTIES[0]}, index, 2.0, **options)
    assert relative_error([first.args[0]["p"]], [RIDGE.hypergradient(PENALTIES[0])]) < CLOSED
    assert first.args[1:] == (None, None)
    matrix = hessian(lambda w: 2 * RIDGE.loss(w, PENALTIES[0]), solution)
    assert relative_error([first.multiplier["w"]], [torch.linalg.solve(matrix, cotangent)]) < CLOSED
    options["solver"] = ConjugateGradient(rtol=1e-10)
    again = diffopt.implicit_gradients(
        loss, {"w": solution}, {"p": PENALTIES[0]}, index, 2.0, **options, start=first.multiplier
    )
    assert (int(again.system.iterations), bool(again.system.converged)) == (1, True)


@pytest.mark.parametrize(("warm", "low", "high"), [(True, 0.0, 1e-10), (False, 1e-2, np.inf)])
def test_the_memory_reduced_algorithm(warm, low, high):
    """Derivations 6.3: two inner steps and one iteration of conjugate gradients per task and outer step.

    With ``phi`` and the multiplier kept per task from one outer step to the next, this finds a stationary point of the
    outer loss; from cold starts it settles where the hypergradient is zero and the gradient is not.
    """
    targets, mixing = normal(20, 3, SIZE), normal(21, 3, SIZE, 2)
    scales = torch.tensor([[0.3, 0.5, 0.7, 0.9, 1.0]], dtype=torch.float64).expand(3, -1)

    def loss(phi, theta, i):
        return (scales[i] * phi.square()).sum() / 2 - phi @ mixing[i] @ theta + 0.2 * (1 + phi.square()).sqrt().sum()

    def true_gradient(theta):
        total = 0.1 * theta
        for i in range(3):
            phi = newton(lambda phi, i=i: loss(phi, theta, i), torch.zeros(SIZE, dtype=torch.float64))
            v = torch.linalg.solve(hessian(lambda phi, i=i: loss(phi, theta, i), phi), phi - targets[i])
            total = total + v @ mixing[i] / 3
        return total

    one_iteration = ConjugateGradient(max_iterations=1, rtol=0.0, throw=False)
    theta, zero = torch.ones(2, dtype=torch.float64), torch.zeros(SIZE, dtype=torch.float64)
    phi: list[Tensor] = [zero] * 3
    v: list[Tensor] = [zero] * 3
    for _ in range(300):
        hypergradient = 0.1 * theta
        for i in range(3):
            start, multiplier = (phi[i], v[i]) if warm else (zero, zero)
            inner = diffopt.solve(loss, start, theta, i, optimizer=diffopt.SGD(0.7), steps=2)
            phi[i] = inner.params
            found = diffopt.implicit_gradients(
                loss, phi[i], theta, i, cotangent=phi[i] - targets[i], solver=one_iteration, start=multiplier
            )
            v[i] = found.multiplier
            hypergradient = hypergradient + found.args[0] / 3
        theta = theta - 0.1 * hypergradient
    assert low <= float(true_gradient(theta).norm()) < high
