"""The Krylov rule: minimal residuals over the whole trajectory's adjoints at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from diffopt.errors import HyperparameterError
from diffopt.estimator import Adjoint
from diffopt.leaves import Leaves
from diffopt.linear_solve import Tasks, minimal_residual
from diffopt.parallel import ParallelSteps
from diffopt.record import Keep
from diffopt.trajectory import Cotangents, DirectTerms, Trajectory


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
    backward pass (one per task), an error indicator that no other rule here has. Cost: ``order`` batches of at most
    ``T`` HVPs, one more if the loss's arguments want their hypergradient and ``order > 1``. Depth: as many. Memory:
    ``T`` states and gradients, and ``order`` times ``T`` adjoints.

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

    def __post_init__(self) -> None:
        """Check all options."""
        for name, low in (("order", 0), ("chunk_size", 1)):
            value = getattr(self, name)
            optional = value is None and name == "chunk_size"
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise HyperparameterError(f"Krylov: {name} is {value!r}, expected an integer >= {low}")
        if not isinstance(self.rtol, int | float) or not 0 <= self.rtol < 1:
            raise HyperparameterError(f"Krylov: rtol is {self.rtol!r}, expected 0 <= rtol < 1")

    def keep(self, steps: int) -> Keep:
        """Every state, and every gradient."""
        return Keep(first=1, checkpoint=1, gradients=True)

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        """Solve for the adjoints of all steps."""
        tasks = Tasks(len(trajectory.dynamics.levels))
        if self.order >= trajectory.steps:
            trajectory.record.diagnostics["residual"] = 0 * tasks.norm(cotangent)
            return trajectory.sweep(cotangent)
        blocks, direct = ParallelSteps(trajectory, self.chunk_size), DirectTerms(trajectory)
        system = _System(blocks, trajectory.steps, len(trajectory.dynamics.levels))
        nothing = cotangent.zeros()
        stack = system.scan({}, cotangent)
        if self.order > 0:
            first = system.turned(stack) | {trajectory.steps: blocks.pull_update(trajectory.steps, cotangent)[1]}
            size = tasks.norm(stack)
            residual = system.scan(blocks.curvature(first, direct, mixed=first if self.order == 1 else ()), nothing)
            if self.order > 1:
                start = residual
                bound = self.rtol * size if self.rtol else None
                update, residual, _ = minimal_residual(
                    lambda x: x - system.scan(blocks.curvature(system.turned(x)), nothing),
                    start,
                    tasks,
                    self.order - 1,
                    bound,
                )
                stack = stack + update
                if any(i < trajectory.dynamics.hyperparameters_start for i in trajectory.wanted):
                    turned = system.turned(stack) | {trajectory.steps: first[trajectory.steps]}
                    blocks.curvature(turned, direct, mixed=turned)
            trajectory.record.diagnostics["residual"] = torch.where(size > 0, tasks.norm(residual) / size, 0)
            stack = stack + residual
        adjoints = [*system.unstack(stack), cotangent]
        for step in range(1, trajectory.steps + 1):
            blocks.add_update_terms(direct, step, adjoints[step])
        return Cotangents(adjoints[0], direct.collect())


@final
@dataclass(frozen=True)
class _System:
    """Adjoints ``Lambda_0, ..., Lambda_{T-1}`` stacked along one axis behind the tasks' axes."""

    blocks: ParallelSteps
    steps: int
    axis: int

    def unstack(self, stack: Leaves) -> list[Leaves]:
        """The adjoints by step."""
        return [Leaves(row) for row in zip(*(leaf.unbind(self.axis) for leaf in stack), strict=True)]

    def turned(self, stack: Leaves) -> dict[int, Leaves]:
        """``E_t' x_t`` for ``t = 1, ..., T-1``."""
        return {t: self.blocks.pull_update(t, x)[1] for t, x in enumerate(self.unstack(stack)) if t > 0}

    def scan(self, curvature: dict[int, Leaves], last: Leaves) -> Leaves:
        """``x_{t-1} = C_t' x_t + y_t`` from ``x_T = last``; no HVP."""
        rows, now = [], last
        for t in range(self.steps, 0, -1):
            now = self.blocks.pull_update(t, now)[0]
            now = now + curvature[t] if t in curvature else now
            rows.append(now)
        return Leaves(torch.stack(column, dim=self.axis) for column in zip(*reversed(rows), strict=True))
