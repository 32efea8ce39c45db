"""Conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from diffopt.linear_solve.base import (
    LinearSolution,
    LinearSolver,
    Matvec,
    Tasks,
    all_stopped,
    check_options,
    relative_bound,
)
from diffopt.tensors.leaves import Leaves


@final
@dataclass(frozen=True)
class ConjugateGradient(LinearSolver):
    r"""Conjugate gradients, for symmetric positive definite ``A``.

    The error after ``k`` products is at most ``2 sqrt(kappa) ((sqrt(kappa)-1)/(sqrt(kappa)+1))**k`` of the first, with
    ``kappa`` the condition number. A direction of curvature ``<= 0`` stops its task and is reported as a breakdown.

    Below double precision, and where ``kappa`` is large, the recurrence shrinks its residual further than the true one
    can go. Where it says that it has converged, one more product finds the true one, which has to be below ``rtol`` or
    the root of the dtype's ``eps``.

    Args:
        max_iterations: products at most.
        rtol: converged when the residual's norm is below ``rtol`` times that of ``b``.
        throw: raise :class:`diffopt.LinearSolveError` if not converged.

    Reference: Hestenes and Stiefel (1952), "Methods of Conjugate Gradients for Solving Linear Systems". Derivations,
    section 6.1.
    """

    max_iterations: int = 100
    rtol: float = 1e-5
    throw: bool = True
    needs = "a symmetric positive definite matrix"
    if_broken = (
        "it has a direction of curvature <= 0: take GMRES (under Adam it is not symmetric), or Dense(damping=...)"
    )
    if_unsolved = "allow a larger max_iterations or rtol, take GMRES if A is not symmetric (under Adam)"

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self, max_iterations=1, rtol=0.0)

    def iterate(
        self, matvec: Matvec, b: Leaves, tasks: Tasks, start: Leaves | None, precision: float
    ) -> LinearSolution:
        """Solve for stacked tasks."""
        x = b.zeros() if start is None else start
        r = b if start is None else b - matvec(x)
        p, rr = r, tasks.dot(r, r)
        bound = max(self.rtol, precision) ** 2 * tasks.dot(b, b)
        active, breakdown = rr > bound, torch.zeros_like(rr, dtype=torch.bool)
        iterations = torch.zeros_like(rr, dtype=torch.int64) + int(start is not None)
        for _ in range(self.max_iterations):
            if all_stopped(active):
                break
            ap = matvec(p)
            curvature = tasks.dot(p, ap)
            iterations = iterations + active
            convex = curvature > 0  # which NaN is not
            breakdown, active = breakdown | (active & ~convex), active & convex
            alpha = torch.where(active, rr / torch.where(active, curvature, 1), 0)
            x, r = tasks.plus(x, alpha, p), tasks.plus(r, -alpha, ap)
            new = tasks.dot(r, r)
            # this differs from the textbook only in that a task that has stopped keeps its numbers
            p = tasks.plus(r, torch.where(active, new / torch.where(active, rr, 1), 0), p)
            rr, active = new, active & (new > bound)
        converged = rr <= bound
        if precision or (rr.dtype != torch.float64 and not all_stopped(converged)):
            # what was rounded off is in x, but not in the recurrence's residual
            r, iterations = b - matvec(x), iterations + 1
            rr, slack = tasks.dot(r, r), max(relative_bound(self.rtol, precision), torch.finfo(rr.dtype).eps ** 0.5)
            accepted = rr <= slack**2 * tasks.dot(b, b)
            converged = accepted if precision else converged & accepted
        return LinearSolution(x, rr.sqrt(), iterations, converged & ~breakdown, breakdown)
