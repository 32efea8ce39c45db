"""How far an estimator can be trusted on a problem: the size of its curvature over the whole rollout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffopt.adjoint.parallel_curvature import ParallelCurvature
from diffopt.adjoint.trajectory import Trajectory
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.loop import roll_out
from diffopt.rollout.record import Keep, Record


def curvature_number(dynamics: Dynamics, inputs: Sequence[Tensor], iterations: int = 10) -> float:
    r"""``T`` times the spectral radius of ``P' H_t E_t'``, the larger of the first step's and the last's, worst task.

    For gradient descent this is ``T * lr * lambda_max``. The terms of the binomial expansion grow up to an order of
    about this number before they fall. By the power method: ``2 * iterations`` HVPs and one rollout.
    """
    layout = dynamics.layout
    if layout.steps == 0:
        return 0.0
    named, record = layout.inputs(inputs).detached(), Record()
    final, record.rollout = roll_out(dynamics, named, counts=record.counts, keep=Keep(1, 1, gradients=True))
    trajectory = Trajectory(dynamics, named, final, record, (), (), False)
    tasks, largest = trajectory.tasks, 0.0
    with torch.no_grad():
        updates, nothing = trajectory.updates.blocks(), final.zeros()
        for step in {1, layout.steps}:
            curvature = ParallelCurvature(trajectory, step, None, again=True)
            x = tasks.start(final)
            size = tasks.norm(x)
            for _ in range(iterations):
                x = tasks.times(torch.where(size > 0, 1 / size, 0), x)
                product = curvature.product(updates.to_gradient(x.map(lambda leaf: leaf[None]), step), step)
                x = layout.padded(product.map(lambda leaf: leaf[0]), nothing)
                size = tasks.norm(x)
            largest = max(largest, float(size.max()))
    return layout.steps * largest


class Stationarity(NamedTuple):
    """How near an inner problem is to its fixed point, worst task.

    Attributes:
        distance: how far one more step would move the params.
        share: that distance as a share of the average step so far; 1 where the inner problem has just begun to move.
    """

    distance: float
    share: float


def stationarity(records: Sequence[Record]) -> Stationarity | None:
    """The worst of these solves whose estimator has looked; ``None`` if none has."""
    found = [record.diagnostics for record in records if "stationarity" in record.diagnostics]
    both = (Stationarity(float(d["stationarity"].max()), float(d["relative_stationarity"].max())) for d in found)
    return max(both, key=lambda x: x.share, default=None)


def krylov_residual(records: Sequence[Record]) -> float | None:
    """The worst relative residual of these solves, of the worst task; ``None`` if none is of Krylov's system."""
    # an implicit estimator's residual, which stands beside its stationarity, has the scale of the outer gradient
    own = [record.diagnostics for record in records if "stationarity" not in record.diagnostics]
    return max((float(found["residual"].max()) for found in own if "residual" in found), default=None)
