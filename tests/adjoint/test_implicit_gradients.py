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
    with pytest.raises(diffopt.DiffoptError):
        torch.func.vmap(lambda p: diffopt.implicit_gradients(RIDGE.loss, solution, p, cotangent=TARGET).args[0])(
            PENALTIES
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
