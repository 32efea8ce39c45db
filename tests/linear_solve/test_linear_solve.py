"""The linear solvers against ``torch.linalg``, scipy, and the formulas that name them."""

from __future__ import annotations

import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_systems import (
    ITERATIVE,
    KINDS,
    SIZE,
    SOLVERS,
    TOLERANCE,
    Product,
    changed,
    damped,
    definite,
    error,
    identity,
    low_rank,
    name,
    nonsymmetric,
    normal,
    with_eigenvalues,
)

import diffopt
from diffopt.linear_solve import GMRES, ConjugateGradient, Dense, Neumann, Nystrom, Tasks, largest_eigenvalue
from diffopt.tensors.leaves import Leaves


@pytest.mark.parametrize("shape", ["vector", "tree"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("kind", "solver"),
    [("definite", solver) for solver in SOLVERS]
    + [("nonsymmetric", solver) for solver in SOLVERS if isinstance(solver, GMRES | Dense)]
    + [("low rank", solver) for solver in SOLVERS if getattr(solver, "damping", 0)],
    ids=lambda x: x if isinstance(x, str) else name(x),
)
def test_solves(kind, solver, dtype, shape):
    matrix, b = KINDS[kind](1), normal(2, SIZE)
    product = Product(matrix.to(dtype))
    solver = changed(solver, rtol=1e-12 if dtype == torch.float64 else 1e-5, max_iterations=500)
    right = b.to(dtype)
    found = solver.solve(product, right if shape == "vector" else product.tree(right))
    value = found.value if shape == "vector" else product.vector(found.value)
    assert value.dtype == dtype
    assert error(value, torch.linalg.solve(damped(solver, matrix), b)) < TOLERANCE[dtype]
    assert bool(found.converged)
    assert not bool(found.breakdown)
    assert int(found.iterations) == len(product.given)
    # the residual is small, so only its absolute error (round-off of the products) says something
    true = (b - damped(solver, matrix) @ value.double()).norm()
    assert abs(float(found.residual) - float(true)) < 0.1 * TOLERANCE[dtype] * float(b.norm())


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("solver", SOLVERS, ids=name)
def test_a_zero_right_hand_side_has_the_solution_zero(solver, start, watched):
    """Also of a lone system, in which nobody else is interested: it is scaled apart."""
    zero = torch.zeros(SIZE, dtype=torch.float64)
    with torch.set_grad_enabled(watched):
        found = solver.solve(Product(definite(3)), zero, normal(4, SIZE) if start else None)
    assert float(found.value.norm()) < 1e-12
    assert bool(found.converged)


@given(seed=st.integers(0, 2**31), terms=st.integers(1, 12), step_size=st.floats(0.1, 1.5))
def test_neumann_is_its_series(seed, terms, step_size):
    matrix, b = nonsymmetric(seed), normal(seed + 1, SIZE)
    solver = Neumann(terms=terms, step_size=step_size, rtol=None, throw=False)
    expected = sum(step_size * torch.linalg.matrix_power(identity() - step_size * matrix, j) @ b for j in range(terms))
    assert error(solver.solve(Product(matrix), b).value, expected) < 1e-12


@given(seed=st.integers(0, 2**31), top=st.floats(0.01, 100), sign=st.sampled_from([-1.0, 1.0]))
def test_the_largest_eigenvalue_by_the_power_method(seed, top, sign):
    """Per task; of largest modulus. The next is half as large; the start may have little of the largest in it."""
    matrices = torch.stack(
        [with_eigenvalues(seed, [sign * top * s, top * s / 2, top * s / 5, 0.0, -top * s / 3]) for s in (1.0, 7.0)]
    )
    found = largest_eigenvalue(
        lambda x: Leaves([(matrices @ x[0][..., None])[..., 0]]), Leaves([normal(0, 2, 5)]), Tasks(1), 150
    )
    assert error(found, torch.tensor([top, 7 * top], dtype=torch.float64)) < 1e-12


@pytest.mark.parametrize("terms", [1, 2, 5])
def test_neumann_estimates_its_step_size(terms):
    matrix, b = 30 * definite(9), normal(10, SIZE)  # a step size of one would diverge
    options = {"terms": terms, "rtol": None, "throw": False}
    found = Neumann(**options, power_iterations=200).solve(Product(matrix), b)
    known = Neumann(**options, step_size=1 / 30).solve(Product(matrix), b)  # the largest eigenvalue is 30
    assert error(found.value, known.value) < 1e-12
    assert (int(found.iterations), int(known.iterations)) == (200 + terms, terms)
    assert bool(Neumann(power_iterations=3, rtol=1e-6, terms=1000).solve(Product(matrix), b).converged)


@given(seed=st.integers(0, 2**31), condition=st.floats(1.5, 1e4), count=st.integers(1, 20))
def test_conjugate_gradients_keep_their_bound(seed, condition, count):
    matrix, b = definite(seed, condition, 20), normal(seed + 1, 20)
    solution = torch.linalg.solve(matrix, b)
    solver = ConjugateGradient(max_iterations=count, rtol=0.0, throw=False)
    root = condition**0.5
    bound = 2 * root * ((root - 1) / (root + 1)) ** count
    # besides the bound, the round-off of twenty numbers in the solution and in the iterate: a hundred eps
    assert error(solver.solve(Product(matrix), b).value, solution) <= bound + 2e-14 * condition


@pytest.mark.parametrize("start", [None, normal(13, SIZE)], ids=["cold", "warm"])
@pytest.mark.parametrize("count", range(1, SIZE + 1))
def test_iterates_are_those_of_scipy(count, start):
    b = normal(12, SIZE)
    x0 = None if start is None else start.numpy()
    options = {"rtol": 0.0, "atol": 1e-300, "x0": x0}
    # At the last steps the residual is round-off in both; before, it is not below 1e-4.
    for solver, matrix, scipys in [
        (ConjugateGradient(count, rtol=0.0, throw=False), definite(11), scipy.sparse.linalg.cg),
        (GMRES(count, rtol=0.0, throw=False), nonsymmetric(11), scipy.sparse.linalg.gmres),
    ]:
        how = {"maxiter": count} if isinstance(solver, ConjugateGradient) else {"restart": count, "maxiter": 1}
        expected = torch.from_numpy(scipys(matrix.numpy(), b.numpy(), **options, **how)[0])
        found = solver.solve(Product(matrix), b, start)
        assert error(found.value, expected) < 1e-10
        assert float(found.residual) == pytest.approx(float((b - matrix @ expected).norm()), abs=1e-12)
        if count == SIZE:
            assert error(found.value, torch.linalg.solve(matrix, b)) < 1e-10


def test_gmres_reports_the_residual_it_has_in_float32():
    matrix = torch.tensor([[1.0, 0.0], [5e-5, 1.0]])
    found = GMRES(rtol=1e-5, throw=False).solve(Product(matrix), torch.tensor([1.0, 0.0]))
    true = (torch.tensor([1.0, 0.0]) - matrix @ found.value).norm()
    assert abs(float(found.residual) - float(true)) < 1e-6


@given(seed=st.integers(0, 2**31), rank=st.integers(1, SIZE), damping=st.floats(1e-2, 10))
def test_nystrom_is_its_formula(seed, rank, damping):
    matrix, b = definite(seed), normal(seed + 1, SIZE)
    product = Product(matrix)
    found = Nystrom(rank, damping, seed=seed, throw=False).solve(product, b)
    chosen = [int(x.argmax()) for x in product.given[:rank]]
    assert len(set(chosen)) == rank
    assert int(found.iterations) == len(product.given)
    columns = matrix[:, chosen]
    approximation = columns @ torch.linalg.inv(columns[chosen]) @ columns.mT
    assert error(found.value, torch.linalg.solve(approximation + damping * identity(), b)) < 1e-11


@pytest.mark.parametrize("rank", [3, 4, SIZE, 100])
def test_nystrom_is_exact_where_its_rank_suffices(rank):
    matrix, b = low_rank(14), normal(15, SIZE)
    found = Nystrom(rank, damping=1e-3).solve(Product(matrix), b)
    # the condition number of the damped system is 1e3, of the small system 1e6
    assert error(found.value, torch.linalg.solve(matrix + 1e-3 * identity(), b)) < 1e-9


@pytest.mark.parametrize("dead", [1, SIZE - 1, SIZE])
def test_nystrom_is_exact_where_coordinates_are_dead(dead):
    matrix, b = definite(18), normal(19, SIZE)
    matrix[:dead], matrix[:, :dead] = 0.0, 0.0
    found = Nystrom(SIZE, damping=1e-1).solve(Product(matrix), b)
    assert error(found.value, torch.linalg.solve(matrix + 1e-1 * identity(), b)) < 1e-11


@pytest.mark.parametrize("solver", ITERATIVE, ids=name)
def test_a_start_saves_products(solver):
    solver = changed(solver, rtol=1e-6, step_size=1.0, max_iterations=300)
    matrix, b = definite(16), normal(17, SIZE)
    solution, product = torch.linalg.solve(matrix, b), Product(matrix)
    there = solver.solve(product, b, solution)
    assert (len(product.given), int(there.iterations), bool(there.converged)) == (1, 1, True)
    near = solver.solve(Product(matrix), b, solution + 1e-4 * normal(18, SIZE))
    assert int(near.iterations) < int(solver.solve(Product(matrix), b).iterations)
    # the residual is 1e-6 of b, the condition number 10
    assert error(near.value, solution) < 1e-5
    for bad in (torch.zeros(1), torch.zeros(SIZE - 1), [solution], {"a": solution, "b": solution}):
        with pytest.raises((diffopt.ShapeError, diffopt.StructureError)):
            solver.solve(Product(matrix), b, bad)


@pytest.mark.parametrize("small", [1e-3, 1e-4, 1e-6, 1e-8])
def test_conjugate_gradients_in_single_precision_claim_no_more_than_is_so(small):
    """With a few small eigenvalues the recurrence's residual falls on where the true one stays, some ``eps / small``.

    Products are rounded once, so what can be known of the true residual has a bound under every rounding: half an
    ``eps`` of ``A x``, and of the residual itself what the subtraction and a norm of thirty numbers round.
    """
    eigenvalues = [small, 2 * small, 3 * small, *torch.linspace(0.5, 1, 27).tolist()]
    eps = torch.finfo(torch.float32).eps
    for seed in range(10):
        matrix, b = with_eigenvalues(seed, eigenvalues).float(), normal(100 + seed, 30).float()
        found = ConjugateGradient(max_iterations=200, throw=False).solve(Product(matrix), b)
        found_b = matrix.double() @ found.value.double()
        true, size = float((b.double() - found_b).norm()), float(b.norm())
        rounded = eps / 2 * (float(found_b.norm()) + 40 * true)
        assert not bool(found.converged) or true <= eps**0.5 * size * (1 + 40 * eps) + rounded
        # where nothing says that it has converged, that product is saved
        assert small < 1e-6 or abs(float(found.residual) - true) <= rounded
        # where eps / small is a third of what is allowed, and up to four times rtol, nothing is refused either
        assert small < 1e-3 or bool(found.converged)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # forward mode loads it
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_solution_by_conjugate_gradients_may_be_differentiated(dtype):
    """Where nobody differentiates it is computed in Python's numbers, which autograd does not see."""
    diagonal = torch.tensor([1.0, 2.0, 4.0], dtype=dtype, requires_grad=True)
    solution = ConjugateGradient(rtol=1e-6).solve(lambda v: diagonal * v, torch.ones(3, dtype=dtype))
    solution.value.sum().backward()
    torch.testing.assert_close(diagonal.grad, -1 / diagonal.detach().square(), rtol=1e-4, atol=1e-5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(diagonal.detach(), torch.ones(3, dtype=dtype))
        value = ConjugateGradient(rtol=1e-6).solve(lambda v: dual * v, torch.ones(3, dtype=dtype)).value
        tangent = torch.autograd.forward_ad.unpack_dual(value).tangent
    torch.testing.assert_close(tangent, -1 / diagonal.detach().square(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tasks", [False, True])
def test_conjugate_gradients_say_the_same_of_one_problem_as_of_several(tasks):
    """In numbers that vanish, that are not numbers, and of which some are of another precision."""

    def verdict(matvec, b):
        def run(b):
            with torch.no_grad():
                found = ConjugateGradient(throw=False).solve(matvec, b)
            return found.residual, found.converged, found.breakdown

        if not tasks:
            return run(b)
        outcome = torch.func.vmap(lambda scale: run([scale * x for x in b]))(torch.ones(2))
        return tuple(x[0] for x in outcome)

    for matvec in (lambda x: [y * float("nan") for y in x], lambda x: [y * 1e-43 for y in x]):
        residual, converged, breakdown = verdict(matvec, [torch.ones(3)])
        assert not converged
        assert breakdown or not residual.isfinite()
    mixed = [torch.ones(3), torch.ones(2, dtype=torch.float64)]
    assert verdict(lambda x: [2 * y for y in x], mixed)[1]


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
def test_conjugate_gradients_in_plain_numbers_take_the_iterates_of_those_on_tensors(parts, start):
    """The former where nobody differentiates, the latter elsewhere: the same solution after as many products."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    matrix, right = root @ root.T + torch.eye(12), torch.randn(12, generator=generator, dtype=torch.float64)
    solver = ConjugateGradient(max_iterations=7, rtol=0.0, throw=False)

    def split(x):
        return list(x.split(12 // parts))

    def solve():
        first = split(torch.linspace(0, 1, 12, dtype=torch.float64)) if start else None
        return solver.solve(lambda v: split(matrix @ torch.cat(v)), split(right), first)

    with torch.no_grad():
        plain = solve()
    on_tensors = solve()
    torch.testing.assert_close(plain.value, on_tensors.value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(plain.residual, on_tensors.residual, rtol=1e-9, atol=1e-12)
    assert int(plain.iterations) == int(on_tensors.iterations) == 7 + start


@pytest.mark.parametrize("solver", [ConjugateGradient(rtol=1e-6), Neumann(rtol=1e-6), GMRES(rtol=1e-6)], ids=repr)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_size_of_a_lone_system_does_not_matter(solver, size):
    """Squares of these numbers vanish, or are infinite, in single precision."""
    diagonal = torch.tensor([1.0, 2.0, 3.0])
    with torch.no_grad():
        found = solver.solve(lambda x: diagonal * x, torch.tensor([1.0, -2.0, 0.5]) * size)
    torch.testing.assert_close(found.value / size, torch.tensor([1.0, -1.0, 0.5 / 3]), rtol=1e-5, atol=0)
    assert found.converged
    assert found.residual <= 3e-6 * size


@pytest.mark.parametrize("solver", [ConjugateGradient(throw=False), Neumann(throw=False)], ids=repr)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_a_lone_system_that_is_not_finite_is_a_breakdown(solver, bad, place):
    b = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([1.0, 2.0])}
    b["ab"[place]][1] = bad
    with torch.no_grad():
        found = solver.solve(lambda x: x, b)
    assert found.breakdown
    assert not found.converged
    assert found.residual == torch.inf
    assert not any([bool(x.any()) for x in found.value.values()])
