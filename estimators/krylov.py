"""The Krylov rule: minimal residuals over the whole trajectory's adjoints at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from diffopt.adjoint.claims import ALL_INPUTS, Claims
from diffopt.adjoint.estimator import Adjoint
from diffopt.adjoint.parallel_curvature import ParallelCurvature
from diffopt.adjoint.trajectory import Cotangents, DirectTerms, Trajectory
from diffopt.adjoint.update_derivatives import UpdateBlocks
from diffopt.linear_solve import Tasks, minimal_residual, with_wide_vectors
from diffopt.rollout.record import Keep
from diffopt.tensors.arguments import Options
from diffopt.tensors.leaves import Leaves


@final
@dataclass(frozen=True)
class Krylov(Adjoint):
    r"""GMRES in time: the adjoints of all steps as one linear system, solved with one batch of HVPs per level.

    .. math:: (I - \mathcal S\mathcal K)\,\mathbf\Lambda = \mathbf r,\qquad
              (\mathcal K\mathbf\Lambda)_t = P^\top H_t E_t^\top\Lambda_t,\quad
              \mathcal S:\ x_{t-1} = C_t^\top x_t + y_t

    :class:`Binomial` of order ``L`` is ``L`` Richardson iterations on this system; this rule takes the smallest
    residual in the same space, so that it stays bounded where the binomial series has not yet begun to converge. Both
    agree for ``order`` 0 and 1. Exact for ``order >= T``.

    Biased below that; the relative residual of the system is left in ``Solution.diagnostics["residual"]`` after the
    backward pass (one per task); above 0.5 there is a warning, :class:`diffopt.EstimateWarning`. Cost: ``order``
    batches of at most ``T`` HVPs, one more if the loss's arguments want their hypergradient and ``order > 1``. Depth:
    as many. Memory: ``T`` states and gradients, and ``order`` times ``T`` adjoints.

    Not for: inner problems so long that ``order * T`` adjoints do not fit, or losses that draw random numbers.

    Args:
        order: levels.
        rtol: stop early when the relative residual is below (every task's); 0: never.
        chunk_size: how many steps' products are batched at most; ``None``: all.

    Reference: this library; derivations, section 3.7. Saad and Schultz (1986) for GMRES.
    """

    order: int
    rtol: float = 0.0
    chunk_size: int | None = None
    if_unsolved = "take more orders"

    def __post_init__(self) -> None:
        """Check all options."""
        options = Options(self)
        options.integer("order", 0)
        options.number("rtol", 0, 1)
        options.integer("chunk_size", 1, also=(None,))

    def claims(self, steps: int) -> Claims:
        """Exact if every level is taken; minimal residuals are not linear in their right-hand side."""
        exact = self.order >= steps
        return Claims(
            "always" if exact else "never",
            ALL_INPUTS if self.order else ALL_INPUTS - {"args", "batches"},
            second_derivatives=self.order > 0,
            linear=exact or self.order <= 1,
        )

    def keep(self, steps: int) -> Keep:
        """Every state, and every gradient."""
        return Keep(first=1, checkpoint=1, gradients=True)

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        """Solve for the adjoints of all steps."""
        tasks = Tasks(len(trajectory.dynamics.levels))
        if self.order >= trajectory.steps:
            trajectory.record.diagnostics["residual"] = 0 * tasks.norm(cotangent)
            return trajectory.sweep(cotangent)
        direct = DirectTerms(trajectory)
        system = _System(
            trajectory.updates.blocks(),
            ParallelCurvature(trajectory, 1, self.chunk_size, again=self.order > 1),
            trajectory.steps,
            len(trajectory.dynamics.levels),
        )
        nothing = cotangent.zeros()
        stack = system.scan(None, cotangent)
        if self.order > 0:
            first = system.turned(stack, cotangent)
            size = tasks.norm(system.apart(stack))
            pushes = system.curvature.product(first, 1, direct if self.order == 1 else None)
            residual = system.scan(pushes, nothing)
            if self.order > 1:
                start, bound = system.apart(residual), self.rtol * size if self.rtol else None
                matvec = with_wide_vectors(system.matvec, start)
                update, left, _ = minimal_residual(matvec, start.widened(), tasks, self.order - 1, bound)
                stack = (stack.widened() + system.joined(update)).cast(stack)
                residual = system.joined(left).cast(stack)
                if system.curvature.reads_wanted:
                    system.curvature.product(system.turned(stack, cotangent), 1, direct)
            left_over = tasks.norm(system.apart(residual))
            relative = torch.where(size > 0, left_over / size, 0)
            trajectory.record.diagnostics["residual"] = relative
            trajectory.warn_if_bad(
                relative, 0.5, f"Krylov(order={self.order}): the relative residual of the adjoints' system"
            )
            stack = stack + residual
        direct.add_updates(_appended(stack.map(lambda leaf: leaf[1:]), cotangent))
        return Cotangents(stack.map(lambda leaf: leaf[0]), direct.collect())


@final
@dataclass(frozen=True)
class _System:
    """Adjoints ``Lambda_0, ..., Lambda_{T-1}``, stacked along axis 0; to the solver time comes behind the tasks."""

    updates: UpdateBlocks
    curvature: ParallelCurvature
    steps: int
    axis: int

    def apart(self, stack: Leaves) -> Leaves:
        """The tasks' axes in front."""
        return stack.map(lambda leaf: leaf.movedim(0, self.axis))

    def joined(self, stack: Leaves) -> Leaves:
        """Time in front."""
        return stack.map(lambda leaf: leaf.movedim(self.axis, 0))

    def turned(self, stack: Leaves, last: Leaves) -> Leaves:
        """``E_t' x_t`` for ``t = 1, ..., T``, where ``x_T = last``."""
        return self.updates.turn(_appended(stack.map(lambda leaf: leaf[1:]), last), 1)

    def scan(self, pushes: Leaves | None, last: Leaves) -> Leaves:
        """``x_{t-1} = C_t' x_t + P' y_t`` from ``x_T = last``; no HVP."""
        return self.updates.scan(last, 1, self.steps, pushes)

    def matvec(self, x: Leaves) -> Leaves:
        """``(I - S K) x``."""
        stack = self.joined(x)
        later = stack.map(lambda leaf: leaf[1:])
        product = self.curvature.product(self.updates.turn(later, 1), 1)
        nothing = stack.map(lambda leaf: torch.zeros_like(leaf[0]))
        return x - self.apart(self.scan(_appended(product, nothing), nothing))


def _appended(stack: Leaves, last: Leaves) -> Leaves:
    """A stack with one more row; ``last`` may have more leaves, which are left out."""
    return Leaves(torch.cat([leaf, row[None]]) for leaf, row in zip(stack, last, strict=False))
