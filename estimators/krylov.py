"""The Krylov rule: minimal residuals over the whole trajectory's adjoints at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from diffopt.adjoint.adjoint_system import AdjointSystem
from diffopt.adjoint.claims import ALL_INPUTS, Claims
from diffopt.adjoint.estimator import Adjoint
from diffopt.adjoint.time_stack import appended, row, rows
from diffopt.adjoint.trajectory import Cotangents, DirectTerms, Trajectory
from diffopt.linear_solve import minimal_residual, with_wide_vectors
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
        exact, read = self.order >= steps, ALL_INPUTS if self.order else ALL_INPUTS - {"args", "batches"}
        second, linear = self.order > 0, exact or self.order <= 1
        return Claims("always" if exact else "never", read, second_derivatives=second, linear=linear)

    def keep(self, steps: int) -> Keep:
        """Every state, and every gradient."""
        return Keep(first=1, checkpoint=1, gradients=True)

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        """Solve for the adjoints of all steps."""
        tasks, diagnostics = trajectory.tasks, trajectory.record.diagnostics
        if self.order >= trajectory.steps:
            diagnostics["residual"] = 0 * tasks.norm(cotangent)
            return trajectory.sweep(cotangent)
        direct, system = DirectTerms(trajectory), AdjointSystem(trajectory, self.chunk_size, again=self.order > 1)
        stack = system.scan(None, cotangent)  # r: no factor of curvature, Lambda_0, ..., Lambda_{T-1}
        if self.order > 0:
            size, turned = tasks.norm(system.apart(stack)), system.turned(stack, cotangent)
            pushes = system.curvature.product(turned, 1, direct if self.order == 1 else None)
            residual = system.scan(pushes, cotangent.zeros())  # S K r
            if self.order > 1:
                start, bound = system.apart(residual), self.rtol * size if self.rtol else None
                matvec = with_wide_vectors(system.matvec, start)
                update, left, _ = minimal_residual(matvec, start.widened(), tasks, self.order - 1, bound)
                stack = (stack.widened() + system.joined(update)).cast(stack)
                residual = system.joined(left).cast(stack)
                if system.curvature.reads_wanted:
                    system.curvature.product(system.turned(stack, cotangent), 1, direct)
            left_over = tasks.norm(system.apart(residual))
            relative = diagnostics["residual"] = torch.where(size > 0, left_over / size, 0)
            what = f"Krylov(order={self.order}): the relative residual of the adjoints' system"
            trajectory.warn_if_bad(relative, 0.5, what)
            stack = stack + residual
        direct.add_updates(appended(rows(stack, 1, trajectory.steps), cotangent))
        return Cotangents(row(stack, 0), direct.collect())
