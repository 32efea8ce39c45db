"""The Krylov estimator: minimal residuals over the whole trajectory's adjoints at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from diffopt.adjoint.adjoint_system import AdjointSystem
from diffopt.adjoint.claims import ALL_INPUTS, Claims
from diffopt.adjoint.direct_terms import DirectTerms
from diffopt.adjoint.estimator import Adjoint
from diffopt.adjoint.time_stack import row
from diffopt.adjoint.trajectory import Cotangents, Pulled, Trajectory
from diffopt.linear_solve import minimal_residual, with_wide_vectors
from diffopt.rollout.ranks import refuse_shards
from diffopt.rollout.record import Keep
from diffopt.tensors.arguments import Options
from diffopt.tensors.leaves import Leaves


@final
@dataclass(frozen=True)
class Krylov(Adjoint):
    r"""GMRES in time: the adjoints of all steps as one linear system, solved with one batch of HVPs per order.

    .. math:: (I - \mathcal S\mathcal K)\,\mathbf\Lambda = \mathbf r,\qquad
              (\mathcal K\mathbf\Lambda)_t = P^\top H_t E_t^\top\Lambda_t,\quad
              \mathcal S:\ x_{t-1} = C_t^\top x_t + y_t

    for ``Lambda_0, ..., Lambda_{T-1}``, where ``r`` is what the scan ``S`` gives without curvature, plus the curvature
    term of the known ``Lambda_T``. :class:`Binomial` of order ``L`` is ``L`` Richardson iterations on this system; this
    estimator takes the smallest residual in the same space, so that it stays bounded where the binomial series has not
    yet begun to converge. Both agree for ``order`` 0 and 1. Exact for ``order >= T``.

    Biased below that. ``Solution.diagnostics["residual"]``, the norm of the system's residual over that of the adjoints
    without curvature, is there after the backward pass (one per task; missing for ``order=0``); above 0.5 there is a
    warning, :class:`diffopt.EstimateWarning`. Cost: ``L`` batches of at most ``T`` HVPs, one more if the loss's
    arguments want their hypergradient and ``L > 1``. Depth: as many. Memory: ``T`` states and gradients, ``L`` times
    ``T`` adjoints, and the graph of ``T`` gradients (or of ``chunk_size``, recorded again).

    Not for: inner problems so long that ``L * T`` adjoints do not fit.

    Args:
        order: ``L``, the number of batches of HVPs: one for the residual at the start, ``L - 1`` iterations of GMRES.
        rtol: in ``[0, 1)``; stop early once every task's relative residual is below it; 0: never. On the CPU only: on
            a GPU all orders are taken. No effect for ``order`` 0 and 1.
        chunk_size: how many steps' products are batched at most; ``None``: all.

    Raises:
        HyperparameterError: an option is out of range.
        RandomnessError: the inner loss draws random numbers.

    Reference: this library; derivations, section 3.7. Saad and Schultz (1986) for GMRES.
    """

    order: int
    rtol: float = 0.0
    chunk_size: int | None = None
    if_unsolved = "take more orders"
    traced = True

    def __post_init__(self) -> None:
        """Check all options."""
        options = Options(self)
        options.integer("order", 0)
        options.number("rtol", 0, 1)
        options.integer("chunk_size", 1, also=(None,))

    def claims(self, steps: int) -> Claims:
        """Exact if every order is taken; minimal residuals are not linear in their right-hand side."""
        exact, read = self.order >= steps, ALL_INPUTS if self.order else ALL_INPUTS - {"args", "batches"}
        second, linear = self.order > 0, exact or self.order <= 1
        return Claims("always" if exact else "never", read, second_derivatives=second, linear=linear)

    def keep(self, steps: int) -> Keep:
        """Every state, and every gradient."""
        return Keep(first=1, checkpoint=1, gradients=True)

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        """Solve for the adjoints of all steps."""
        if self.order >= trajectory.steps:
            trajectory.record.diagnostics["residual"] = 0 * trajectory.tasks.norm(cotangent)
            return trajectory.sweep(cotangent)
        what = f"Krylov(order={self.order}): the relative residual of the adjoints' system"
        fix = "Take more orders or fewer steps, or Reverse()"
        return trajectory.by_program(cotangent, self, self._solved, "residual", 0.5, what, fix)

    def _solved(self, trajectory: Trajectory, cotangent: Leaves) -> Pulled:
        """What minimal residuals give, and the norm of the residual and that of the adjoints without curvature."""
        tasks, measured = trajectory.tasks, []
        direct, system = DirectTerms(trajectory), AdjointSystem(trajectory, self.chunk_size, again=self.order > 1)
        stack = system.scan(None, cotangent)  # Lambda^(0): the adjoints without curvature, from which GMRES starts
        if self.order > 0:
            size, of_gradients = tasks.norm(system.tasks_first(stack)), system.to_gradient(stack, cotangent)
            pushes = system.curvature.product(of_gradients, 1, direct if self.order == 1 else None)
            residual = system.scan(pushes, cotangent.zeros())  # r - (I - S K) Lambda^(0), the residual there
            if self.order > 1:  # order - 1 iterations of GMRES
                refuse_shards(trajectory.rollout.shards, "Krylov")
                start, bound = system.tasks_first(residual), self.rtol * size if self.rtol else None
                matvec = with_wide_vectors(system.matvec, start)  # x - S K x
                update, left, _ = minimal_residual(matvec, start.widened(), tasks, self.order - 1, bound)
                stack = (stack.widened() + system.time_first(update)).cast(stack)
                residual = system.time_first(left).cast(stack)
                if system.curvature.reads_wanted:
                    # only for M_t' E_t' Lambda_t, of the iterate before the free step: this is Lambda^(L-1) in (3.9)
                    system.curvature.product(system.to_gradient(stack, cotangent), 1, direct)
            measured = [tasks.norm(system.tasks_first(residual)), size]
            stack = stack + residual  # the free step: one Richardson iteration; of the residual no product is needed
        direct.add_updates(system.with_last(stack, cotangent))
        return Cotangents(row(stack, 0), direct.collect()), measured
