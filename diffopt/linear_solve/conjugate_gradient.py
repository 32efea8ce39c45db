"""Conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffopt.linear_solve.base import LinearSolution, LinearSolver, Matvec, check_options, is_alone, relative_bound
from diffopt.linear_solve.loop import Carry, repeated
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.tasks import Tasks


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
    symmetric = True
    needs = "a symmetric positive definite matrix"
    if_broken = (
        "it has a direction of curvature <= 0: take GMRES (under Adam or Proximal it is not symmetric), or "
        "Dense(damping=...)"
    )
    if_unsolved = "allow a larger max_iterations or rtol, take GMRES if A is not symmetric (under Adam or Proximal)"

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self, max_iterations=1, rtol=0.0)

    def iterate(
        self, matvec: Matvec, b: Leaves, tasks: Tasks, start: Leaves | None, precision: float
    ) -> LinearSolution:
        """Solve for stacked tasks."""
        if is_alone(b, tasks):
            return self._iterate_alone(matvec, b, tasks, start, precision)
        x = b.zeros() if start is None else start
        r = b if start is None else b - matvec(x)
        p, rr = r, tasks.dot(r, r)
        bound = max(self.rtol, precision) ** 2 * tasks.dot(b, b)
        iterations = torch.zeros_like(rr, dtype=torch.int64) + int(start is not None)

        def step(x: Leaves, r: Leaves, p: Leaves, numbers: Leaves) -> Carry:
            rr, active, breakdown, iterations = numbers
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
            return x, r, p, Leaves([new, active & (new > bound), breakdown, iterations])

        numbers = Leaves([rr, rr > bound, torch.zeros_like(rr, dtype=torch.bool), iterations])
        found = repeated(step, (x, r, p, numbers), self.max_iterations, lambda x, r, p, numbers: numbers[1])
        x, (rr, _, breakdown, iterations) = found[0], found[3]
        return self._judged(matvec, b, tasks, x, rr, bound, iterations, breakdown, precision)

    def _iterate_alone(
        self, matvec: Matvec, b: Leaves, tasks: Tasks, start: Leaves | None, precision: float
    ) -> LinearSolution:
        """The same for one problem on the CPU, in Python's numbers, which cost no wait there."""
        x = [torch.zeros_like(y) if start is None else start[i].clone() for i, y in enumerate(b)]
        r = list(b if start is None else b - matvec(start))
        p, rr, largest = r, _dot(r, r), torch.finfo(b[0].dtype).max
        bound, iterations, breakdown = max(self.rtol, precision) ** 2 * _dot(b, b), int(start is not None), False
        for _ in range(self.max_iterations):
            if not rr > bound:
                break
            ap, iterations = matvec(Leaves(p)), iterations + 1
            curvature = _dot(p, ap)
            if not curvature > 0 or not rr / curvature <= largest:  # which NaN is not
                breakdown, rr = True, rr if math.isfinite(curvature) else math.nan
                break
            alpha = rr / curvature
            torch._foreach_add_(x, p, alpha=alpha)
            r = list(torch._foreach_add(r, list(ap), alpha=-alpha))
            new = _dot(r, r)
            p = list(torch._foreach_add(r, p, alpha=new / rr))
            rr = new
        size, limit = b[0].new_tensor(rr), b[0].new_tensor(bound)
        used, broke = torch.tensor(iterations), torch.tensor(breakdown)
        return self._judged(matvec, b, tasks, Leaves(x), size, limit, used, broke, precision)

    def _judged(
        self,
        matvec: Matvec,
        b: Leaves,
        tasks: Tasks,
        x: Leaves,
        rr: Tensor,
        bound: Tensor,
        iterations: Tensor,
        breakdown: Tensor,
        precision: float,
    ) -> LinearSolution:
        """What has been found, after ``iterations`` products, with the squared residual ``rr`` by the recurrence."""
        converged, slack = rr <= bound, max(relative_bound(self.rtol, precision), torch.finfo(rr.dtype).eps ** 0.5)

        def look(numbers: Leaves) -> Carry:
            # what was rounded off is in x, but not in the recurrence's residual
            r = b - matvec(x)
            size = tasks.dot(r, r)
            accepted = size <= slack**2 * tasks.dot(b, b)
            return [Leaves([size, numbers[1] + 1, accepted if precision else numbers[2] & accepted])]

        if precision or rr.dtype != torch.float64:
            any_converged = None if precision else lambda numbers: numbers[2]
            ((rr, iterations, converged),) = repeated(look, [Leaves([rr, iterations, converged])], 1, any_converged)
        return LinearSolution(x, rr.sqrt(), iterations, converged & ~breakdown, breakdown)


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum([torch.dot(_flat(x), _flat(y)).item() for x, y in zip(a, b, strict=True)])


def _flat(x: Tensor) -> Tensor:
    return x if x.ndim == 1 else x.flatten()
