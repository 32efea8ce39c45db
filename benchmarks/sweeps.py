"""What the pictures show: time and memory against steps and tasks; error against time for every estimator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import diffopt
from benchmarks import methods
from benchmarks.measure import Cell, Size
from benchmarks.workloads import sinusoid
from diffopt.commands.compare import TASKS
from diffopt.estimators import (
    Binomial,
    ESJacobian,
    Estimator,
    FirstOrder,
    ForwardMode,
    Implicit,
    Krylov,
    MultiStep,
    Reptile,
    Reverse,
    Truncated,
    Unrolled,
)
from diffopt.linear_solve import ConjugateGradient, Neumann

Families: TypeAlias = dict[str, dict[str, Estimator]]
"""Estimators by family, and within it by what tells them apart: an order, a number of steps ..."""


def steps(size: Size) -> list[Cell]:
    """W1 with 25 tasks over the number of inner steps."""
    numbers = {Size.FULL: (5, 10, 20, 50, 100), Size.QUICK: (5, 20, 50), Size.SMOKE: (2, 3)}[size]
    tasks = 2 if size is Size.SMOKE else 25
    rivals = (methods.HIGHER, methods.FUNCTORCH)
    return [_over("Steps", number, sinusoid.cell(number, tasks, rivals, seconds=10)) for number in numbers]


def tasks(size: Size) -> list[Cell]:
    """W1 with 5 steps over the number of tasks."""
    numbers = {Size.FULL: (1, 4, 16, 64, 256), Size.QUICK: (1, 8, 64), Size.SMOKE: (1, 3)}[size]
    inner_steps = 2 if size is Size.SMOKE else 5
    rivals = (methods.HIGHER, methods.FUNCTORCH)
    return [_over("Tasks", number, sinusoid.cell(inner_steps, number, rivals, seconds=5)) for number in numbers]


def _over(workload: str, number: int, cell: Cell) -> Cell:
    return dataclasses.replace(cell, workload=workload, x=number)


def errors(size: Size) -> dict[str, list[dict[str, Any]]]:
    """Every estimator on two problems: a :class:`diffopt.comparing.comparison.Row`'s fields, the family, the member."""
    repeats = {Size.FULL: 5, Size.QUICK: 3, Size.SMOKE: 1}[size]
    return {
        "learned initial weights (MAML, MLP, 10 steps, 1,762 numbers)": _rows("sinusoid", _for_initial(size), repeats),
        "learned penalties (logistic regression, 200 steps, 30 numbers)": _rows("penalties", _for_hyper(size), repeats),
    }


def _rows(problem: str, families: Families, repeats: int) -> list[dict[str, Any]]:
    named = [
        (family, member, estimator) for family, members in families.items() for member, estimator in members.items()
    ]
    rows = diffopt.compare(TASKS[problem](), [estimator for _, _, estimator in named], repeats=repeats).rows
    return [
        {"family": family, "member": member, **dataclasses.asdict(row)}
        for (family, member, _), row in zip(named, rows, strict=True)
    ]


EXACT: Families = {
    "Reverse": {"graphs": Reverse("graph"), "states": Reverse(1), "checkpoints": Reverse("sqrt")},
    "Unrolled": {"": Unrolled()},
}


def _some(make: Callable[[int], Estimator], size: Size, *numbers: int) -> dict[str, Estimator]:
    return {str(number): make(number) for number in (numbers[:1] if size is Size.SMOKE else numbers)}


def _for_initial(size: Size) -> Families:
    return {
        **EXACT,
        "FirstOrder": {"": FirstOrder()},
        "Reptile": {"": Reptile()},
        "Truncated": _some(Truncated, size, 2, 5, 8),
        "Binomial": _some(Binomial, size, 1, 2, 3, 4, 6),
        "Krylov": _some(Krylov, size, 1, 2, 3, 4, 6),
        "MultiStep": _some(MultiStep, size, 2, 5),
        "ESJacobian": _some(lambda directions: ESJacobian(directions, 1e-3), size, 16, 64),
    }


def _for_hyper(size: Size) -> Families:
    return {
        **EXACT,
        "ForwardMode": {"": ForwardMode()},
        "Truncated": _some(Truncated, size, 5, 20, 50, 100),
        "Binomial": _some(Binomial, size, 1, 2, 4),
        "Krylov": _some(Krylov, size, 1, 4, 8, 16),
        "MultiStep": _some(MultiStep, size, 2, 5, 10),
        "ESJacobian": _some(lambda directions: ESJacobian(directions, 1e-3), size, 4, 15, 30),
        "Implicit, CG": _some(lambda products: Implicit(ConjugateGradient(products, throw=False)), size, 2, 5, 10),
        "Implicit, Neumann": _some(lambda terms: Implicit(Neumann(terms, throw=False)), size, 10, 50),
    }
