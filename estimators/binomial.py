"""The binomial rule: the hypergradient's expansion in orders of curvature, cut off; all steps of an order at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from diffopt.adjoint.claims import ALL_INPUTS, Claims
from diffopt.adjoint.estimator import Adjoint
from diffopt.adjoint.parallel_curvature import ParallelCurvature
from diffopt.adjoint.time_stack import repeated, row, rows, write
from diffopt.adjoint.trajectory import Cotangents, DirectTerms, Trajectory
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

    with ``L = order``; for plain gradient descent it is BinomMAML. ``order >= T`` is exact, ``order=0`` drops every
    second derivative of the loss. The error is at most ``sum over l > L of binom(T, l) (lr * H)**l`` of the outer
    gradient's norm for gradient descent with curvature ``H`` (derivations (11c)): small when ``T * lr * H`` is below
    ``L``, and **larger than no correction at all** well above it (use :class:`Krylov`). Cost: ``L * (T - L + 1)`` HVPs,
    never fewer than ``T``, those of one order in one batch: depth ``L``. Memory: ``T`` states and gradients, and the
    graph of ``T`` gradients (or of ``chunk_size``, recorded again). Not for losses that draw random numbers.
    ``Solution.diagnostics["last_order"]`` is what the last order adds to the adjoint, relative to those before it, one
    per task; above 1 there is an :class:`diffopt.EstimateWarning`.

    Args:
        order: ``L``.
        window: curvature in the last ``window`` steps only; earlier steps keep ``C_t`` and ``D_t`` (hybrid rule).
        scale: factor on every curvature product; ``order / T`` reproduces the tables of the paper.
        chunk_size: how many steps' products are batched at most; ``None``: all.

    Raises:
        HyperparameterError, StepsError: an option is out of range; ``window`` is more than the inner problem has.

    Reference: "Binomial Gradient-Based Meta-Learning" (2026), arXiv 2604.13263, (8) and (39). Derivations (3.2)-(3.9).
    """

    order: int
    window: int | None = None
    scale: float = 1.0
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        """Check all options."""
        options = Options(self)
        options.integer("order", 0)
        options.integer("window", 0, also=(None,))
        options.number("scale")
        options.integer("chunk_size", 1, also=(None,))

    def claims(self, steps: int) -> Claims:
        """Exact if every order is taken; without curvature nothing reaches what the loss reads."""
        curved = steps if self.window is None else self.window
        exact, second = self.order >= curved == steps and self.scale == 1.0, min(self.order, curved) > 0
        read = ALL_INPUTS if second and self.scale else ALL_INPUTS - {"args", "batches"}
        return Claims("always" if exact else "never", read, second_derivatives=second)

    def if_curved(self, number: float) -> str:
        """The series' terms grow before they fall."""
        limit = f"the terms of its series grow up to an order near {number:.0f}"
        return f"{limit}: distrust lower orders; Krylov has no such limit"

    def keep(self, steps: int) -> Keep:
        """Every state, and every gradient."""
        check_within_steps("Binomial: window", self.window or 0, steps)
        return Keep(first=1, checkpoint=1, gradients=True)

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        """Order by order, each from the one before."""
        # Beyond l = T - t no factors are left to choose from: there order l is the one before, and the final one. So it
        # starts at step T - l + 1, and goes only as far down as order l + 1 reads it.
        steps, direct, before = trajectory.steps, DirectTerms(trajectory), None
        if self.claims(steps).exact == "always" or steps == 0:
            return trajectory.sweep(cotangent)
        curved = steps if self.window is None else self.window
        first, highest = steps - curved + 1, min(self.order, curved)
        updates, adjoints = trajectory.updates.blocks(), repeated(cotangent, steps + 1)
        curvature = ParallelCurvature(trajectory, first, self.chunk_size, again=highest > 1)
        turned = trajectory.layout.params(adjoints).zeros()  # E_t' Lambda_t of the highest order that reached step t
        for order in range(highest + 1):
            low, high, end = first + highest - order, steps - order + 1, min(steps - order + 1, steps)
            pushes, last = None, order == highest
            if order > 0:
                write(turned, low, self.scale * updates.turn(rows(adjoints, low, high), low))
                mixed, count = last and curvature.reads_wanted, high - low + 1
                vectors = rows(turned, low, steps if mixed else high)
                pushes = rows(curvature.product(vectors, low, direct if mixed else None, counted=count), 0, count - 1)
                before = row(adjoints, low).map(torch.clone) if last else None
            if low <= end:
                write(adjoints, low - 1, updates.scan(row(adjoints, end), low, end, pushes))
            if last and low > 1:
                write(adjoints, 0, updates.scan(row(adjoints, low - 1), 1, low - 1, None))
        if before is not None:
            size, added = map(trajectory.tasks.norm, (before, row(adjoints, first) - before))
            relative = trajectory.record.diagnostics["last_order"] = torch.where(size > 0, added / size, 0)
            trajectory.warn_if_bad(relative, 1.0, f"Binomial(order={self.order}): what the last order adds, relatively")
        direct.add_updates(rows(adjoints, 1, steps))
        return Cotangents(row(adjoints, 0), direct.collect())
