"""Half precision against the answer in float64 for the same (rounded) problem: off by a few of the dtype's ``eps``."""

from __future__ import annotations

import pytest
import torch
from cases import OPTIMIZERS, hypergradient, small_network
from hypothesis import given
from hypothesis import strategies as st
from implicit_problems import INPUTS, START, THETA, expected, leaf, logistic, newton, outer
from limits import sampled
from linear_systems import SIZE, SOLVERS, Product, changed, damped, definite, error, name, normal

import diffopt
from diffopt import Adagrad, Adam, AdamW, RMSprop
from diffopt.estimators import Binomial, ESJacobian, Implicit, Krylov, Reverse
from diffopt.linear_solve import GMRES, ConjugateGradient, Dense, Neumann, Nystrom

HALVES = [torch.bfloat16, torch.float16]
# An input rounded once, an answer rounded once, and some ten products between, all with condition numbers of about 10.
FEW = 8


def eps(dtype):
    return torch.finfo(dtype).eps


def flat(tensors):
    return torch.cat([x.detach().double().flatten() for x in tensors])


def relative(got, answer):
    got, answer = flat(got), flat(answer)
    assert got.isfinite().all()
    return float((got - answer).norm() / answer.norm())


@pytest.mark.parametrize("shape", ["vector", "tree", "tasks"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=name)
def test_solvers(solver, dtype, shape):
    matrix, b = definite(1).to(dtype), normal(2, SIZE).to(dtype)
    answer = torch.linalg.solve(damped(solver, matrix.double()), b.double())
    product = Product(matrix)
    if shape == "tasks":
        found = torch.func.vmap(lambda b: tuple(solver.solve(lambda x: matrix @ x, b)))(torch.stack([b, -2 * b]))
        assert error(found[0], torch.stack([answer, -2 * answer])) < FEW * eps(dtype)
        assert bool(found[3].all())
        return
    found = solver.solve(product, b if shape == "vector" else product.tree(b))
    value = found.value if shape == "vector" else product.vector(found.value)
    assert (value.dtype, found.residual.dtype) == (dtype, torch.float32)
    assert error(value, answer) < FEW * eps(dtype)
    assert int(found.iterations) == len(product.given)
    true = (b.double() - damped(solver, matrix.double()) @ value.double()).norm()
    assert abs(float(found.residual) - float(true)) < FEW * eps(dtype) * float(b.double().norm())


@given(
    seed=st.integers(0, 2**31),
    condition=st.floats(1.5, 1e5),
    dtype=st.sampled_from(HALVES),
    solver=st.sampled_from([s for s in SOLVERS if not isinstance(s, Nystrom)]),
)
def test_what_counts_as_solved_is_solved(seed, condition, dtype, solver):
    """However bad the matrix: the recurrences alone would say so after having lost sight of the true residual."""
    matrix, b = definite(seed, condition).to(dtype), normal(seed + 1, SIZE).to(dtype)
    found = changed(solver, throw=False, max_iterations=500).solve(Product(matrix), b)
    true = (b.double() - damped(solver, matrix.double()) @ found.value.double()).norm()
    # eight eps are allowed; half of one more is the rounding of the product that looks, of this size
    assert not bool(found.converged) or float(true) < (8 + 1) * eps(dtype) * float(b.double().norm())


def residual_and_its_rounding(matrix, b, value):
    """The true residual's norm, and how far off a product that is rounded once can find it: half an ``eps`` of ``A x``.

    Subtracting it and taking the norm, in single precision, rounds a little of the residual itself.
    """
    product = matrix.double() @ value.double()
    true = float((b.double() - product).norm())
    return true, eps(matrix.dtype) / 2 * float(product.norm()) + 20 * torch.finfo(torch.float32).eps * true


def test_what_many_terms_add_up_to_is_in_the_residual():
    lost = []
    for seed in (5, 18, 28, 35):
        matrix, b = definite(seed, 1000).bfloat16(), normal(seed + 1, SIZE).bfloat16()
        found = Neumann(5000, throw=False).solve(Product(matrix), b)
        true, rounded = residual_and_its_rounding(matrix, b, found.value)
        assert abs(float(found.residual) - true) <= rounded
        lost.append(int(found.iterations) < 5000 and not bool(found.converged))
    assert any(lost), "the recurrence's residual was small and the true one was not, in none of four"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_residual_of_an_unfinished_recurrence_is_the_true_one(seed):
    """The recurrence alone says 0.1 to 11 here, where it is 1.7 to 9."""
    matrix, b = definite(seed, 1e5).bfloat16(), normal(seed + 1, SIZE).bfloat16()
    found = ConjugateGradient(max_iterations=10, throw=False).solve(Product(matrix), b)
    true, rounded = residual_and_its_rounding(matrix, b, found.value)
    assert not bool(found.converged)
    assert abs(float(found.residual) - true) <= rounded


@pytest.mark.parametrize("solver", [ConjugateGradient(), GMRES(), Neumann()], ids=name)
def test_no_products_are_spent_on_digits_that_are_not_there(solver):
    """Nor do residuals fall to where float16 holds no number: that would look like curvature zero."""
    matrix, b = definite(3, 10, 20).half(), normal(4, 20).half()
    found, coarse = (changed(solver, rtol=rtol).solve(Product(matrix), b) for rtol in (1e-9, eps(torch.float16)))
    assert bool(found.converged)
    assert int(found.iterations) == int(coarse.iterations)


@pytest.mark.parametrize("solver", [ConjugateGradient(), GMRES(), Neumann(), Dense()], ids=name)
def test_systems_beyond_half_precision_are_refused(solver):
    matrix, b = definite(3, 1e5).bfloat16(), normal(4, SIZE).bfloat16()
    with pytest.raises(diffopt.LinearSolveError):
        solver.solve(Product(matrix), b)


@pytest.mark.parametrize("scale", [6e-5, 6e3])  # the squares of numbers of this size are 0 and infinity in float16
@pytest.mark.parametrize("solver", SOLVERS, ids=name)
def test_numbers_whose_squares_are_not_in_float16(solver, scale):
    matrix, b = definite(3).half(), (normal(4, SIZE) * scale).half()
    found = solver.solve(Product(matrix), b)
    answer = torch.linalg.solve(damped(solver, matrix.double()), b.double())
    # the smallest normal number, 6e-5, is the unit of what is rounded below it
    assert error(found.value, answer) < 2 * FEW * eps(torch.float16)


@pytest.mark.parametrize("solver", [*(s for s in SOLVERS if not getattr(s, "damping", 0))], ids=name)
def test_a_solution_that_float16_cannot_hold_is_refused(solver):
    with pytest.raises(diffopt.LinearSolveError):
        solver.solve(lambda x: 1e-3 * x, torch.full((3,), 1e3, dtype=torch.float16))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "estimator", sampled([Reverse(1), Binomial(2), Krylov(4, chunk_size=2), Krylov(2)], 2), ids=str
)
@pytest.mark.parametrize("case", sampled(OPTIMIZERS, 2), ids=lambda case: case.name)
def test_estimators(case, estimator, dtype):
    problem = small_network(seed=0, steps=5, dtype=dtype)
    got = hypergradient(problem, case, 5, estimator)
    assert {x.dtype for x in got} == {dtype}
    assert relative(got, hypergradient(problem.double(), case, 5, estimator)) < FEW * eps(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("case", [OPTIMIZERS[0], OPTIMIZERS[1], OPTIMIZERS[-1]], ids=lambda case: case.name)
def test_a_full_frame_of_directions(case, antithetic, dtype):
    radius, problem = 0.1, small_network(seed=0, steps=3, dtype=dtype)
    frame = ESJacobian(1000, radius, antithetic=antithetic, generator=torch.Generator().manual_seed(0))
    got = hypergradient(problem, case, 3, frame)
    assert {x.dtype for x in got} == {dtype}
    # both ends of a difference are rounded, and the difference itself is off by third (second) derivatives
    tolerance = 4 * eps(dtype) / radius + (radius**2 if antithetic else 3 * radius)
    assert relative(got, hypergradient(problem.double(), case, 3, Reverse())) < tolerance


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "solver",
    [ConjugateGradient(), Neumann(200), GMRES(), Dense(), Nystrom(5, damping=1e-3)],
    ids=lambda s: type(s).__name__,
)
def test_implicit_differentiation(solver, dtype):
    given = [THETA.to(dtype), INPUTS.to(dtype)]
    minimiser = newton(logistic, START, *(x.double() for x in given))
    made = [leaf(x) for x in given]
    outer(diffopt.implicit(logistic, minimiser.to(dtype), *made, solver=solver, stationarity=0.1)).backward()
    assert {x.grad.dtype for x in made} == {dtype}
    assert relative([x.grad for x in made], expected(logistic, *(x.double() for x in given))) < FEW * eps(dtype)


