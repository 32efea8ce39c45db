"""Which layers can be differentiated twice, over tasks and over steps, on the torch that is installed.

``python docs/layer_table.py`` prints the table of the page "Which layers are safe"; the page itself runs this file.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from layer_cases import CASES, Case
from torch import Tensor
from torch.func import functional_call, grad, vmap

import diffopt
from diffopt.estimators import Binomial, Reverse
from diffopt.reports import table

STEPS = 2
AGREES = 1e-6  # two ways to one number in float64; a wrong derivative is off by percents


@dataclass(frozen=True)
class Row:
    """What was measured of one case: ``"ok"``, a number in words, or the name of the error."""

    name: str
    twice: str
    tasks: str
    steps: str
    fix: str


@dataclass(frozen=True)
class Problem:
    """The case as an inner problem: a loss of the parameters and an input, for two tasks."""

    loss: Callable[..., Tensor]
    params: dict[str, Tensor]
    inputs: Tensor

    def outer(self, estimator: Any, params: dict[str, Tensor], x: Tensor) -> Tensor:
        """The loss elsewhere after a few steps of gradient descent."""
        sgd = diffopt.SGD(0.1)
        found = diffopt.solve(self.loss, params, x, optimizer=sgd, steps=STEPS, estimator=estimator).params
        return sum((leaf.sin().sum() for leaf in found.values()), torch.zeros((), dtype=torch.float64))


def problem(case: Case) -> Problem:
    """Build a case, the same at every call."""
    torch.manual_seed(0)
    module = case.make().double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))  # biases start at zero, where something may vanish
    params = {name: p.detach() for name, p in module.named_parameters()}
    shape = (2, *case.shape)
    inputs = torch.randint(case.integers, shape) if case.integers else torch.randn(shape).double()

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        with case.context():
            y = functional_call(module, params, (x,))
            return (y - 0.3).square().mean() + y.sin().mean()

    return Problem(loss, params, inputs)


def _outcome(work: Callable[[], str]) -> str:
    try:
        return work()
    except diffopt.DiffoptError as error:
        return f"`{type(error).__name__}`"


def _agreement(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """``"ok"``, or how far apart two trees of derivatives are."""
    pairs = [(found[name], expected[name]) for name in expected]
    error = max(float((a - b).norm() / (b.norm() + 1e-300)) for a, b in pairs)
    return "ok" if error < AGREES else f"**wrong: {error:.0%}**"


def measure(case: Case) -> Row:
    """The three columns of one case."""
    p = problem(case)
    finding = diffopt.check(p.loss, p.params, p.inputs[0], vmap=False)["second derivative"]
    if isinstance(finding.error, diffopt.WrongDerivativeError):
        return Row(case.name, "**wrong**", "**wrong**", "**wrong**", case.fix)  # batched, it is as wrong as it is alone

    def over_tasks() -> str:
        one = grad(partial(p.outer, Reverse(1)))
        single = [one(p.params, x) for x in p.inputs]
        batched = vmap(one, in_dims=(None, 0))(p.params, p.inputs)
        return _agreement(batched, {name: torch.stack([g[name] for g in single]) for name in batched})

    def over_steps() -> str:
        together, alone = (
            grad(partial(p.outer, estimator))(p.params, p.inputs[0])
            for estimator in (Binomial(1), Binomial(1, chunk_size=1))
        )
        return _agreement(together, alone)

    twice = {"ok": "ok", "FAIL": f"`{type(finding.error).__name__}`"}.get(finding.outcome, "not comparable")
    found = Row(case.name, twice, _outcome(over_tasks), _outcome(over_steps), case.fix)
    return replace(found, fix="") if _columns(found)[1:] == ("ok",) * 3 else found


def _columns(row: Row) -> tuple[str, str, str, str]:
    return row.name, row.twice, row.tasks, row.steps


def rows() -> Iterator[Row]:
    """Every case, measured."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, on what it does not batch well or finds old
        yield from map(measure, CASES)


def markdown() -> str:
    """What is safe in every column, in one line, and a table of the rest."""
    found = list(rows())
    safe = [row for row in found if _columns(row)[1:] == ("ok",) * 3]
    columns = ("layer", "second derivative", "many tasks", "many steps", "refused by", "fix")
    rest = table(columns, [_cells(row) for row in found if row not in safe], "markdown")
    names = "; ".join(row.name for row in safe)
    return f"**Safe in every way:** {names}.\n\n**Not, or not in every way:**\n\n{rest}"


def _cells(row: Row) -> tuple[str, ...]:
    """A line of the table: "no" where the layer is refused, and by which errors, once."""
    cells = _columns(row)[1:]
    errors = list(dict.fromkeys(cell for cell in cells if cell.startswith("`")))
    shown = ["no" if cell in errors else cell for cell in cells]
    return (row.name, *shown, ", ".join(errors), row.fix)


if __name__ == "__main__":
    print(f"torch {torch.__version__}\n\n{markdown()}")
