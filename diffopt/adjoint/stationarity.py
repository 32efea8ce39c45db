"""Whether a point is a minimiser that implicit differentiation holds at: stationary, and not at a kink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffopt.errors import StationarityError
from diffopt.linear_solve import Matvec
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.field import VectorField
from diffopt.rollout.inputs import Inputs
from diffopt.rollout.record import Rollout
from diffopt.tensors import tracing
from diffopt.tensors.derivatives import filled, gradient
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.tasks import Tasks


@final
@dataclass(frozen=True)
class Point:
    """A point that was given as a minimiser: its params, the gradient there, and the problem."""

    dynamics: Dynamics
    inputs: Inputs
    params: Leaves
    gradient: Leaves
    rollout: Rollout

    @property
    def is_field(self) -> bool:
        """Whether the gradient is a vector field's value."""
        return isinstance(self.dynamics.loss, VectorField)

    @property
    def called(self) -> str:
        """What to call the gradient."""
        return "the vector field" if self.is_field else "the gradient of the loss"

    @property
    def fix(self) -> str:
        """What to do about one that is large."""
        if self.is_field:
            return "solve for its root further, check that the field is the one that was solved, or set stationarity"
        return "minimise further, check that the loss is the one that was minimised, or set stationarity"

    @staticmethod
    def of(dynamics: Dynamics, inputs: Inputs, final: Leaves, rollout: Rollout) -> Point:
        """That at which a step goes nowhere and leaves the gradient in its only buffer."""
        layout = dynamics.layout
        state = layout.with_state(inputs, final)
        return Point(dynamics, inputs, state.params, state.buffers, rollout)

    def at_a_kink(self, tasks: Tasks, roundings: float) -> bool:
        """Whether the gradient turns around, all at once, where one begins to go down it by some roundings of params.

        By less than one, only what is exactly zero moves.

        # NOTE [a kink]
        So it does at the minimiser of a loss with an absolute value, such as Lasso's, at which autograd's gradient is
        one of many and its Hessian knows nothing of the kink. Of a smooth loss the gradient changes with the length of
        the step, and what changes by round-off is different at every length: so several lengths have to agree.
        """
        down, size, length = tasks.unit(self.gradient), tasks.norm(self.gradient), self.length(tasks, roundings)
        first = self._slope(tasks, down, length)
        turned = first < size / 2
        for factor in (2, 4, 8, 16):
            if not bool(turned.any()):
                return False
            turned = turned & ((self._slope(tasks, down, factor * length) - first).abs() < size / 10)
        return bool(turned.any())

    def turns(self, tasks: Tasks, roundings: float) -> Tensor:
        """Whether the gradient is less than half as large after the shortest such step, as at a kink it is."""
        down = tasks.unit(self.gradient)
        return self._slope(tasks, down, self.length(tasks, roundings)) < tasks.norm(self.gradient) / 2

    def length(self, tasks: Tasks, roundings: float) -> Tensor:
        """The shortest step that is looked at."""
        return roundings * torch.finfo(self.params[0].dtype).eps * (1 + tasks.norm(self.params))

    def _slope(self, tasks: Tasks, down: Leaves, length: Tensor) -> Tensor:
        """The gradient along ``down``, its direction here, after a step of this length against it."""
        moved = tasks.plus(self.params, -length, down)
        with self.rollout.replay(1, moved[0].device), torch.enable_grad():
            params = [x.detach().requires_grad_() for x in moved]
            losses = self.dynamics.losses(params, [x.detach() for x in self.inputs.read])
            return tasks.dot(Leaves(filled(gradient(losses, params, differentiable=False), params)), down)


def _kink(at: Point) -> StationarityError:
    if at.is_field:
        return StationarityError(
            "params are at a kink of the vector field, at which it jumps and has no derivative",
            "a field that is smooth there",
            "of the slope of |w| take the proximal step instead: diffopt.fixed_point(step), whose zeros are no kinks",
        )
    return StationarityError(
        "params are at a kink of the loss (an absolute value, a maximum), at which no gradient is zero",
        "a smooth loss",
        "take diffopt.fixed_point of a proximal step, or pass as params only those off the kink (of Lasso: not zero), "
        "or make it smooth, as by (w**2 + eps).sqrt()",
    )


def refuse_far_from_stationary(at: Point, tasks: Tasks, allowed: float | None) -> None:
    """Refuse a gradient that is too large."""
    if allowed is None:
        return
    size, scale = tasks.norm(at.gradient), tasks.norm(at.params)
    if not tracing.holds(size <= allowed * (1 + scale)):
        if at.at_a_kink(tasks, 64):
            raise _kink(at)
        raise StationarityError(
            f"{at.called} at params has norm {float(size.max()):.1e}",
            f"at most {allowed:.0e} * (1 + |params|)",
            at.fix,
        )


def refuse_kink(at: Point, tasks: Tasks) -> None:
    """Refuse a minimiser at a kink where params are zero, however small the gradient there: see NOTE [a kink].

    One between two pieces of a network of kinks, such as of ReLUs, is as good as the gradient there is small.
    """
    reach = tasks.like(16 * at.length(tasks, 1e-6), at.params)  # beyond which nothing turns around
    rests = [(x.abs() <= y).any() for x, y in zip(at.params, reach, strict=True)]
    if tracing.current() is not None:
        tracing.holds(~(torch.stack(rests).any() & at.turns(tasks, 1e-6)))
    elif any(map(bool, rests)) and at.at_a_kink(tasks, 1e-6):
        raise _kink(at)


def refuse_long_step(at: Point, system: Matvec, tasks: Tasks, allowed: float) -> None:
    r"""Refuse a point that is far from its stationary point, however small the loss's units make the gradient ``g``.

    .. math:: \lVert H^{-1}g\rVert \ge \frac{\lVert g\rVert}{u^\top H u},\quad u = \frac{g}{\lVert g\rVert}\quad
              \text{for positive definite } H

    Of a vector field ``v``, whose Jacobian may turn and not curve, the same bound with :math:`\lVert V^\top u\rVert`
    below the line: :math:`\lVert v\rVert = u^\top V\,(V^{-1}v) \le \lVert V^\top u\rVert\,\lVert V^{-1}v\rVert`.
    """
    size, direction = tasks.norm(at.gradient), tasks.unit(at.gradient)
    product = system(direction)
    curvature = tasks.norm(product) if at.is_field else tasks.dot(direction, product)
    step = torch.where(curvature > 0, size / torch.where(curvature > 0, curvature, 1), 0)
    if not tracing.holds(step <= 10 * allowed * (1 + tasks.norm(at.params))):
        raise StationarityError(
            f"params are {float(step.max()):.1e} or more from the stationary point (by a Newton step)",
            f"at most {10 * allowed:.0e} * (1 + |params|)",
            f"{at.called} is small only in its units: {at.fix}",
        )
