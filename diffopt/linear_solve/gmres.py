"""Generalised minimal residuals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffopt.linear_solve.base import LinearSolution, LinearSolver, Matvec, check_options, relative_bound
from diffopt.linear_solve.loop import all_stopped
from diffopt.tensors import tracing
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.tasks import Tasks


@final
@dataclass(frozen=True)
class GMRES(LinearSolver):
    r"""Minimal residuals over the Krylov space, for any nonsingular ``A``.

    ``k`` products give the ``x`` of smallest residual in a ``k``-dimensional space; ``n`` products solve the system.
    Memory: one vector per product.

    Args:
        max_iterations: the dimension of the space.
        rtol, throw: as in :class:`ConjugateGradient`.

    Reference: Saad and Schultz (1986), "GMRES: A Generalized Minimal Residual Algorithm for Solving Nonsymmetric
    Linear Systems".
    """

    max_iterations: int = 20
    rtol: float = 1e-5
    throw: bool = True
    if_broken = "Dense(damping=...) damps"
    if_unsolved = "allow a larger max_iterations or rtol, take Dense(damping=...) if A is singular"

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self, max_iterations=1, rtol=0.0)

    def iterate(
        self, matvec: Matvec, b: Leaves, tasks: Tasks, start: Leaves | None, precision: float
    ) -> LinearSolution:
        """Solve for stacked tasks."""
        tracing.refuse("GMRES, whose space grows with every product")
        r0 = b if start is None else b - matvec(start)
        bound = max(self.rtol, precision) * tasks.norm(b)
        update, _, used = minimal_residual(matvec, r0, tasks, self.max_iterations, bound)
        x = update if start is None else start + update
        # the recurrence's own residual goes on falling when round-off no longer lets the true one fall
        size = tasks.norm(b - matvec(x)) if used else tasks.norm(r0)
        iterations = torch.full_like(size, used + int(used > 0) + int(start is not None), dtype=torch.int64)
        converged = size <= relative_bound(self.rtol, precision) * tasks.norm(b)
        return LinearSolution(x, size, iterations, converged, ~size.isfinite())


def minimal_residual(
    matvec: Matvec, r0: Leaves, tasks: Tasks, products: int, bound: Tensor | None = None
) -> tuple[Leaves, Leaves, int]:
    """The update in the Krylov space of ``r0`` after which the residual is smallest, that residual, and products used.

    With ``bound``, stops when every task's residual is below it. The residual vector comes from the Arnoldi relation,
    without another product.
    """
    if bound is not None:
        tracing.refuse("an iteration that stops once its residual is small enough")
    size = tasks.norm(r0)
    basis = [tasks.times(_reciprocal(size), r0)]
    columns: list[list[Tensor]] = []
    dimension = tasks.flatten(r0).shape[-1]
    weights, residual = torch.zeros_like(size)[..., None][..., :0], size[..., None]
    for k in range(min(products, dimension)):
        if bound is not None and all_stopped(residual.norm(dim=-1) > bound):
            break
        w = matvec(basis[k])
        before, column = tasks.norm(w), []
        for q in basis:
            column.append(tasks.dot(w, q))
            w = tasks.plus(w, -column[-1], q)
        after = tasks.norm(w)
        # a vector that was in the space already leaves round-off behind, which must not become a direction
        after = torch.where(after > 1e3 * torch.finfo(after.dtype).eps * before, after, 0)
        columns.append([*column, after])
        basis.append(tasks.times(_reciprocal(after), w))
        if bound is not None:
            weights, residual = _least_squares(columns, size)
    if bound is None and columns:
        weights, residual = _least_squares(columns, size)
    update = _combine(tasks, weights, basis, r0)
    return update, _combine(tasks, residual, basis, r0), len(columns)


def _reciprocal(size: Tensor) -> Tensor:
    return torch.where(size > 0, 1 / torch.where(size > 0, size, 1), 0)


def _least_squares(columns: Sequence[Sequence[Tensor]], size: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise ``|size e_1 - H y|`` for the Hessenberg matrix with these columns; ``y`` and the residual."""
    rows, zero = len(columns) + 1, torch.zeros_like(size)
    full = [torch.stack([*column, *[zero] * (rows - len(column))], dim=-1) for column in columns]
    h = torch.stack(full, dim=-1)
    h = torch.where(h.isfinite(), h, 0)  # one task's NaN would stop the decomposition of all
    e = torch.stack([size, *[zero] * (rows - 1)], dim=-1)
    y = (torch.linalg.pinv(h) @ e[..., None])[..., 0]
    return y, e - (h @ y[..., None])[..., 0]


def _combine(tasks: Tasks, weights: Tensor, basis: Sequence[Leaves], like: Leaves) -> Leaves:
    total = like.zeros()
    for weight, q in zip(weights.unbind(-1), basis, strict=False):
        total = tasks.plus(total, weight, q)
    return total
