r"""Tasks whose true gradient is known, and the memory-reduced algorithm on them.

The ``i``-th task has the inner and the outer loss

.. math:: \ell_i(\phi, \theta) = \tfrac12\phi^\top A_i\phi - \phi^\top(B_i\theta + c_i),\qquad
          F_i(\phi, \theta) = \sum_j\log\big(1 + (\phi - t_i)_j^2\big) + \tfrac\rho2\lVert\theta\rVert^2

with the eigenvalues of :math:`A_i` between 0.3 and 1: the inner problem is strongly convex, the outer one smooth and
not convex, and :math:`\phi_i^\star = A_i^{-1}(B_i\theta + c_i)` is exact. Float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

import diffopt
from diffopt.experiments.framework.experiment import Row
from diffopt.experiments.framework.unit_context import Work
from diffopt.linear_solve import ConjugateGradient

SIZE, SHARED = 6, 3
"""Of a task's own variable, and of the one that they share."""
LOWEST, DECAY = 0.3, 0.2
"""The smallest eigenvalue of an inner problem, the largest being 1; the outer L2 term."""
LR = 1.0
"""Of inner steps: the inverse of the largest eigenvalue."""
POINTS = 50
"""Of a curve that are kept."""
TARGETS = tuple(10 ** (-exponent / 4) for exponent in range(4, 11))
"""What the squared gradient comes down to, as parts of the first."""


class Tasks(NamedTuple):
    """Of all tasks, stacked: ``A``, ``B``, ``c`` and ``t``."""

    curvature: Tensor
    mixing: Tensor
    offset: Tensor
    target: Tensor

    def taken(self, rows: Tensor) -> Tasks:
        """Some of them."""
        return Tasks(*(x[rows] for x in self))


def drawn(tasks: int, generator: torch.Generator) -> Tasks:
    """Tasks of random curvature, no two alike."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(tasks, *shape, generator=generator, dtype=torch.float64)

    basis = torch.linalg.qr(normal(SIZE, SIZE))[0]
    eigenvalues = torch.linspace(LOWEST, 1.0, SIZE, dtype=torch.float64)
    curvature = basis @ torch.diag(eigenvalues) @ basis.mT
    return Tasks(curvature, normal(SIZE, SHARED) / math.sqrt(SHARED), normal(SIZE), normal(SIZE))


def inner_loss(phi: Tensor, theta: Tensor, task: Tasks) -> Tensor:
    """Strongly convex in ``phi``."""
    return phi @ task.curvature @ phi / 2 - phi @ (task.mixing @ theta + task.offset)


def outer_slope(phi: Tensor, target: Tensor) -> Tensor:
    """The gradient of the outer loss in ``phi``."""
    away = phi - target
    return 2 * away / (1 + away.square())


def true_gradients(theta: Tensor, tasks: Tasks) -> Tensor:
    """The gradient of each task's outer loss at its exact inner solution, ``[tasks, shared]``."""
    right = tasks.mixing @ theta + tasks.offset
    phi = torch.linalg.solve(tasks.curvature, right)
    multiplier = torch.linalg.solve(tasks.curvature, outer_slope(phi, tasks.target))
    return (tasks.mixing.mT @ multiplier[..., None])[..., 0] + DECAY * theta


def visit(settings: Any, phi: Tensor, multiplier: Tensor, theta: Tensor, task: Tasks) -> tuple[Tensor, Tensor, Tensor]:
    """The algorithm on one task: its next inner solution, its next multiplier, and what it says of ``theta``."""
    sgd = diffopt.SGD(LR)
    phi = diffopt.solve(inner_loss, phi, theta, task, optimizer=sgd, steps=settings.steps).params.detach()
    found = diffopt.implicit_gradients(
        inner_loss,
        phi,
        theta,
        task,
        cotangent=outer_slope(phi, task.target),
        solver=ConjugateGradient(max_iterations=settings.products, rtol=0.0, throw=False),
        start=multiplier,
        check=False,  # the same loss thousands of times
    )
    return phi, found.multiplier, found.args[0] + DECAY * theta


def descend(settings: Any, sampled: int | None, work: Work) -> Row:
    """Descend by the mean over ``sampled`` tasks drawn anew in each iteration; ``None``: over all of them.

    Returns:
        The squared norm of the true gradient: means over equal parts of the iterations, and the iteration at the end of
        each; its mean over the last half; the last as a part of the first; after how many iterations it, and its mean
        over all iterations so far, first was each of ``TARGETS`` of the first (``None``: never). And the variance of
        one task's gradient in the end.
    """
    tasks, order = drawn(settings.tasks, work.generator("tasks")), work.generator("sampled tasks")
    theta = torch.full((SHARED,), 2.0, dtype=torch.float64)
    heads, multipliers = (torch.zeros(settings.tasks, SIZE, dtype=torch.float64) for _ in range(2))
    squared: list[float] = []
    for _ in range(settings.iterations):
        squared.append(float(true_gradients(theta, tasks).mean(0).square().sum()))
        if sampled is None:
            rows = torch.arange(settings.tasks)
        else:
            rows = torch.randint(settings.tasks, (sampled,), generator=order)
        phi, multiplier, slopes = torch.func.vmap(partial(visit, settings), in_dims=(0, 0, None, 0))(
            heads[rows], multipliers[rows], theta, tasks.taken(rows)
        )
        heads[rows], multipliers[rows] = phi, multiplier  # a task that was drawn twice has the same twice
        theta = theta - settings.outer_lr * slopes.mean(0)
    last = true_gradients(theta, tasks)
    return {**said(squared), "variance": float((last - last.mean(0)).square().sum(1).mean())}


def said(squared: Sequence[float]) -> Row:
    """What :func:`descend` returns of the squared norms."""
    count = len(squared)
    part = max(1, count // POINTS)
    return {
        "after": list(range(part, count + 1, part)),
        "squared": [fmean(squared[at - part : at]) for at in range(part, count + 1, part)],
        "floor": fmean(squared[count // 2 :]),
        "left": squared[-1] / squared[0],
        "last": reached(squared),
        "mean": reached([total / number for number, total in enumerate(accumulate(squared), 1)]),
    }


def reached(values: Sequence[float]) -> list[int | None]:
    """After how many iterations the values were first at each of the targets; the first is after one."""
    found: list[int | None] = []
    for target in TARGETS:
        below = (number for number, value in enumerate(values, 1) if value <= target * values[0])
        found.append(next(below, None))
    return found
