"""The Neumann series, and the power method that gives it a step size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffopt.linear_solve.base import (
    TINY,
    LinearSolution,
    LinearSolver,
    Matvec,
    check_options,
    relative_bound,
)
from diffopt.linear_solve.loop import Carry, repeated
from diffopt.tensors.arguments import MOST, Options
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.tasks import Tasks


@final
@dataclass(frozen=True)
class Neumann(LinearSolver):
    r"""The Neumann series ``x = a sum_j (I - a A)^j b``, for ``A`` with eigenvalues in ``(0, 2/a)``.

    ``k`` terms are ``k`` steps of gradient descent on the quadratic, and at a stationary point the hypergradient
    truncated to ``k`` steps. A residual that has grown is reported as a breakdown.

    Args:
        terms: how many terms; stops when converged.
        step_size: ``a``; ``None``: one over the largest eigenvalue, estimated by ``power_iterations`` products.
        rtol, throw: as in :class:`ConjugateGradient`; ``rtol=None`` takes any residual that has not grown.
        power_iterations: for the estimate; 10,000 at most, for all of them are made.

    Reference: Lorraine, Vicol and Duvenaud (2020), "Optimizing Millions of Hyperparameters by Implicit
    Differentiation", section 4. Derivations, sections 6.1 and 6.6.
    """

    terms: int = 100
    step_size: float | None = None
    rtol: float | None = 1e-5
    throw: bool = True
    power_iterations: int = 10
    needs = "step_size * A between 0 and 2"
    if_broken = "the series diverged: take a smaller step_size, or GMRES"
    if_unsolved = "allow more terms or a larger rtol, take ConjugateGradient or GMRES"

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self, "rtol", "step_size", terms=1, step_size=TINY, rtol=0.0)
        Options(self).integer("power_iterations", 1, high=MOST + 1, fix=f" (and at most {MOST})")

    def iterate(
        self, matvec: Matvec, b: Leaves, tasks: Tasks, start: Leaves | None, precision: float
    ) -> LinearSolution:
        """Solve for stacked tasks."""
        first = tasks.norm(b)
        x, r = (b.zeros(), b) if start is None else (start, b - matvec(start))
        used = int(start is not None)
        if self.step_size is None:
            step, used = 1 / largest_eigenvalue(matvec, b, tasks, self.power_iterations), used + self.power_iterations
        else:
            step = torch.ones_like(first) * self.step_size  # infinite, not refused, where the dtype cannot hold it
        bound = 0 * first if self.rtol is None else max(self.rtol, precision) * first

        def term(x: Leaves, r: Leaves, numbers: Leaves) -> Carry:
            iterations, active = numbers
            move = tasks.times(torch.where(active, step, 0), r)
            x, r = x + move, r - matvec(move)
            return x, r, Leaves([iterations + active, active & (tasks.norm(r) > bound)])

        numbers = Leaves([torch.full_like(first, used, dtype=torch.int64), tasks.norm(r) > bound])
        x, r, (iterations, _) = repeated(term, (x, r, numbers), self.terms, lambda x, r, numbers: numbers[1])
        if precision:  # what the products rounded off is in x, but not in the recurrence's residual
            r, iterations = b - matvec(x), iterations + 1
            bound = 0 * first if self.rtol is None else relative_bound(self.rtol, precision) * first
        residual = tasks.norm(r)
        breakdown = ~(residual <= first)
        converged = ~breakdown if self.rtol is None else residual <= bound
        return LinearSolution(x, residual, iterations, converged, breakdown)


def largest_eigenvalue(matvec: Matvec, like: Leaves, tasks: Tasks, iterations: int) -> Tensor:
    """The eigenvalue of largest modulus (its modulus), one per task, by the power method from a fixed start."""

    def step(v: Leaves, size: Leaves) -> Carry:
        v = matvec(tasks.times(1 / size[0], v))
        return v, Leaves([tasks.norm(v)])

    v = tasks.start(like)
    _, (size,) = repeated(step, (v, Leaves([tasks.norm(v)])), iterations)
    return size
