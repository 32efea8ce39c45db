"""What hypergradients of usual and of bad programs are worth: ``python -m benchmarks.worth``.

A regression of 64 points by a network 8-32-1, or a map known to be chaotic; learned is a weight for each point. The
errors are those of the exact hypergradient of a validation loss beside central differences of it, along three random
directions, for moves of the weights by 0.1, 0.01, 1e-3 and 1e-4 of their size (``-``: already below a thousandth);
``float64`` is its relative error beside that in float64; the last column is what ``diffopt.check`` says of the steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import diffopt
from diffopt.adjoint.estimator import Estimator


class Program(NamedTuple):
    """An inner problem, and the quantity that is measured at its end."""

    loss: Callable[[Any, Tensor], Tensor]
    params: Any
    weights: Tensor
    outer: Callable[[Any], Tensor]
    optimizer: diffopt.Optimizer
    steps: int


def network(kind: type[nn.Module], optimizer: diffopt.Optimizer, steps: int, dtype: torch.dtype) -> Program:
    """A regression by a small network."""
    torch.manual_seed(0)
    x, direction = torch.randn(128, 8), torch.randn(8)
    y = (x @ direction).sin() + 0.3 * torch.randn(128)
    (x, x_val), (y, y_val) = x.to(dtype).split(64), y.to(dtype).split(64)
    function, params = diffopt.functional(nn.Sequential(nn.Linear(8, 32), kind(), nn.Linear(32, 1)).to(dtype))
    return Program(
        lambda p, w: (w * (function(p, x)[:, 0] - y).square()).mean(),
        {name: value.detach() for name, value in params.items()},
        torch.ones(64, dtype=dtype, requires_grad=True),
        lambda p: (function(p, x_val)[:, 0] - y_val).square().mean(),
        optimizer,
        steps,
    )


def wells(steps: int) -> Program:
    """Two wells, in which gradient descent with a rate of two makes of every number Chebyshev's chaotic cubic."""
    return Program(
        lambda w, a: (a * (w**4 / 4 - w**2 / 2)).sum(),
        torch.linspace(0.1, 0.9, 8),
        torch.ones(8, requires_grad=True),
        torch.sum,
        diffopt.SGD(2.0),
        steps,
    )


def programs() -> dict[str, Program]:
    """All of them, by name."""
    sgd, adam, single, half = diffopt.SGD, diffopt.Adam, torch.float32, torch.bfloat16
    return {
        "tanh, SGD 0.1, 50 steps": network(nn.Tanh, sgd(0.1), 50, single),
        "tanh, momentum 0.9, 50 steps": network(nn.Tanh, sgd(0.05, momentum=0.9), 50, single),
        "tanh, Adam 0.01, 50 steps": network(nn.Tanh, adam(0.01), 50, single),
        "tanh, Adam 0.01, eps 1e-3": network(nn.Tanh, adam(0.01, eps=1e-3), 50, single),
        "ReLU, SGD 0.1, 50 steps": network(nn.ReLU, sgd(0.1), 50, single),
        "SiLU, SGD 0.1, 50 steps": network(nn.SiLU, sgd(0.1), 50, single),
        "tanh, SGD 0.4, 50 steps": network(nn.Tanh, sgd(0.4), 50, single),
        "tanh, bfloat16, 5 steps": network(nn.Tanh, sgd(0.1), 5, half),
        "tanh, bfloat16, SGD 1e-3, 400 steps": network(nn.Tanh, sgd(1e-3), 400, half),
        "two wells, SGD 2, 5 steps": wells(5),
        "two wells, SGD 2, 10 steps": wells(10),
        "two wells, SGD 2, 30 steps": wells(30),
    }


def line(name: str, program: Program) -> str:
    """One row of the table."""
    loss, params, weights, outer, optimizer, steps = program

    def problem(estimator: Estimator) -> Tensor:
        options = {"optimizer": optimizer, "steps": steps, "estimator": estimator}
        return outer(diffopt.solve(loss, params, weights, **options).params)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            worth = diffopt.compare(problem, [], directions=3, repeats=1).worth
            report = diffopt.check(loss, params, weights, optimizer=optimizer, steps=steps, vmap=False)
        except diffopt.DiffoptError as error:
            return f"{name:36s}{type(error).__name__}"
    assert worth is not None
    errors = (worth.smoothness.errors.get(size) for size in (1e-1, 1e-2, 1e-3, 1e-4))
    cells = "".join(f"{'-' if error is None else f'{error:.1g}':>8s}" for error in errors)
    precision = "-" if worth.precision is None else f"{worth.precision:.0e}"
    said = ", ".join(f"{f.check} {f.outcome}" for f in report.findings[-3:] if f.outcome != "ok")
    return f"{name:36s}{cells}{precision:>9s}  {said or 'ok'}"


def main() -> None:
    """Print the table."""
    print(f"{'program':36s}{'0.1':>8s}{'0.01':>8s}{'1e-3':>8s}{'1e-4':>8s}{'float64':>9s}  check")
    for name, program in programs().items():
        print(line(name, program), flush=True)


if __name__ == "__main__":
    main()
