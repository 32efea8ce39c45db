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
from itertools import accumulate
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

import diffopt
from diffopt.experiments.framework.experiment import Row
from diffopt.experiments.framework.unit_context import Work
from diffopt.linear_solve import ConjugateGradient
from diffopt.warm_starts import Warm

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
    slope: Tensor = 2 * away / (1 + away.square())
    return slope


def outer_loss(phi: Tensor, theta: Tensor, task: Tasks) -> Tensor:
    """Smooth, and not convex; with an L2 term, so that there is a stationary point at a finite place."""
    loss: Tensor = (phi - task.target).square().log1p().sum() + DECAY / 2 * theta.square().sum()
    return loss


def true_gradients(theta: Tensor, tasks: Tasks) -> Tensor:
    """The gradient of each task's outer loss at its exact inner solution, ``[tasks, shared]``."""
    right = tasks.mixing @ theta + tasks.offset
    phi = torch.linalg.solve(tasks.curvature, right)
    multiplier = torch.linalg.solve(tasks.curvature, outer_slope(phi, tasks.target))
    gradients: Tensor = (tasks.mixing.mT @ multiplier[..., None])[..., 0] + DECAY * theta
    return gradients


def algorithm(settings: Any) -> diffopt.WarmStarts:
    """Of one task: so many inner steps and iterations of conjugate gradients, from where both were left."""
    return diffopt.WarmStarts(
        inner_loss,
        outer_loss,
        optimizer=diffopt.SGD(LR),
        steps=settings.steps,
        solver=ConjugateGradient(max_iterations=settings.products, rtol=0.0, throw=False),
        check=False,  # the same loss thousands of times
    )


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
    method = algorithm(settings)
    kept = method.start(torch.zeros(settings.tasks, SIZE, dtype=torch.float64))
    squared: list[float] = []
    for _ in range(settings.iterations):
        squared.append(float(true_gradients(theta, tasks).mean(0).square().sum()))
        if sampled is None:
            rows = torch.arange(settings.tasks)
        else:
            rows = torch.randint(settings.tasks, (sampled,), generator=order)
        found = torch.func.vmap(method, in_dims=(0, None, 0))(
            Warm(kept.params[rows], kept.multiplier[rows]), theta, tasks.taken(rows)
        )
        for all_tasks, seen in zip(kept, found.warm, strict=True):
            all_tasks[rows] = seen  # a task that was drawn twice has the same twice
        theta = theta - settings.outer_lr * found.gradients[0].mean(0)
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
