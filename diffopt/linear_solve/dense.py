"""A direct solve of the whole matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from diffopt.linear_solve.base import (
    LinearSolution,
    LinearSolver,
    Matvec,
    check_options,
    matrix_columns,
    relative_bound,
)
from diffopt.tensors import tracing
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.tasks import Tasks


@final
@dataclass(frozen=True)
class Dense(LinearSolver):
    """The matrix, column by column, and a direct solve: ``n`` products, ``n * n`` numbers. For small systems.

    Args:
        damping: added to the diagonal.
        throw: raise if the matrix is singular.
    """

    damping: float = 0.0
    throw: bool = True
    if_broken = "a larger damping makes it so"
    if_unsolved = "solve in single precision"

    def __post_init__(self) -> None:
        """Check the damping."""
        check_options(self, damping=0.0)

    def iterate(
        self, matvec: Matvec, b: Leaves, tasks: Tasks, start: Leaves | None, precision: float
    ) -> LinearSolution:
        """Solve for stacked tasks."""
        tracing.refuse("Dense, whose decompositions the compiler writes no code for")
        flat = tasks.flatten(b)
        size = flat.shape[-1]
        matrix = matrix_columns(matvec, b, tasks, range(size))
        matrix = matrix + self.damping * torch.eye(size, dtype=flat.dtype, device=flat.device)
        x, _ = torch.linalg.solve_ex(matrix, flat[..., None])
        value, products = tasks.unflatten(x[..., 0], b), size
        residual = (flat - (matrix @ x)[..., 0]).norm(dim=-1)
        sizes = torch.linalg.svdvals(torch.where(matrix.isfinite(), matrix, 0))
        breakdown = sizes[..., -1] <= size * torch.finfo(flat.dtype).eps * sizes[..., 0]
        bound = torch.full_like(residual, torch.inf)
        if precision:  # the columns were rounded: a product with the solution shows what that did to it
            residual, products = tasks.norm(b - matvec(value) - self.damping * value), size + 1
            bound = relative_bound(0.0, precision) * tasks.norm(b)
        breakdown = breakdown | ~residual.isfinite()
        iterations = torch.full_like(residual, products, dtype=torch.int64)
        return LinearSolution(value, residual, iterations, ~breakdown & (residual <= bound), breakdown)
