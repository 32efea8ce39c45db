"""What every estimator costs, by formula and by the counters of a real solve: ``python -m benchmarks.costs``.

Writes ``docs/costs.md``. The inner problem is a logistic regression with one learned penalty per weight; a count that
is not its formula's stops the run.
"""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

import diffopt
from diffopt import estimators, linear_solve
from diffopt.adjoint.autograd_function import solves_behind
from diffopt.reports import table

WEIGHTS, EXAMPLES = 8, 20
PAGE = Path(__file__).resolve().parents[1] / "docs" / "costs.md"


class Setting(NamedTuple):
    """Sizes of one column of the table.

    Attributes:
        T: inner steps.
        L: order, or steps kept.
        W: steps whose curvature counts in the hybrid estimator.
        n: updates per gradient in the multi-step estimator.
        k: iterations of a solver; a state is stored every so many steps.
        Q: random directions.
        b: products in one batch at most.
        p: learned penalties.
        m: weights.
    """

    T: int
    L: int
    W: int
    n: int
    k: int
    Q: int
    b: int
    p: int = WEIGHTS
    m: int = WEIGHTS

    def __str__(self) -> str:
        """The sizes by name, but for those that never change."""
        return ", ".join(f"{name}={value}" for name, value in self._asdict().items() if name not in "pm")

    def value(self, text: str) -> int:
        """A formula's value for these sizes."""
        result = eval(text, {"ceil": math.ceil, "isqrt": math.isqrt}, self._asdict())
        assert isinstance(result, int), text
        return result

    def estimator(self, text: str) -> estimators.Estimator:
        """The estimator that a call in these letters makes."""
        result = eval(text, {**vars(estimators), **vars(linear_solve)}, self._asdict())
        assert isinstance(result, estimators.Estimator), text
        return result


SETTINGS = (
    Setting(T=5, L=2, W=4, n=2, k=3, Q=2, b=2),
    Setting(T=12, L=3, W=6, n=5, k=4, Q=3, b=4),
    Setting(T=30, L=5, W=10, n=4, k=7, Q=4, b=7),
)


class Costs(NamedTuple):
    """What an estimator uses, as formulas or as numbers; the last three between the rollout and the backward pass."""

    gradients: str | int
    products: str | int
    depth: str | int
    states: str | int = "0"
    kept_gradients: str | int = "0"
    graphs: str | int = "0"


@dataclass(frozen=True)
class Row:
    """An estimator, its formulas, and whether the start and the penalties want their hypergradient."""

    estimator: str
    formulas: Costs
    start: bool = True
    penalties: bool = True

    @property
    def learned(self) -> str:
        """What is learned, in words."""
        return "both" if self.start and self.penalties else "start" if self.start else "penalties"


