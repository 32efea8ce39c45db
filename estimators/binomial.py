"""The binomial estimator: the expansion in orders of curvature, cut off; all steps of an order at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from diffopt.adjoint.claims import ALL_INPUTS, Claims
from diffopt.adjoint.estimator import Adjoint
from diffopt.adjoint.graded import graded
from diffopt.adjoint.trajectory import Cotangents, Pulled, Trajectory
from diffopt.rollout.record import Keep
from diffopt.tensors.arguments import Options, check_within_steps
from diffopt.tensors.leaves import Leaves


@final
@dataclass(frozen=True)
class Binomial(Adjoint):
    r"""The terms of the hypergradient with at most ``order`` factors of curvature (the graded adjoint).

    .. math:: \Lambda^{(l)}_{t-1} = C_t^\top\Lambda^{(l)}_t + P^\top H_t E_t^\top\Lambda^{(l-1)}_t,\qquad
              \nabla_{init} = \Lambda^{(L)}_0,\quad \nabla_{loss} = \sum_t M_t^\top E_t^\top\Lambda^{(L-1)}_t,\quad
              \nabla_\eta = \sum_t D_t^\top\Lambda^{(L)}_t

    from ``Lambda^(l)_T = dF/ds_{T+1}`` and ``Lambda^(-1) = 0``, with ``L = order``; for plain gradient descent it is
    BinomMAML. ``order >= T`` is exact, ``order=0`` drops every second derivative of the loss.

    For gradient descent with curvature at most ``h``, ``scale=1`` and no window, the error of the initial parameters'
    hypergradient is at most ``sum over l > L of binom(T, l) (lr * h)**l`` times the norm of the outer gradient
    (derivations (11c)). It is small once ``L + 1`` is well above ``2.7 * T * lr * h``. **Where** ``T * lr * h`` **is
    near** ``L`` **or above, it can be larger than with no correction at all** (use :class:`Krylov`). There is a
    warning, :class:`diffopt.EstimateWarning`, where ``Solution.diagnostics["last_order"]`` is above 1: what the last
    order adds to ``Lambda`` behind the first step with curvature, relative to those before it, one per task.

    Cost: ``L * (W - L + 1)`` HVPs for curvature in ``W`` steps, one batch an order. Depth: ``L``, times the number of
    chunks. Memory: ``T`` states and gradients, the graph of ``W`` gradients, kept for all orders (of ``chunk_size``,
    recorded again for each).

    Args:
        order: ``L``, at least 0.
        window: ``W``, 0 to ``T``: curvature in the last steps only; ``C_t`` and ``D_t`` in all (hybrid estimator).
        scale: factor on every curvature product, any finite number; ``order / T`` gives the tables of the paper.
        chunk_size: how many steps' products are batched at most; ``None``: all. With ``W`` they are all together, too,
            but no graph is kept: each order records its ``W - L + 1`` steps. Less memory; more time for small models.

    Raises:
        HyperparameterError, StepsError: an option is out of range; ``window`` is more than the inner problem has.
        RandomnessError: the inner loss draws random numbers.

    Reference: "Binomial Gradient-Based Meta-Learning" (2026), arXiv 2604.13263, (8) and (39). Derivations (3.2)-(3.9).
    """

    order: int
    window: int | None = None
    scale: float = 1.0
    chunk_size: int | None = None
    traced = True

    def __post_init__(self) -> None:
        """Check all options."""
        options = Options(self)
        options.integer("order", 0)
        options.integer("window", 0, also=(None,))
        options.number("scale")
        options.integer("chunk_size", 1, also=(None,))

    def claims(self, steps: int) -> Claims:
        """Exact if every order is taken; without curvature nothing reaches what the loss reads."""
        curved = self._curved(steps)
        exact, second = self.order >= curved == steps and self.scale == 1.0, min(self.order, curved) > 0
        read = ALL_INPUTS if second and self.scale else ALL_INPUTS - {"args", "batches"}
        return Claims("always" if exact else "never", read, second_derivatives=second)

    def if_curved(self, number: float) -> str:
        """The series' terms grow before they fall."""
        return f"its terms grow until about order {number:.0f}: distrust orders below three times that, or take Krylov"

    def keep(self, steps: int) -> Keep:
        """Every state, and every gradient."""
        check_within_steps("Binomial: window", self.window or 0, steps)
        return Keep(first=1, checkpoint=1, gradients=True)

    def _curved(self, steps: int) -> int:  # (a solve that stops early may have made fewer steps than the window has)
        return steps if self.window is None else min(self.window, steps)

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        """Order by order, each from the one before."""
        trajectory.record.diagnostics["last_order"] = 0 * trajectory.tasks.norm(cotangent)
        if self.claims(trajectory.steps).exact == "always" or trajectory.steps == 0:
            return trajectory.sweep(cotangent)
        curved = self._curved(trajectory.steps)
        first, last = trajectory.steps - curved + 1, min(self.order, curved)  # the first step with curvature

        def pull(trajectory: Trajectory, cotangent: Leaves) -> Pulled:
            return graded(trajectory, cotangent, first, last, self.scale, self.chunk_size)

        what = f"Binomial(order={self.order}): what the last order adds, relatively"
        return trajectory.by_program(cotangent, self, pull, "last_order", 1.0, what, "Use Krylov or Reverse()")
