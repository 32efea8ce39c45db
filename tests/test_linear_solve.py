"""The linear solvers against ``torch.linalg``, scipy, and the formulas that name them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import diffopt
from diffopt.leaves import Leaves
from diffopt.linear_solve import GMRES, ConjugateGradient, Dense, LinearSolver, Neumann, Nystrom, Tasks

SIZE = 7
ITERATIVE = [ConjugateGradient(), Neumann(), GMRES()]
SOLVERS = [*ITERATIVE, Nystrom(SIZE, damping=0.3), Dense(), Dense(damping=0.3)]
# Condition numbers are at most 10, residuals asked for are 1e-12 (1e-5): errors are within ten of that.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4}


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def identity(size: int = SIZE) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def damped(solver: LinearSolver, matrix: Tensor) -> Tensor:
    """The matrix that the solver solves for."""
    return matrix + getattr(solver, "damping", 0.0) * identity()


def with_eigenvalues(seed: int, eigenvalues: list[float]) -> Tensor:
    basis = torch.linalg.qr(normal(seed, len(eigenvalues), len(eigenvalues)))[0]
    matrix = (basis * torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.mT
    return (matrix + matrix.mT) / 2


def definite(seed: int, condition: float = 10.0, size: int = SIZE) -> Tensor:
    return with_eigenvalues(seed, np.geomspace(1 / condition, 1, size).tolist())


def nonsymmetric(seed: int) -> Tensor:
    return definite(seed) + 0.5 * torch.triu(normal(seed, SIZE, SIZE), 1)


def low_rank(seed: int, rank: int = 3) -> Tensor:
    return with_eigenvalues(seed, [1.0, 0.7, 0.4][:rank] + [0.0] * (SIZE - rank))


class Product:
    """Multiplication with a matrix, on vectors or on a nested tree of seven numbers; remembers what it was given."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.given: list[Tensor] = []

    def __call__(self, x):
        flat = x if isinstance(x, Tensor) else self.vector(x)
        self.given.append(flat)
        return self.matrix @ flat if isinstance(x, Tensor) else self.tree(self.matrix @ flat)

    @staticmethod
    def tree(x: Tensor):
        return {"weight": x[:4].reshape(2, 2), "rest": [x[4], (x[5:].reshape(1, 2),)]}

    @staticmethod
    def vector(tree) -> Tensor:
        scalar, (row,) = tree["rest"]
        return torch.cat([tree["weight"].flatten(), scalar[None], row.flatten()])


def changed(solver: LinearSolver, **options) -> LinearSolver:
    names = {field.name for field in dataclasses.fields(solver)}
    more = {"terms": options["max_iterations"]} if "max_iterations" in options else {}
    return dataclasses.replace(solver, **{k: v for k, v in {**options, **more}.items() if k in names})


def name(solver: LinearSolver) -> str:
    return type(solver).__name__ + ("" if getattr(solver, "damping", 0) == 0 else "-damped")


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


KINDS = {"definite": definite, "nonsymmetric": nonsymmetric, "low rank": low_rank}


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


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("solver", SOLVERS, ids=name)
def test_a_zero_right_hand_side_has_the_solution_zero(solver, start):
    zero = torch.zeros(SIZE, dtype=torch.float64)
    found = solver.solve(Product(definite(3)), zero, normal(4, SIZE) if start else None)
    assert float(found.value.norm()) < 1e-12
    assert bool(found.converged)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["b", "matrix"])
@pytest.mark.parametrize("solver", [*SOLVERS, Neumann(step_size=0.5), Neumann(rtol=None)], ids=name)
def test_what_is_not_finite_is_never_a_solution(solver, where, bad):
    matrix, b = definite(3), normal(4, SIZE)
    (b if where == "b" else matrix[0])[0] = bad
    with pytest.raises(diffopt.LinearSolveError):
        solver.solve(Product(matrix), b)
    found = changed(solver, throw=False).solve(Product(matrix), b)
    assert not bool(found.converged)


@pytest.mark.parametrize("scale", [1e25, 1e-25])
@pytest.mark.parametrize("solver", SOLVERS, ids=name)
def test_numbers_whose_squares_are_not_in_float32(solver, scale):
    """Solved, or refused; but not the answer zero."""
    matrix, b = definite(3).float(), normal(4, SIZE).float() * scale
    found = changed(solver, throw=False).solve(Product(matrix), b)
    expected = torch.linalg.solve(damped(solver, matrix.double()), b.double())
    assert not bool(found.converged) or error(found.value, expected) < TOLERANCE[torch.float32] * 10


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("solver", [*ITERATIVE, Neumann(step_size=1.0), Dense()], ids=name)
def test_singular_systems_are_refused(solver, seed):
    with pytest.raises(diffopt.LinearSolveError, match=r"broke down|did not converge"):
        solver.solve(Product(low_rank(seed)), normal(seed + 50, SIZE))


