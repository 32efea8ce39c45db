"""The binomial estimator: the expansion in orders of curvature, cut off; all steps of an order at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from diffopt.adjoint.claims import ALL_INPUTS, Claims
from diffopt.adjoint.estimator import Adjoint
from diffopt.adjoint.parallel_curvature import ParallelCurvature
from diffopt.adjoint.time_stack import copy_of_row, repeated, row, rows, scan, write
from diffopt.adjoint.trajectory import Cotangents, DirectTerms, Trajectory
from diffopt.rollout.record import Keep
from diffopt.tensors import tracing
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
    chunks. Memory: ``T`` states and gradients, the graph of ``W`` gradients (of ``chunk_size``, recorded again).

    Args:
        order: ``L``, at least 0.
        window: ``W``, 0 to ``T``: curvature in the last steps only; ``C_t`` and ``D_t`` in all (hybrid estimator).
        scale: factor on every curvature product, any finite number; ``order / T`` gives the tables of the paper.
        chunk_size: how many steps' products are batched at most; ``None``: all.

    Raises:
        HyperparameterError, StepsError: an option is out of range; ``window`` is more than the inner problem has.
        RandomnessError: the inner loss draws random numbers.

    Reference: "Binomial Gradient-Based Meta-Learning" (2026), arXiv 2604.13263, (8) and (39). Derivations (3.2)-(3.9).
    """

    order: int
    window: int | None = None
    scale: float = 1.0
    chunk_size: int | None = None
    traced: ClassVar[bool] = True

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
        whole = self.chunk_size is None or self.chunk_size >= trajectory.steps
        if not whole:  # it is there to bound the memory
            tracing.refuse("Binomial with a chunk_size below the number of steps")
        found, measured = trajectory.by_program(cotangent, self if whole else None, self._graded)
        if measured:
            what = f"Binomial(order={self.order}): what the last order adds, relatively"
            trajectory.report("last_order", measured[0], measured[1], 1.0, what, "Use Krylov or Reverse()")
        return found

    def _graded(self, trajectory: Trajectory, cotangent: Leaves) -> tuple[Cotangents, list[Tensor]]:
        """The sum of all orders, and the size of what the last one adds and of those before."""
        steps, curved, norm = trajectory.steps, self._curved(trajectory.steps), trajectory.tasks.norm
        first, last = steps - curved + 1, min(self.order, curved)  # the first step with curvature, and the last order
        curvature = ParallelCurvature(trajectory, first, self.chunk_size, again=last > 1)
        direct, updates, adjoints = DirectTerms(trajectory), trajectory.updates.blocks(), repeated(cotangent, steps + 1)
        of_gradients, before = trajectory.layout.params(adjoints).zeros(), cotangent  # row t: E_t' Lambda_t
        scan(updates, adjoints, first + last, steps)  # order 0: Lambda_{t-1} = C_t' Lambda_t
        for order in range(1, last + 1):
            # Steps above ``high`` are saturated (theorem 3.A): final as they are. No later order reads those below.
            low, high = first + last - order, steps - order + 1
            write(of_gradients, low, self.scale * updates.to_gradient(rows(adjoints, low, high), low))
            # The last order also takes M_t' of the saturated steps, whose E_t' Lambda_t those before it have left.
            mixed, before = order == last and curvature.reads_wanted, copy_of_row(adjoints, first)
            stack = rows(of_gradients, low, steps if mixed else high)
            pushes = curvature.product(stack, low, direct if mixed else None, counted=high - low + 1)  # H_t E_t' Lambda
            scan(updates, adjoints, low, high, pushes)  # Lambda_{t-1} = C_t' Lambda_t + P' y_t
        scan(updates, adjoints, 1, first - 1)  # no curvature before the window
        measured = [norm(row(adjoints, first) - before), norm(before)] if last > 0 else []
        direct.add_updates(rows(adjoints, 1, steps))
        return Cotangents(row(adjoints, 0), direct.collect()), measured
