"""``cite``: the BibTeX of what a result rests on."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.resources import files
from types import FunctionType
from typing import Any

import torch

from diffopt.adjoint.autograd_function import solves_behind
from diffopt.adjoint.estimator import Estimator
from diffopt.errors import EstimatorError
from diffopt.linear_solve import LinearSolver
from diffopt.optimizers.base import Bindable
from diffopt.solve import Solution
from diffopt.tensors import tree


def cite(*subjects: Any) -> str:
    """The BibTeX entries to cite for what is given; ``print`` them.

    An estimator brings its own paper, those of the estimators and solvers within it, and this library; so do an
    optimizer, a solver and the functions :func:`diffopt.implicit` and :func:`diffopt.implicit_gradients`. A
    :class:`diffopt.Solution` brings what it was made with, which its tensors remember while they require grad. What is
    not of this library (an estimator of your own) brings no entry of its own.

    Args:
        subjects: estimators, optimizers, solvers, functions, their classes, or solutions; none: the library alone.

    Raises:
        EstimatorError: a solution whose tensors do not remember an estimator: nothing requires grad, or ``Unrolled()``.
            Or something that no result rests on.

    Example:
        >>> import diffopt
        >>> from diffopt.estimators import MultiStep, Truncated
        >>> print(diffopt.cite(MultiStep(2, Truncated(3))).count("@"))
        3
    """
    for subject in subjects:
        _refuse_what_is_not_cited(subject)
    names = {name for subject in subjects for name in _names(subject)}
    found = [entry for entry, used_by in _entries() if used_by & names or entry.startswith("@software{diffopt,")]
    return "\n\n".join(found)


def _refuse_what_is_not_cited(subject: Any) -> None:
    kinds = (Estimator, Bindable, LinearSolver)
    named = subject if isinstance(subject, type | FunctionType) else type(subject)
    known = issubclass(named, kinds) if isinstance(named, type) else False
    if not known and named.__module__.split(".")[0] != "diffopt":
        each = "give them one by one: cite(*them)" if isinstance(subject, list | tuple | set) else ""
        raise EstimatorError(
            f"cite was given {tree.describe(subject)}",
            "an estimator, an optimizer, a solver, a solution, or a class or function of diffopt",
            each,
        )


def _names(subject: Any) -> set[str]:
    """The names of the library's classes and functions in a subject and, for an object, in its fields."""
    if isinstance(subject, Solution):
        return _behind(subject)
    named = subject if isinstance(subject, type) or not is_dataclass(subject) else type(subject)
    own = getattr(named, "__name__", "") if getattr(named, "__module__", "").split(".")[0] == "diffopt" else ""
    held = [] if named is subject else [getattr(subject, field.name) for field in fields(subject)]
    parts = [part for value in held for part in tree.flatten(value)[0]]
    return {own}.union(*(_names(part) for part in parts if is_dataclass(part)))


def _behind(solution: Solution[Any]) -> set[str]:
    """The names of the estimators and optimizers that the tensors of a solution remember."""
    leaves = [leaf for leaf in tree.flatten(solution.params)[0] if leaf.requires_grad]
    nodes = solves_behind(torch.stack([leaf.sum() for leaf in leaves]).sum()) if leaves else []
    if not nodes:
        raise EstimatorError(
            "the solution's tensors do not remember an estimator",
            "those of a solve that something differentiable went into (not by Unrolled())",
            "give cite the estimator itself",
        )
    calls = [node.call for node in nodes]
    # windows are a property of the steps: what went down into autograd is the estimator within MultiStep
    names = {"MultiStep"} if any(call.dynamics.layout.window > 1 for call in calls) else set()
    return names.union(*(_names(call.estimator) | _names(call.dynamics.optimizer.template) for call in calls))


@cache
def _entries() -> tuple[tuple[str, frozenset[str]], ...]:
    """Every entry of ``references.bib``, and the names that it is cited for, which the entry is shown without."""
    text = files("diffopt").joinpath("references.bib").read_text(encoding="utf-8")
    found = []
    for entry in re.findall(r"^@.*?^\}", text, re.DOTALL | re.MULTILINE):
        used_by = re.search(r"^  usedby = \{(.*?)\},\n", entry, re.MULTILINE)
        names = frozenset(used_by[1].split(", ")) if used_by else frozenset()
        found.append((entry.replace(used_by[0], "") if used_by else entry, names))
    return tuple(found)