@pytest.mark.parametrize("solver", [GMRES(), Dense()], ids=lambda s: type(s).__name__)
def test_the_implicit_estimator_under_vmap(solver):
    thetas, tasks = torch.stack([THETA, THETA + 0.3]), 2

    def one(theta):
        options = {"optimizer": diffopt.SGD(1.0), "steps": 60, "estimator": Implicit(solver)}
        return outer(diffopt.solve(logistic, START.half(), theta, INPUTS.half(), **options).params.double())

    got = torch.func.vmap(torch.func.grad(one))(thetas.half())
    assert got.dtype == torch.float16
    answer = [expected(logistic, thetas[i])[0] for i in range(tasks)]
    assert relative(list(got), answer) < 2 * FEW * eps(torch.float16)  # beside it, the rounding of the fixed point


def test_gradients_whose_squares_are_not_in_float16_are_seen():
    """Numbers of 1e-4: summed in float16, the squares of such a gradient would make it zero."""
    point = torch.full((4,), 1e-4, dtype=torch.float16)
    theta = torch.tensor(1.0, dtype=torch.float16, requires_grad=True)
    with pytest.raises(diffopt.StationarityError, match=r"norm 2\.0e-04"):
        diffopt.implicit(lambda w, theta: theta * (1000 * w.square()).sum() / 2000, point, theta, stationarity=1e-5)


@pytest.mark.parametrize("kind", [Adam, AdamW, RMSprop, Adagrad])
def test_a_coordinate_without_gradient_stays_finite_where_eps_is_no_zero(kind):
    """float16 holds no 1e-8, the default of most; it holds 1e-7, and bfloat16 both."""
    for eps, dtype in ((1e-7, torch.float16), (1e-8, torch.bfloat16)):
        options = {"optimizer": kind(0.1, eps=eps, weight_decay=0.0), "steps": 3}
        end = diffopt.solve(lambda w: w[0] ** 2, torch.ones(2, dtype=dtype), **options).params
        assert bool(end.isfinite().all())
        assert float(end[0]) < float(end[1]) == 1.0
