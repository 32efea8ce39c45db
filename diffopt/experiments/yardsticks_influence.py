r"""Influence balancing: a linear system in which what a parameter does at once and what it does in time differ in sign.

The state ``s`` has 23 entries, ``s <- A s + theta * signs`` with ``A`` one half on the diagonal and above it, and
``signs`` plus one ten times, then minus one. The loss is ``(s_1 - 1)**2 / 2``. At rest ``s_1 = -6 theta``: the
influence of the first ten entries reaches ``s_1`` first, that of the other thirteen is larger in the end.

Reference: Vicol, Metz and Sohl-Dickstein (2021), "Unbiased Gradient Estimation in Unrolled Computation Graphs with
Persistent Evolution Strategies".
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

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
from diffopt.linear_solve import GMRES, ConjugateGradient, LinearSolver, Neumann, Nystrom

SIZE = 23
POSITIVE = 10
THETA, OPTIMUM = 0.5, -1 / 6
FAR = 100.0
"""Where a descent of ``theta`` has left for good, 300 times as far from the optimum as it began."""


def estimators(steps: int, source: torch.Generator) -> dict[str, Estimator]:
    """Every estimator that applies and the two solvers that refuse; windows and orders no longer than the rollout."""
    series: list[tuple[str, Callable[[int], Estimator], tuple[int, ...]]] = [
        ("truncated", Truncated, (1, 10, 20, 50, 100)),
        ("binomial", Binomial, (1, 10)),
        ("krylov", Krylov, (1, 10, 50, 100)),
        ("multi-step", MultiStep, (2, 4)),
        ("implicit, Neumann", lambda terms: _implicit(Neumann(terms, 1.0, None, throw=False)), (10, 20, 100)),
        ("implicit, GMRES", lambda products: _implicit(GMRES(products, throw=False)), (10, SIZE)),
    ]
    found: dict[str, Estimator] = {"exact": Reverse(), "forward mode": ForwardMode()}
    for kind, make, numbers in series:
        found.update({f"{kind} {number}": make(number) for number in numbers if number <= steps})
    found["implicit, CG"] = _implicit(ConjugateGradient())
    found["implicit, Nystrom"] = _implicit(Nystrom(SIZE, 1e-3))
    found["ES Jacobian, Q=1"] = ESJacobian(1, 0.1, generator=source)
    found["first-order"] = FirstOrder()
    return found


def _implicit(solver: LinearSolver) -> Estimator:
    return Implicit(solver)


def system() -> tuple[Tensor, Tensor]:
    """``A`` and the signs."""
    matrix = 0.5 * torch.eye(SIZE, dtype=torch.float64) + 0.5 * torch.diag(torch.ones(SIZE - 1).double(), 1)
    signs = torch.ones(SIZE, dtype=torch.float64)
    signs[POSITIVE:] = -1
    return matrix, signs


def at_rest(theta: float) -> float:
    """The hypergradient at rest: ``s_1 = -6 theta``, so that it is ``-6 (-6 theta - 1)``."""
    return 36 * theta + 6


def of_window(steps: int, theta: float) -> float:
    """What is left of it when influence is followed through ``steps`` steps back.

    After ``k`` steps an entry is read that a sum of ``k`` fair coins names, so that one step adds the probability of
    having named one of the first ten, less that of having named one of the other thirteen.
    """
    influence = 0.0
    for k in range(steps):
        chances = [math.comb(k, j) / 2**k for j in range(min(k + 1, SIZE))]
        influence += sum(chances[:POSITIVE]) - sum(chances[POSITIVE:])
    return influence * (-6 * theta - 1)


def hypergradient(estimator: Estimator, theta: Tensor, steps: int) -> float:
    """The derivative in ``theta`` of the loss after so many steps from ones, by an estimator."""
    matrix, signs = system()
    field = diffopt.fixed_point(lambda s, theta: matrix @ s + theta * signs)
    theta = theta.detach().requires_grad_()
    start = torch.ones(SIZE, dtype=torch.float64)
    found = diffopt.solve(field, start, theta, optimizer=diffopt.SGD(1.0), steps=steps, estimator=estimator)
    return float(torch.autograd.grad((found.params[0] - 1).square() / 2, theta)[0])


def measure(name: str, steps: int, iterations: int, lr: float, work: Work) -> Row:
    """The hypergradient at ``THETA``, the warnings that came with it, and where descent by it takes ``theta``.

    Returns:
        ``gradient``; ``warned``, the warnings' names; ``path``, ``theta`` before and after every iteration up to where
        it leaves. Of an estimator that refuses: ``refused``, the error's name. Of one that diverges: ``diverged``.
    """
    estimator = estimators(steps, work.generator("directions"))[name]
    theta = torch.tensor(THETA, dtype=torch.float64)
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            gradient = hypergradient(estimator, theta, steps)
        warned = sorted({w.category.__name__ for w in heard if w.category.__module__.startswith("diffopt")})
        path = [THETA]
        for _ in range(iterations):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of every iteration the same
                path.append(
                    path[-1] - lr * hypergradient(estimator, torch.tensor(path[-1], dtype=torch.float64), steps)
                )
            if abs(path[-1]) > FAR:
                break
    except diffopt.LinearSolveError as error:
        return {"refused": type(error).__name__}
    except FAILED as error:
        return {"diverged": type(error).__name__}
    return {"gradient": gradient, "warned": warned, "path": path}


def by_hand(name: str) -> float | None:
    """An estimator's hypergradient at ``THETA`` after a long time, from the closed forms; ``None``: there is none."""
    kind, _, number = name.rpartition(" ")
    if kind in ("truncated", "implicit, Neumann"):
        return of_window(int(number), THETA)
    exact = ("exact", "forward mode", "ES Jacobian, Q=1", "multi-step 2", f"implicit, GMRES {SIZE}")
    return at_rest(THETA) if name in exact else 0.0 if name == "first-order" else None
