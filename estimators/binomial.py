"""The binomial rule: the hypergradient's expansion in orders of curvature, cut off; all steps of an order at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from diffopt.adjoint.claims import ALL_INPUTS, Claims
from diffopt.adjoint.estimator import Adjoint
from diffopt.adjoint.parallel_curvature import ParallelCurvature
from diffopt.adjoint.trajectory import Cotangents, DirectTerms, Trajectory
from diffopt.linear_solve.base import Tasks
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

    with ``L = order``. Written for any optimizer; for plain gradient descent it is BinomMAML. ``order >= T`` is exact,
    ``order=0`` drops every second derivative of the inner loss.

    Biased: the error is at most ``sum over l > L of binom(T, l) (lr * H)**l`` of the outer gradient's norm for
    gradient descent with curvature ``H`` (derivations (11c)): small when ``T * lr * H`` is below ``L``, and **larger
    than no correction at all** when it is well above. Cost: ``L * (T - L + 1)`` HVPs, never fewer than ``T``. Depth
    ``L``: the HVPs of one order are independent and run as one batch. Memory: ``T`` states and gradients, and the
    graph of ``T`` gradients, which is recorded once and pulled back through once per order, zeros where an order needs
    no product (with ``chunk_size``: the graph of so many, recorded for every order and chunk).

    What the last order adds to the adjoint, relative to the orders before it, is left in
    ``Solution.diagnostics["last_order"]`` after the backward pass (one per task; measured at the end of the first step
    with curvature, below which the order before is not computed); above 1 there is a warning,
    :class:`diffopt.EstimateWarning`.

    Not for: large ``T * lr * H`` (use :class:`Krylov`), or losses that draw random numbers.

    Args:
        order: ``L``.
        window: curvature in the last ``window`` steps only; earlier steps keep ``C_t`` and ``D_t`` (hybrid rule).
        scale: factor on every curvature product; ``order / T`` reproduces the tables of the paper.
        chunk_size: how many steps' products are batched at most; ``None``: all.

    Raises:
        HyperparameterError: an option is out of range.
        StepsError: ``window`` is more than the inner problem has.

    Reference: "Binomial Gradient-Based Meta-Learning" (2026), arXiv 2604.13263, equations (8) and (39). Derivations
    (3.2)-(3.9).
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
        exact = self.order >= curved == steps and self.scale == 1.0
        second = min(self.order, curved) > 0
        read = ALL_INPUTS if second and self.scale else ALL_INPUTS - {"args", "batches"}
        return Claims("always" if exact else "never", read, second_derivatives=second)

    def if_curved(self, number: float) -> str:
        """The series' terms grow before they fall."""
        return (
            f"the terms of its series grow up to an order near {number:.0f}: distrust lower orders; "
            "Krylov has no such limit"
        )

    def keep(self, steps: int) -> Keep:
        """Every state, and every gradient."""
        check_within_steps("Binomial: window", self.window or 0, steps)
        return Keep(first=1, checkpoint=1, gradients=True)

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        """Order by order, each from the one before."""
        curved = trajectory.steps if self.window is None else self.window
        exact = self.order >= curved == trajectory.steps and self.scale == 1.0
        if exact or trajectory.steps == 0:
            return trajectory.sweep(cotangent)
        direct = DirectTerms(trajectory)
        levels = _Levels(trajectory, curved, min(self.order, curved), self.scale, self.chunk_size)
        adjoints = levels.run(direct, cotangent)
        direct.add_updates(adjoints.map(lambda leaf: leaf[1:]))
        return Cotangents(adjoints.map(lambda leaf: leaf[0]), direct.collect())


@final
@dataclass(frozen=True)
class _Levels:
    """The orders ``0, ..., order`` of the adjoint, each at the steps that the next ones need."""

    trajectory: Trajectory
    curved: int
    order: int
    scale: float
    chunk_size: int | None

    def run(self, direct: DirectTerms, cotangent: Leaves) -> Leaves:
        """The stack ``Lambda^{(order)}_t`` for ``t = 0, ..., T``; the loss terms are added to ``direct`` on the way.

        ``Lambda^{(l)}_t`` has no factors left to choose from beyond ``l = T - t``: there it equals the order before,
        and with it the final one. So order ``l`` starts at step ``T - l + 1``, and reaches only as far down as order
        ``l + 1`` reads it.
        """
        steps, first_curved = self.trajectory.steps, self.trajectory.steps - self.curved + 1
        updates = self.trajectory.updates.blocks()
        curvature = ParallelCurvature(self.trajectory, first_curved, self.chunk_size, again=self.order > 1)
        adjoints = cotangent.map(lambda leaf: leaf.expand(steps + 1, *leaf.shape).clone())
        # what the products are taken of: at a step that later levels do not reach, what the mixed product is taken of
        weights = adjoints[: self.trajectory.dynamics.params_count].map(torch.zeros_like)
        before = None
        for level in range(self.order + 1):
            low, high = first_curved + self.order - level, steps - level + 1
            pushes: Leaves | None = None
            if level > 0:
                self._write(weights, low, updates.turn(_rows(adjoints, low, high), low))
                if self.scale != 1.0:
                    self._write(weights, low, self.scale * _rows(weights, low, high))
                mixed = level == self.order and curvature.reads_wanted
                vectors, count = _rows(weights, low, steps if mixed else high), high - low + 1
                pushes = curvature.product(vectors, low, direct if mixed else None, counted=count)
                pushes = _rows(pushes, 0, count - 1)
            end = min(high, steps)
            if level == self.order > 0:
                before = _row(adjoints, low).map(torch.clone)
            if low <= end:
                self._write(adjoints, low - 1, updates.scan(_row(adjoints, end), low, end, pushes))
            if level == self.order and low > 1:
                self._write(adjoints, 0, updates.scan(_row(adjoints, low - 1), 1, low - 1, None))
        if before is not None:
            self._measure(before, _row(adjoints, first_curved))
        return adjoints

    def _measure(self, before: Leaves, after: Leaves) -> None:
        """Leave behind what the last order adds to the adjoint, relative to the orders before it."""
        tasks = Tasks(len(self.trajectory.tasks_shape))
        size, added = tasks.norm(before), tasks.norm(after - before)
        relative = torch.where(size > 0, added / size, 0)
        self.trajectory.record.diagnostics["last_order"] = relative
        self.trajectory.warn_if_bad(
            relative, 1.0, f"Binomial(order={self.order}): what the last order adds, relative to those before it,"
        )

    def _write(self, stack: Leaves, first: int, rows: Leaves) -> None:
        for leaf, row in zip(stack, rows, strict=True):
            leaf[first : first + len(row)] = row


def _row(stack: Leaves, at: int) -> Leaves:
    return stack.map(lambda leaf: leaf[at])


def _rows(stack: Leaves, first: int, last: int) -> Leaves:
    return stack.map(lambda leaf: leaf[first : last + 1])
