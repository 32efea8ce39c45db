"""The adjoints of all steps as the unknowns of one linear system (derivations, section 3.7)."""

from __future__ import annotations

from typing import final

import torch

from diffopt.adjoint.parallel_curvature import ParallelCurvature
from diffopt.adjoint.time_stack import appended, rows
from diffopt.adjoint.trajectory import Trajectory
from diffopt.tensors.leaves import Leaves


@final
class AdjointSystem:
    """``(I - S K) x = r`` for ``Lambda_0, ..., Lambda_{T-1}``, stacked along axis 0; ``Lambda_T`` is known.

    A linear solver wants the tasks' axes in front of all others: its vectors are :meth:`tasks_first`.
    """

    def __init__(self, trajectory: Trajectory, chunk_size: int | None, *, again: bool) -> None:
        """Record the updates; ``chunk_size`` and ``again`` are those of :class:`ParallelCurvature`."""
        self.curvature = ParallelCurvature(trajectory, 1, chunk_size, again=again)
        self._updates, self._steps = trajectory.updates.blocks(), trajectory.steps
        self._axis = len(trajectory.tasks_shape)

    def tasks_first(self, stack: Leaves) -> Leaves:
        """The tasks' axes in front of time."""
        return stack.map(lambda leaf: leaf.movedim(0, self._axis))

    def time_first(self, stack: Leaves) -> Leaves:
        """Time in front of the tasks' axes."""
        return stack.map(lambda leaf: leaf.movedim(self._axis, 0))

    def with_last(self, stack: Leaves, last: Leaves) -> Leaves:
        """``x_1, ..., x_T``, where ``x_T = last``, for the stack ``x_0, ..., x_{T-1}``."""
        return appended(rows(stack, 1, self._steps - 1), last)

    def to_gradient(self, stack: Leaves, last: Leaves) -> Leaves:
        """``E_t' x_t`` for ``t = 1, ..., T``, where ``x_T = last``."""
        return self._updates.to_gradient(self.with_last(stack, last), 1)

    def scan(self, pushes: Leaves | None, last: Leaves) -> Leaves:
        """``S y``: ``x_{t-1} = C_t' x_t + P' y_t`` from ``x_T = last``; no HVP."""
        return self._updates.scan(last, 1, self._steps, pushes)

    def matvec(self, x: Leaves) -> Leaves:
        """``x - S K x``, with one HVP for each of ``x_1, ..., x_{T-1}``: ``x_T``, and so ``(K x)_T``, is zero."""
        stack = self.time_first(x)
        pushes = self.curvature.product(self._updates.to_gradient(rows(stack, 1, self._steps - 1), 1), 1)
        nothing = stack.map(lambda leaf: torch.zeros_like(leaf[0]))
        return x - self.tasks_first(self.scan(appended(pushes, nothing), nothing))