W, N = "ceil(T / n)", "(T - L + 1)"
ROWS = (
    Row('Reverse("graph")', Costs("T", "T", "T", graphs="T")),
    Row("Reverse(1)", Costs("2 * T", "T", "T", states="T")),
    Row("Reverse(k)", Costs("3 * T - ceil(T / k)", "T", "T", states="ceil(T / k)")),
    Row(
        'Reverse("sqrt")',
        Costs("3 * T - ceil(T / (isqrt(T - 1) + 1))", "T", "T", states="ceil(T / (isqrt(T - 1) + 1))"),
    ),
    Row("ForwardMode()", Costs("2 * T", "T * p", "T"), start=False),
    Row("FirstOrder()", Costs("T", "0", "0")),
    Row("Reptile()", Costs("T", "0", "0")),
    Row("Truncated(L)", Costs("T", "L", "L", graphs="L")),
    Row("Truncated(L, 1)", Costs("T + L", "L", "L", states="L")),
    Row("Binomial(L)", Costs("T", f"L * {N}", "L", "T", "T")),
    Row("Binomial(L)", Costs("T", f"L * {N}", "L", "T", "T"), penalties=False),
    Row("Binomial(L, chunk_size=b)", Costs("T", f"L * {N}", f"L * ceil({N} / b)", "T", "T"), penalties=False),
    Row("Binomial(L, window=W)", Costs("T", "L * (W - L + 1)", "L", "T", "T")),
    Row("Krylov(L)", Costs("T", "T + (L - 1) * (T - 1) + T", "L + 1", "T", "T")),
    Row("Krylov(L)", Costs("T", "T + (L - 1) * (T - 1)", "L", "T", "T"), penalties=False),
    Row("MultiStep(n)", Costs(W, W, W, graphs=W)),
    Row("MultiStep(n, Binomial(2))", Costs(W, f"2 * ({W} - 1)", "2", W, W)),
    Row("Implicit(ConjugateGradient(k, rtol=0, throw=False))", Costs("T + 1", "k + 1", "k + 1"), start=False),
    Row("Implicit(Neumann(k, step_size=1, rtol=0, throw=False))", Costs("T + 1", "k + 1", "k + 1"), start=False),
    Row("Implicit(GMRES(k, rtol=0, throw=False))", Costs("T + 1", "k + 2", "k + 2"), start=False),
    Row("Implicit(Nystrom(k, damping=0.1, throw=False))", Costs("T + 1", "k + 2", "k + 2"), start=False),
    Row("Implicit(Dense())", Costs("T + 1", "m + 1", "m + 1"), start=False),
    Row("ESJacobian(Q, 1e-3)", Costs("2 * T + 2 * Q * T", "0", "0"), start=False),
    Row("ESJacobian(Q, 1e-3, antithetic=False)", Costs("2 * T + Q * T", "0", "0"), start=False),
)


class _Mark(torch.autograd.Function):
    """The identity; every graph that it stands in holds one token in ``alive``."""

    generate_vmap_rule = True
    alive: ClassVar[weakref.WeakSet[_Token]] = weakref.WeakSet()

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.token = _Token()
        _Mark.alive.add(ctx.token)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent


class _Token:
    """Something to hold."""


def measure(row: Row, setting: Setting) -> Costs:
    """The counters after one hypergradient, and what was stored before its backward pass."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(EXAMPLES, WEIGHTS, generator=generator, dtype=torch.float64)
    labels = torch.randint(2, (EXAMPLES,), generator=generator).double()
    start = 0.1 * torch.randn(WEIGHTS, generator=generator, dtype=torch.float64)
    penalties = torch.full((WEIGHTS,), -1.0, dtype=torch.float64)

    def loss(w: Tensor, penalties: Tensor) -> Tensor:
        w = cast("Tensor", _Mark.apply(w))
        misfit = torch.nn.functional.binary_cross_entropy_with_logits(inputs @ w, labels)
        return misfit + (penalties.exp() * w.square()).sum()

    solution = diffopt.solve(
        loss,
        start.requires_grad_(row.start),
        penalties.requires_grad_(row.penalties),
        optimizer=diffopt.SGD(0.3, momentum=0.5),
        steps=setting.T,
        estimator=setting.estimator(row.estimator),
    )
    outer_loss = solution.params.square().sum()
    gradients = len(solves_behind(outer_loss)[0].call.record.rollout.gradients)
    gc.collect()
    graphs = len(_Mark.alive)
    outer_loss.backward()
    counts = solution.counts
    return Costs(counts.gradients, counts.products, counts.depth, solution.kept.states, gradients, graphs)


def page() -> str:
    """The page, measured now.

    Raises:
        ArithmeticError: a count is not its formula's.
    """
    measured = {(row, setting): measure(row, setting) for row in ROWS for setting in SETTINGS}
    for (row, setting), found in measured.items():
        expected = Costs(*(setting.value(str(formula)) for formula in row.formulas))
        if found != expected:
            raise ArithmeticError(f"{row.estimator} at {setting}: counted {found}, expected {expected}")
    columns = ["estimator", "learned", "gradients", "HVPs", "depth", "stored", *map(str, SETTINGS)]
    lines = []
    for row in ROWS:
        formulas = [f"`{formula}`" for formula in row.formulas[:3]]
        cells = [
            ", ".join(map(str, measured[row, setting][:3])) + f"; {stored(measured[row, setting])}"
            for setting in SETTINGS
        ]
        lines.append([f"`{row.estimator}`", row.learned, *formulas, stored(row.formulas), *cells])
    return f"{TEXT}{table(columns, lines, 'markdown', 'llllllr')}\n"


def stored(costs: Costs) -> str:
    """What is stored, in its units."""
    parts = [f"`{x}` {unit}" for x, unit in zip(costs[3:], ("n", "m", "G"), strict=True) if str(x) != "0"]
    return " + ".join(parts) if parts else "nothing"


TEXT = f"""\
# Costs

