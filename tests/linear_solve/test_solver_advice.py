"""What an error of a linear solver says is the solver's own: those that are shipped, and those of users."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import diffopt
from diffopt.linear_solve import (
    GMRES,
    ConjugateGradient,
    Dense,
    LinearSolution,
    LinearSolver,
    Neumann,
    Nystrom,
    refuse_unsolved,
)

SHIPPED = (ConjugateGradient(), Neumann(), GMRES(), Dense(), Nystrom(2, damping=0.1))


@dataclass(frozen=True)
class GivesUp(LinearSolver):
    """A user's own solver, which never solves anything."""

    breaks: bool = True
    throw: bool = True

    def iterate(self, matvec: Any, b: Any, tasks: Any, start: Any, precision: float) -> LinearSolution:
        size = tasks.norm(b)
        one = torch.ones_like(size)
        return LinearSolution(b.zeros(), size, one.long(), one < 0, (one > 0) & self.breaks)


class Advised(GivesUp):
    """One that knows what is to be done."""

    needs = "a triangular matrix"
    if_broken = "sort its rows"
    if_unsolved = "allow a larger budget"


@dataclass(frozen=True)
class ByItsOptions(GivesUp):
    """One whose advice depends on how it was made."""

    budget: int = 3

    @property
    def if_unsolved(self) -> str:  # type: ignore[override]
        return f"allow more than {self.budget} sweeps"


def refused(solver: LinearSolver) -> diffopt.LinearSolveError:
    with pytest.raises(diffopt.LinearSolveError) as caught:
        solver.solve(lambda x: 2 * x, torch.ones(3))
    return caught.value


def test_a_users_own_solver_says_what_it_needs_and_what_to_do() -> None:
    error = refused(Advised())
    assert error.got == "Advised broke down after 1 products (residual 1.7e+00)"
    assert error.expected == "a triangular matrix"
    assert error.fix == "sort its rows; is the inner problem at a minimum, and all finite?"
    error = refused(Advised(breaks=False))
    assert error.got == "Advised did not converge: residual 1.7e+00 after 1 products"
    assert error.expected == "one within its tolerance"
    assert error.fix == "allow a larger budget, or pass throw=False to take the solution as it is"


def test_the_advice_may_depend_on_the_options() -> None:
    assert refused(ByItsOptions(breaks=False, budget=7)).fix.startswith("allow more than 7 sweeps, or pass throw=False")


@pytest.mark.parametrize("breaks", [True, False])
def test_a_solver_that_says_nothing_gets_words_that_hold_for_any(breaks: bool) -> None:
    text = str(refused(GivesUp(breaks)))
    assert ("a matrix that is not singular; try another solver" in text) == breaks
    assert ("; allow it more products, or pass throw=False" in text) == (not breaks)


@pytest.mark.parametrize("name", [type(solver).__name__ for solver in SHIPPED])
@pytest.mark.parametrize("breaks", [True, False])
def test_a_name_that_a_shipped_solver_has_too_brings_none_of_its_words(name: str, breaks: bool) -> None:
    error, plain = refused(type(name, (GivesUp,), {})(breaks)), refused(GivesUp(breaks))
    assert error.got.startswith(f"{name} ")
    assert (error.expected, error.fix) == (plain.expected, plain.fix)


@pytest.mark.parametrize("solver", SHIPPED, ids=lambda solver: type(solver).__name__)
def test_every_shipped_solver_has_words_of_its_own(solver: LinearSolver) -> None:
    one = torch.ones(())
    for breaks in (True, False):
        with pytest.raises(diffopt.LinearSolveError) as caught:
            refuse_unsolved(solver, LinearSolution(None, one, one.long(), one < 0, (one > 0) & breaks))
        assert caught.value.fix.startswith(solver.if_broken if breaks else solver.if_unsolved)
        assert "another solver" not in caught.value.fix
        assert "it more products" not in caught.value.fix
