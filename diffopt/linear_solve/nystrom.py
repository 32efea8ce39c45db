"""The Nystrom approximation of a damped system."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffopt.linear_solve.base import TINY, LinearSolution, LinearSolver, Matvec, check_options, matrix_columns
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.tasks import Tasks


@final
@dataclass(frozen=True)
class Nystrom(LinearSolver):
    r"""A low-rank solver for symmetric positive semidefinite ``A`` with a damping: ``(A_k + rho I) x = b``.

    .. math:: x = \frac1\rho b - \frac1{\rho^2} c \big(A_{KK} + \tfrac1\rho c^\top c\big)^{-1} c^\top b,\qquad
              c = A_{[:, K]}

    for ``rank`` randomly chosen coordinates ``K``: as many products, none of which waits for another. Exact for the
    damped system when ``A`` has rank at most ``rank`` (and the columns span it); else off by up to
    ``|A - A_k| / rho``, relatively. Costs one product more, for the residual. Where that product, or the columns, show
    that ``A`` is not symmetric, the answer means nothing, and is a breakdown.

    Args:
        rank: number of coordinates, capped at the number there are.
        damping: ``rho > 0``.
        seed: of the choice of coordinates.
        throw: raise if the small system is singular, ``A`` is not symmetric (to a thousandth), or the residual of
            ``(A + rho I) x = b`` is larger than that of the answer zero. How good an ``x`` that is not refused is, its
            residual says.

    Reference: Hataya and Yamada (2023), "Nystrom Method for Accurate and Scalable Implicit Differentiation",
    equation (6). Derivations (6.4).
    """

    rank: int
    damping: float
    seed: int = 0
    throw: bool = True
    symmetric = True
    needs = "a symmetric positive semidefinite matrix of that rank at least"
    if_broken = "take GMRES if it is not symmetric (under Adam or Proximal), else a smaller rank or a larger damping"
    if_unsolved = "the residual is larger than b itself: take a larger rank or damping"

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self, rank=1, damping=TINY, seed=0)

    def iterate(
        self, matvec: Matvec, b: Leaves, tasks: Tasks, start: Leaves | None, precision: float
    ) -> LinearSolution:
        """Solve for stacked tasks."""
        flat, rho = tasks.flatten(b), self.damping
        size = flat.shape[-1]
        # not torch's generator, which vmap forbids: the choice is the same for every task
        chosen = random.Random(self.seed).sample(range(size), min(self.rank, size))
        c = matrix_columns(matvec, b, tasks, chosen)
        # A coordinate that nothing depends on, such as a dead unit's, has a column of zeros, which decides nothing.
        unread = (c == 0).all(-2).to(c.dtype)
        inner = c[..., chosen, :] + c.mT @ c / rho + torch.diag_embed(unread)
        small, info = torch.linalg.solve_ex(inner, c.mT @ flat[..., None])
        x = flat / rho - (c @ small)[..., 0] / rho**2
        value = tasks.unflatten(x, b)
        product = matvec(value)
        residual = tasks.norm(b - (product + rho * value))
        iterations = torch.full_like(residual, len(chosen) + 1, dtype=torch.int64)
        asymmetric = _asymmetric(c, chosen, x, tasks.flatten(product), precision)
        breakdown = (info > 0) | ~residual.isfinite() | asymmetric
        converged = ~breakdown & (residual <= tasks.norm(b))
        return LinearSolution(value, residual, iterations, converged, breakdown)


def _asymmetric(c: Tensor, chosen: Sequence[int], x: Tensor, product: Tensor, precision: float) -> Tensor:
    """Whether the columns ``c`` of ``A``, or the rows of ``A x`` with the same numbers, show that it is not symmetric.

    They are, up to what was rounded, ``A_KK = A_KK'`` and ``(A x)_K = c' x``.
    """
    slack = torch.finfo(c.dtype).eps ** 0.5
    within, across = c[..., chosen, :], product[..., chosen] - (c.mT @ x[..., None])[..., 0]
    size = c.flatten(-2).norm(dim=-1)
    allowed = max(1e-3, 8 * precision) * size * x.norm(dim=-1) + max(slack, 8 * precision) * product.norm(dim=-1)
    inside = (within - within.mT).flatten(-2).norm(dim=-1) > max(1e-3, 8 * precision) * size
    found: Tensor = inside | (across.norm(dim=-1) > allowed)
    return found