What each estimator computes and stores for one hypergradient: by formula, and by the counters of a real solve.
Written by `python -m benchmarks.costs`, which stops where the two differ; a test holds this page to it.

`T` inner steps, `L` orders (or steps kept), curvature of `W` steps, `n` updates per gradient, `k` iterations of a
solver (or a state every `k` steps), `Q` directions, at most `b` products in a batch, `p` learned numbers. *Gradients*
are those of the inner loss, the rollout's included. An *HVP* is one joint product `(H u, M' u)`. *Depth* is how many
batches of them wait for one another. *Stored* is what lies between the rollout and the backward pass: `n` is one state
(params and buffers), `m` one tree of params, `G` the graph of one step. Everything is per task.

The last columns are measured: gradients, HVPs, depth; stored. Inner problem: logistic regression of {WEIGHTS} weights
and {EXAMPLES} examples with one learned penalty per weight (`p = {WEIGHTS}`), SGD with momentum.

What the numbers do not show:

- `Reverse(1)`, `Reverse(k)` and `Truncated(L, 1)` compute again, in the backward pass, the gradients of the steps they
  go through: `T` (or `L`) of the gradients above. While they do, one graph is alive, and the states of one block of `k`
  steps, all but the first of which cost a gradient more. Where a graph is no larger than a state (here it is not) the
  graphs of the block are alive instead, and the gradients are `2 * T`. `Reverse("log")` takes the steps of (13.2).
- `Binomial` and `Krylov` evaluate the gradients of the steps of a batch once more to differentiate them; that is part
  of an HVP here. While they do, `G` of one batch is alive. `Krylov` also holds `L` stacks of `T` adjoints.
- What is counted for `Binomial` and `Krylov` is the products that they need. Without `chunk_size`, and from the second
  order on, they are pulled through one graph of all `T` steps, zeros where an order needs none: `L * T` in work. (Not
  where an order needs less than half of the steps, or the graph takes more than 1 GiB.) That graph is kept for all
  orders: `G` of `T` steps, where an order of `Binomial` alone needs `T - L + 1`. With `chunk_size=T` every order
  records its own steps. Beside that, the kept graph of orders 2 and 3 in 5 to 12 steps took 0.77 to 0.90 of the time
  of the backward pass at 1.3 to 1.5 times the peak for a small MLP, and 1.05 to 1.25 of it at 1.2 to 1.7 times the peak
  for a convolutional network of four layers (one core): take `chunk_size=T` where arithmetic is the cost.
- The last order of `Binomial` also takes the mixed products that the orders before it owe for the latest steps. As
  many orders as steps cost what `Reverse(1)` costs.
- `Krylov` takes one more batch of HVPs where arguments of the loss are learned, for the mixed terms of the adjoints
  that it has put together from its orders.
- `ForwardMode` runs the inner problem again with `p` tangents beside it, and once more for every further learned
  tensor, one after the other; it holds `p` states then. So twelve tensors of one number have a depth of `12 * T`, one
  tensor of twelve has `T`: put them in one tensor, and let the loss take it apart.
- `ESJacobian` runs it `2 Q` times (`Q` if not antithetic), all at once, and once more to see whether the loss repeats
  itself; it holds as many states then.
- `Implicit` takes one gradient more, at the end of the rollout, to differentiate it, and evaluates the loss there once
  more, to see whether it repeats itself. The last HVP gives the mixed term. `GMRES` and `Nystrom` spend one on the
  residual. The columns that `Nystrom` and `Dense` take do not depend on one another, but are taken one after the other,
  from one graph: they count as depth.

"""


def main() -> None:
    """Write the page."""
    torch.set_num_threads(1)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
