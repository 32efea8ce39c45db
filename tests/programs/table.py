"""The table of programs: what each is, who answers it, how far the two are apart, and how long both are."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from programs.theirs import THEIRS
from torch import Tensor

INSTALLED = ("higher", "torchopt")
"""Peers that can be installed beside this library; rows that they answer run them."""


@dataclass
class Program:
    """A program that the users of a peer write, as they write it here, and its answer by something else.

    Attributes:
        peer: whose users write it.
        case: what it does.
        problem: makes the problem, anew for both sides.
        ours: the program, with this library: from the problem to the numbers that are compared.
        tolerance: of the relative error.
        gap: why it cannot be written yet, or is wrong; empty where it is right.
        by: who gives the answer: a peer, "autograd" (a loop that autograd records), "closed form", or another.
        answer: the answer, a function of the problem.
    """

    peer: str
    case: str
    problem: Callable[[], Any]
    ours: Callable[[Any], Any]
    tolerance: float
    gap: str
    by: str = ""
    answer: Callable[[Any], Any] | None = None

    def __str__(self) -> str:
        return f"{self.peer}: {self.case}"

    def answered_by(self, by: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
        """Declare the answer."""

        def declare(answer: Callable[[Any], Any]) -> Callable[[Any], Any]:
            self.by, self.answer = by, answer
            return answer

        return declare

    def error(self) -> float:
        """The norm of the difference from the answer, relative to the answer's."""
        assert self.answer is not None
        found, expected = (flat(side(self.problem())) for side in (self.ours, self.answer))
        assert found.shape == expected.shape, f"{found.shape} is compared with {expected.shape}"
        assert expected.norm() > 1e-6, "an answer of zero shows nothing"
        return float((found - expected).norm() / expected.norm())

    def lines_here(self) -> int:
        """Lines of the program with this library."""
        return count(self.ours)

    def lines_there(self) -> int:
        """Lines of the peer's program: of the answer, if the peer gives it, or of the text; 0: it cannot be written."""
        assert self.answer is not None
        if self.by in INSTALLED:
            return count(self.answer)
        text = THEIRS.get(f"{self.ours.__module__.rpartition('.')[2]}.{self.ours.__name__}", "")
        return sum(bool(line) for line in text.splitlines())


def program(
    peer: str, case: str, problem: Callable[[], Any], tolerance: float = 1e-8, gap: str = ""
) -> Callable[[Callable[[Any], Any]], Program]:
    """Make a row of the table of a function."""

    def make(ours: Callable[[Any], Any]) -> Program:
        return Program(peer, case, problem, ours, tolerance, gap)

    return make


def leaves(tree: Any) -> list[Any]:
    """The leaves of a tree, dictionaries in the order in which they were written."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    return [leaf for branch in tree for leaf in leaves(branch)] if isinstance(tree, list | tuple) else [tree]


def flat(found: Any) -> Tensor:
    """All numbers of a tree in one vector."""
    return torch.cat([torch.as_tensor(x, dtype=torch.float64).detach().reshape(-1) for x in leaves(found)])


def count(function: Callable[..., Any]) -> int:
    """Lines of a function's body that are code: no docstring, no comment, no empty line."""
    source = textwrap.dedent(inspect.getsource(function))
    body = ast.parse(source).body[0].body  # type: ignore[attr-defined]
    first = body[1] if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) else body[0]
    lines = source.splitlines()[first.lineno - 1 :]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


def markdown(rows: Sequence[Program]) -> str:
    """The table, measured: the relative error, and lines of user code here and there."""
    table = ["| users of | program | answer by | error | lines here | lines there |", "|---|---|---|---|---|---|"]
    for row in rows:
        run = ", run" if row.by in INSTALLED else ""
        there = f"{row.lines_there()}{run}" if row.lines_there() else "cannot"
        error = f"gap: {row.gap}" if row.gap else f"{row.error():.0e}"
        table.append("| " + " | ".join([row.peer, row.case, row.by, error, str(row.lines_here()), there]) + " |")
    both = [row for row in rows if row.lines_there()]
    here, there = (sum(getattr(row, f"lines_{side}")() for row in both) for side in ("here", "there"))
    table.append(f"| all | the {len(both)} that both can write | | | {here} | {there} |")
    return "\n".join(table)
