"""``implicit_gradients``, the implicit hypergradient as a plain function, and the outer loop that warm-starts it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from implicit_problems import EXACT, PENALTIES, RIDGE, SIZE, TARGET, leaf, newton, normal
from oracles import relative_error
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

import diffopt
from diffopt.linear_solve import ConjugateGradient

SLOW = pytest.mark.slow

CLOSED = 1e-10  # systems are solved to 1e-13 and have condition numbers below 100


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
    given = {**options, "start": first.multiplier}
    again = diffopt.implicit_gradients(loss, {"w": solution}, {"p": PENALTIES[0]}, index, 2.0, **given)
    assert (int(again.system.iterations), bool(again.system.converged)) == (1, True)


@pytest.mark.parametrize(("warm", "low", "high"), [(True, 0.0, 1e-10), pytest.param(False, 1e-2, np.inf, marks=SLOW)])
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
            options = {"cotangent": phi[i] - targets[i], "solver": one_iteration, "start": multiplier}
            found = diffopt.implicit_gradients(loss, phi[i], theta, i, **options)
            v[i] = found.multiplier
            hypergradient = hypergradient + found.args[0] / 3
        theta = theta - 0.1 * hypergradient
    assert low <= float(true_gradient(theta).norm()) < high


# ------------------------------------------------------------------------------------------ under transforms


def solved(theta: Tensor, cotangent: Tensor, start: Tensor | None = None):
    solution = RIDGE.solution(theta)
    return diffopt.implicit_gradients(RIDGE.loss, solution, theta, cotangent=cotangent, solver=EXACT, start=start)


def test_many_problems_at_once():
    """Each with a system of its own: the numbers of a loop, how it was solved included."""
    cotangents = normal(30, 3, SIZE)
    found = torch.func.vmap(solved)(PENALTIES, cotangents)
    for i in range(3):
        alone = solved(PENALTIES[i], cotangents[i])
        assert relative_error([found.args[0][i], found.multiplier[i]], [alone.args[0], alone.multiplier]) < CLOSED
        assert found.system.converged[i]
        assert found.system.iterations[i] == alone.system.iterations
    again = torch.func.vmap(solved)(PENALTIES, cotangents, found.multiplier)
    assert again.system.iterations.tolist() == [1, 1, 1]


@pytest.mark.parametrize("dims", [(0, None), (None, 0)], ids=["a shared cotangent", "a shared problem"])
def test_what_all_problems_share(dims):
    """A shared argument has a hypergradient for each problem."""
    inputs = (PENALTIES, TARGET) if dims == (0, None) else (PENALTIES[0], normal(31, 3, SIZE))
    found = torch.func.vmap(solved, in_dims=dims)(*inputs)
    for i in range(3):
        alone = solved(*(x if dim is None else x[i] for x, dim in zip(inputs, dims, strict=True)))
        assert relative_error([found.args[0][i], found.multiplier[i]], [alone.args[0], alone.multiplier]) < CLOSED


def test_nested_and_on_other_axes():
    cotangents = normal(32, 3, SIZE, 2)
    over_both = torch.func.vmap(torch.func.vmap(solved, in_dims=(None, 1)), in_dims=(0, 0))
    found = over_both(PENALTIES, cotangents)
    for i in range(3):
        for j in range(2):
            alone = solved(PENALTIES[i], cotangents[i, :, j])
            assert relative_error([found.args[0][i, j]], [alone.args[0]]) < CLOSED


def test_fields_of_many_problems():
    matrix = torch.eye(2, dtype=torch.float64) + normal(33, 2, 2)
    field = diffopt.VectorField(lambda z, m, a: m @ z - a)

    def one(a, cotangent):
        return diffopt.implicit_gradients(field, torch.linalg.solve(matrix, a), matrix, a, cotangent=cotangent)

    aims, cotangents = normal(34, 4, 2), normal(35, 4, 2)
    found = torch.func.vmap(one)(aims, cotangents)
    multipliers = torch.linalg.solve(matrix.T, cotangents.T).T
    assert relative_error([found.args[1], found.multiplier], [multipliers, multipliers]) < 1e-4
    roots = torch.linalg.solve(matrix, aims.T).T
    assert relative_error([found.args[0]], [-multipliers[:, :, None] * roots[:, None]]) < 1e-4


def test_beside_what_a_transform_differentiates():
    """Used as numbers it is no matter; its own derivative is refused, never zero without a word."""

    def outer(scale, theta):
        return (scale * solved(theta.detach(), TARGET).args[0]).sum()

    alone = solved(PENALTIES[0], TARGET).args[0].sum()
    got = torch.func.grad(outer)(torch.tensor(2.0, dtype=torch.float64), PENALTIES[0])
    assert relative_error([got], [alone]) < CLOSED
    each = torch.func.vmap(torch.func.grad(outer), in_dims=(0, None))(torch.ones(2, dtype=torch.float64), PENALTIES[0])
    assert relative_error([each], [alone.expand(2)]) < CLOSED
    for transformed in (
        lambda: torch.func.grad(lambda theta: solved(theta, TARGET).args[0].sum())(PENALTIES[0]),
        lambda: torch.func.grad(lambda theta: torch.func.vmap(solved)(theta, PENALTIES).args[0].sum())(PENALTIES),
        lambda: torch.func.vmap(torch.func.grad(lambda theta: solved(theta, TARGET).multiplier.sum()))(PENALTIES),
    ):
        with pytest.raises(diffopt.SecondDerivativeError, match="implicit_gradients"):
            transformed()


def test_a_batch_with_an_unsolved_system_is_refused():
    def one(theta, throw):
        options = {"cotangent": TARGET, "solver": ConjugateGradient(max_iterations=1, throw=throw)}
        return diffopt.implicit_gradients(RIDGE.loss, RIDGE.solution(theta), theta, **options).system.converged

    with pytest.raises(diffopt.LinearSolveError, match="did not converge"):
        torch.func.vmap(lambda theta: one(theta, True))(PENALTIES)
    assert torch.func.vmap(lambda theta: one(theta, False))(PENALTIES).tolist() == [False] * 3


def test_a_captured_tensor_of_a_batch_is_refused():
    def one(theta):
        return diffopt.implicit_gradients(lambda w: RIDGE.loss(w, theta), TARGET, cotangent=TARGET).multiplier

    with pytest.raises(diffopt.CapturedTensorError):
        torch.func.vmap(one)(PENALTIES)
    with pytest.raises(diffopt.CapturedTensorError):
        torch.func.grad(lambda theta: one(theta).sum())(PENALTIES[0])
