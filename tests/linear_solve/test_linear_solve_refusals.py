"""What the linear solvers refuse: systems they cannot solve, numbers that are not finite, options out of range."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from linear_systems import (
    ITERATIVE,
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
    normal,
    with_eigenvalues,
)

import diffopt
from diffopt.linear_solve import GMRES, ConjugateGradient, Dense, LinearSolver, Neumann, Nystrom


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


@pytest.mark.parametrize("damping", [1e-3, 1e-2, 1e-1, 1.0])
@pytest.mark.parametrize("rank", range(1, SIZE + 1))
def test_nystrom_is_refused_where_it_is_worse_than_zero(rank, damping):
    """The residual is that of the damped system, and known from the product that was spent on it anyway."""
    matrix, b = definite(8), normal(9, SIZE)
    solver, product = Nystrom(rank, damping, throw=False), Product(matrix)
    found = solver.solve(product, b)
    true = float((b - damped(solver, matrix) @ found.value).norm() / b.norm())
    assert bool(found.converged) == (true <= 1)
    assert int(found.iterations) == len(product.given) == rank + 1
    if true > 1:
        with pytest.raises(diffopt.LinearSolveError, match=r"Nystrom did not .* larger rank or damping"):
            changed(solver, throw=True).solve(product, b)
    else:
        assert torch.equal(changed(solver, throw=True).solve(product, b).value, found.value)
    assert rank < SIZE or true < 1e-8
    assert damping < 1 or true < 1  # nothing that a column misses is larger
    assert (rank, damping) != (3, 1e-3) or true > 10


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


UNSOLVED = [ConjugateGradient(1), Neumann(1), GMRES(1), Nystrom(2, damping=1e-3)]
BROKEN = [ConjugateGradient(), Neumann(step_size=9.0), GMRES(), Dense(), Nystrom(2, damping=0.1)]


@pytest.mark.parametrize(
    ("solver", "matrix"),
    [(s, definite(19)) for s in UNSOLVED] + [(s, float("nan") * identity()) for s in BROKEN],
    ids=lambda x: name(x) if isinstance(x, LinearSolver) else "",
)
def test_a_refusal_names_only_options_that_there_are(solver, matrix):
    """Those of the solver itself, or of another that it names."""
    with pytest.raises(diffopt.LinearSolveError) as caught:
        solver.solve(Product(matrix), normal(20, SIZE))
    message = str(caught.value)
    classes = (ConjugateGradient, Neumann, GMRES, Dense, Nystrom)
    options = {kind: {field.name for field in dataclasses.fields(kind)} for kind in classes}
    there = set().union(*(options[kind] for kind in classes if re.search(rf"\b{kind.__name__}\b", message)))
    every = set().union(*options.values()) | {"iterations"}
    mentioned = {word for word in every if re.search(rf"\b{word}\b", message)}
    assert mentioned <= there
    assert mentioned - {"throw"}
    assert len(message) < 300


@pytest.mark.parametrize("solver", SOLVERS, ids=name)
@pytest.mark.parametrize("matvec", [lambda x: x[:3], lambda x: [x], lambda x: x.sum(), lambda x: {"a": x}])
def test_matvec_must_return_a_tree_like_b(solver, matvec):
    with pytest.raises(diffopt.ShapeError, match="matvec returned"):
        solver.solve(matvec, torch.ones(SIZE))