@pytest.mark.parametrize("solver", [ConjugateGradient(), Neumann()], ids=name)
def test_indefinite_systems_are_refused(solver):
    matrix, b = with_eigenvalues(5, [1.0, 0.5, 0.3, -0.7]), normal(6, 4)
    with pytest.raises(diffopt.LinearSolveError, match=f"{name(solver)} broke down.*minimum"):
        solver.solve(Product(matrix), b)
    found = changed(solver, throw=False).solve(Product(matrix), b)
    assert not bool(found.converged)
    assert bool(found.breakdown)
    if isinstance(solver, ConjugateGradient):  # the iterate stands where the curvature was found: here at the start
        found = changed(solver, throw=False).solve(Product(matrix), torch.linalg.eigh(matrix)[1][:, 0])
        assert (float(found.value.norm()), float(found.residual), int(found.iterations)) == (0, pytest.approx(1), 1)
    assert error(GMRES().solve(Product(matrix), b).value, torch.linalg.solve(matrix, b)) < 1e-9


@pytest.mark.parametrize("rtol", [1e-5, None])
def test_neumann_reports_divergence(rtol):
    matrix, b = definite(7), normal(8, SIZE)
    with pytest.raises(diffopt.LinearSolveError, match="step_size"):
        Neumann(step_size=2.5, rtol=rtol).solve(Product(matrix), b)
    found = Neumann(step_size=2.5, rtol=rtol, throw=False).solve(Product(matrix), b)
    assert (bool(found.converged), bool(found.breakdown)) == (False, True)
    assert bool(Neumann(terms=5, step_size=1.9, rtol=None).solve(Product(matrix), b).converged)


@given(seed=st.integers(0, 2**31), terms=st.integers(1, 12), step_size=st.floats(0.1, 1.5))
def test_neumann_is_its_series(seed, terms, step_size):
    matrix, b = nonsymmetric(seed), normal(seed + 1, SIZE)
    solver = Neumann(terms=terms, step_size=step_size, rtol=None, throw=False)
    expected = sum(step_size * torch.linalg.matrix_power(identity() - step_size * matrix, j) @ b for j in range(terms))
    assert error(solver.solve(Product(matrix), b).value, expected) < 1e-12


@given(seed=st.integers(0, 2**31), condition=st.floats(1.5, 1e4), count=st.integers(1, 20))
def test_conjugate_gradients_keep_their_bound(seed, condition, count):
    matrix, b = definite(seed, condition, 20), normal(seed + 1, 20)
    solution = torch.linalg.solve(matrix, b)
    solver = ConjugateGradient(max_iterations=count, rtol=0.0, throw=False)
    root = condition**0.5
    bound = 2 * root * ((root - 1) / (root + 1)) ** count
    # besides the bound, the round-off of solution itself
    assert error(solver.solve(Product(matrix), b).value, solution) <= bound + 1e-15 * condition


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
    found = Nystrom(rank, damping, seed=seed).solve(product, b)
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


@pytest.mark.parametrize("solver", ITERATIVE, ids=name)
def test_unconverged_is_an_error_unless_asked_for(solver):
    solver = changed(solver, max_iterations=2, step_size=1.0)
    matrix, b = definite(19), normal(20, SIZE)
    with pytest.raises(diffopt.LinearSolveError, match=r"did not converge: residual .* after [23] products"):
        solver.solve(Product(matrix), b)
    product = Product(matrix)
    found = changed(solver, throw=False).solve(product, b)
    assert (bool(found.converged), bool(found.breakdown)) == (False, False)
    assert int(found.iterations) == len(product.given) == (3 if isinstance(solver, GMRES) else 2)
    assert float(found.residual) == pytest.approx(float((b - matrix @ found.value).norm()), rel=1e-9)


@pytest.mark.parametrize("solver", SOLVERS, ids=name)
@pytest.mark.parametrize("matvec", [lambda x: x[:3], lambda x: [x], lambda x: x.sum(), lambda x: {"a": x}])
def test_matvec_must_return_a_tree_like_b(solver, matvec):
    with pytest.raises(diffopt.ShapeError, match="matvec returned"):
        solver.solve(matvec, torch.ones(SIZE))


