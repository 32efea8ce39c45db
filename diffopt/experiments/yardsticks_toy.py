r"""Shen and Chen's toy: one outer and one inner number, an inner problem that is not convex, and a closed form.

.. math:: \min_{0 \le x \le 3} \frac{\cos(4y + 2)}{1 + e^{2 - 4x}} + \frac12\log\big((4x - 2)^2 + 1\big),\qquad
          y = \arg\min_y\ (x + y)^2 + x\sin^2(x + y)

The inner solution is ``y = -x``, so that the outer loss is a function ``h(x)`` with three local minima.

Reference: Shen and Chen (2023), "On Penalty-based Bilevel Gradient Descent Method", the numerical example.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

import diffopt
from diffopt.estimators import (
    Binomial,
    ESJacobian,
    Estimator,
    FirstOrder,
    ForwardMode,
    Implicit,
    Krylov,
    MultiStep,
    Reverse,
    Truncated,
)
from diffopt.experiments.framework.experiment import Row
from diffopt.experiments.framework.outer_loop import FAILED
from diffopt.experiments.framework.unit_context import Work
from diffopt.linear_solve import ConjugateGradient, Neumann, Nystrom

LOW, HIGH = 0.0, 3.0
INNER_LR = 0.1
"""Curvature at the solutions is 2 + 2x, at most 8."""
CLOSE = 0.01
"""An end within so much of a local minimiser has reached it."""


def estimators(steps: int, source: torch.Generator) -> dict[str, Estimator]:
    """Every estimator by its name; windows and orders no longer than the rollout."""
    found: dict[str, Estimator] = {"exact": Reverse(), "forward mode": ForwardMode()}
    found |= {f"truncated {kept}": Truncated(kept) for kept in (1, 5) if kept <= steps}
    found |= {f"binomial {order}": Binomial(order) for order in (1, 5) if order <= steps}
    found |= {f"krylov {order}": Krylov(order) for order in (1, 5) if order <= steps}
    found |= {f"multi-step {window}": MultiStep(window) for window in (2, 4)}
    found["implicit, CG"] = Implicit(ConjugateGradient(throw=False))
    found["implicit, Neumann 5"] = Implicit(Neumann(5, 1.0, None, throw=False))
    found["implicit, Nystrom"] = Implicit(Nystrom(1, 0.01, throw=False))
    found["ES Jacobian, Q=1"] = ESJacobian(1, 1e-4, generator=source)
    found["first-order"] = FirstOrder()
    return found


def inner_loss(y: Tensor, x: Tensor) -> Tensor:
    """``g``."""
    return (x + y).square() + x * (x + y).sin().square()


def outer_loss(x: Tensor, y: Tensor) -> Tensor:
    """``f``."""
    return (4 * y + 2).cos() / (1 + (2 - 4 * x).exp()) + ((4 * x - 2).square() + 1).log() / 2


def slope(x: Tensor) -> Tensor:
    """``h'``: the derivative of ``f(x, -x)``, written out."""
    turn, gate, line = 2 - 4 * x, (4 * x - 2).sigmoid(), 4 * x - 2
    return 4 * gate * (turn.sin() + turn.cos() * (1 - gate)) + 4 * line / (line.square() + 1)


def minimisers() -> Tensor:
    """The local minimisers of ``h``, by the changes of sign of its slope on a fine grid, to about 1e-8."""
    x = torch.linspace(LOW, HIGH, 30_001, dtype=torch.float64)
    at = slope(x)
    turns = ((at[:-1] < 0) & (at[1:] >= 0)).nonzero()[:, 0]
    share = at[turns] / (at[turns] - at[turns + 1])
    found = x[turns] + share * (x[turns + 1] - x[turns])
    ends = [end for end, place, sign in ((LOW, 0, 1), (HIGH, -1, -1)) if sign * float(at[place]) > 0]
    return torch.cat([found, torch.tensor(ends, dtype=torch.float64)])


def hypergradients(estimator: Estimator, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """The derivative of the outer loss at every ``x``, the inner problem starting at ``y``; both ``[starts]``."""

    def outer(x: Tensor, y: Tensor) -> Tensor:
        optimizer = diffopt.SGD(INNER_LR)
        found = diffopt.solve(inner_loss, y, x, optimizer=optimizer, steps=steps, estimator=estimator)
        return outer_loss(x, found.params)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", diffopt.EstimateWarning)
        derivatives: Tensor = torch.func.vmap(torch.func.grad(outer), randomness="different")(x, y)
    return derivatives.detach()


def measure(name: str, steps: tuple[int, ...], points: int, starts: int, iterations: int, lr: float, work: Work) -> Row:
    """Errors over a grid at every number of steps, and the ends of projected gradient descent from random x.

    Returns:
        ``errors``: by number of steps, the median and the largest error, and the share of wrong signs where the slope
        is above 0.1; ``starts`` and ``ends``: ``x`` before and after the descent, which takes the last of ``steps``.
    """
    y = torch.ones(points, dtype=torch.float64)
    x = torch.linspace(LOW, HIGH, points, dtype=torch.float64)
    errors: dict[str, list[float]] = {}
    for number in steps:
        estimator = estimators(number, work.generator("directions")).get(name)
        if estimator is None:
            continue
        try:
            found = hypergradients(estimator, x, y, number)
        except FAILED:
            continue
        off, steep = (found - slope(x)).abs(), slope(x).abs() > 0.1
        wrong = (found * slope(x) < 0)[steep].double().mean()
        errors[str(number)] = [float(off.median()), float(off.max()), float(wrong)]
    estimator = estimators(steps[-1], work.generator("directions"))[name]
    generator = work.generator("starts")
    x, y = (torch.rand(2, starts, generator=generator, dtype=torch.float64) * torch.tensor([[3.0], [6.0]])).unbind()
    y, first = y - 3, x
    try:
        for _ in range(iterations):
            x = (x - lr * hypergradients(estimator, x, y, steps[-1])).clamp(LOW, HIGH)
    except FAILED as error:
        return {"errors": errors, "diverged": type(error).__name__}
    return {"errors": errors, "starts": first.tolist(), "ends": x.tolist()}


def distances(ends: list[float]) -> Tensor:
    """How far each end is from the nearest local minimiser."""
    gaps = torch.tensor(ends, dtype=torch.float64)[:, None] - minimisers()
    return gaps.abs().amin(1)