@pytest.mark.parametrize(
    ("make", "options"),
    [(ConjugateGradient, {"max_iterations": x}) for x in (0, 2.5, None, True, "3")]
    + [(ConjugateGradient, {"rtol": x}) for x in (-1e-9, 1.0, None, float("nan"))]
    + [(GMRES, {"max_iterations": x}) for x in (0, 2.5, None)]
    + [(GMRES, {"rtol": x}) for x in (-1.0, None)]
    + [(Neumann, {"terms": x}) for x in (0, 1.5, None)]
    + [(Neumann, {"step_size": x}) for x in (0.0, -1.0, float("inf"))]
    + [(Neumann, {"rtol": 2.0}), (Neumann, {"power_iterations": 0}), (Neumann, {"power_iterations": 1.5})]
    + [(Nystrom, {"rank": x, "damping": 1.0}) for x in (0, 1.5, None)]
    + [(Nystrom, {"rank": 1, "damping": x}) for x in (0.0, -1.0, None)]
    + [(Dense, {"damping": x}) for x in (-1.0, float("nan"), None)],
    ids=str,
)
def test_options_out_of_range(make, options):
    with pytest.raises(diffopt.HyperparameterError, match=f"{make.__name__}: (max_iterations|{'|'.join(options)}) is"):
        make(**options)


BATCH_SOLVERS = [changed(s, throw=False, rtol=1e-10, max_iterations=12) for s in SOLVERS]


def four_tasks() -> tuple[Tensor, Tensor]:
    """A system that every solver solves, one that is solved at the start, an indefinite one, and a slow one."""
    matrices = torch.stack([definite(20, 1.05), definite(21), definite(22) - 0.5 * identity(), definite(23, 1e3)])
    b = normal(24, 4, SIZE)
    b[1] = 0
    return matrices, b


@pytest.mark.parametrize("how", ["vmap", "nested vmap", "stacked"])
@pytest.mark.parametrize("solver", BATCH_SOLVERS, ids=name)
def test_every_task_is_as_if_alone(solver, how):
    matrices, b = four_tasks()
    if how == "stacked":
        got = solver.run(lambda x: Leaves([(matrices @ x[0][..., None])[..., 0]]), Leaves([b]), Tasks(1), None)
        got = got._replace(value=got.value[0])
    else:
        one = torch.func.vmap(lambda a, b: tuple(solver.solve(lambda x: a @ x, b)))
        if how == "vmap":
            out = one(matrices, b)
        else:
            out = [x.flatten(0, 1) for x in torch.func.vmap(one)(matrices.unflatten(0, (2, 2)), b.unflatten(0, (2, 2)))]
        got = type(solver.solve(Product(matrices[0]), b[0]))(*out)
    for i in range(4):
        alone = solver.solve(Product(matrices[i]), b[i])
        # the condition number of the slow task is 1e3 and its residual 1e-10
        assert float((got.value[i] - alone.value).norm()) <= 1e-6 * float(alone.value.norm())
        if not isinstance(solver, GMRES):  # whose products are taken for all tasks together
            assert int(got.iterations[i]) == int(alone.iterations)
            # round-off of the slow task: its condition number 1e3 times 1e-15
            assert float(got.residual[i]) == pytest.approx(float(alone.residual), rel=1e-3, abs=2e-12)
        assert bool(got.converged[i]) == bool(alone.converged)
        assert bool(got.breakdown[i]) == bool(alone.breakdown)


@pytest.mark.parametrize("solver", BATCH_SOLVERS, ids=name)
@pytest.mark.parametrize("batched", ["matrix", "b"])
def test_tasks_may_share_the_matrix_or_the_right_hand_side(solver, batched):
    solver = changed(solver, max_iterations=7 if isinstance(solver, GMRES) else 300)
    matrices, b = torch.stack([definite(25), definite(26)]), normal(27, 2, SIZE)
    dims = (0, None) if batched == "matrix" else (None, 0)
    arguments = (matrices, b[0]) if batched == "matrix" else (matrices[0], b)
    got = torch.func.vmap(lambda a, b: solver.solve(lambda x: a @ x, b).value, dims)(*arguments)
    full = matrices if batched == "matrix" else matrices[:1].expand(2, SIZE, SIZE)
    right = b[:1].expand(2, SIZE) if batched == "matrix" else b
    expected = torch.linalg.solve(damped(solver, full), right)
    assert error(got, expected) < 1e-8


@pytest.mark.parametrize("solver", BATCH_SOLVERS, ids=name)
def test_one_bad_task_does_not_spoil_the_others(solver):
    matrices, b = torch.stack([definite(28), definite(29)]), normal(30, 2, SIZE)
    matrices[1, 0, 0] = float("nan")
    got = torch.func.vmap(lambda a, b: tuple(solver.solve(lambda x: a @ x, b)))(matrices, b)
    alone = solver.solve(Product(matrices[0]), b[0])
    assert error(got[0][0], alone.value) < 1e-8
    assert [bool(x) for x in got[3]] == [bool(alone.converged), False]
