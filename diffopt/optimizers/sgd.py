"""Gradient descent, with the semantics of ``torch.optim.SGD``; blocks C, E, D: derivations (2.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from diffopt.errors import HyperparameterError
from diffopt.optimizers.base import Buffers, Hyperparameter, Optimizer
from diffopt.optimizers.checks import FINITE, POSITIVE, check_range, decayed, is_zero
from diffopt.tensors.arguments import Options
from diffopt.tensors.leaves import Leaves


@final
@dataclass(frozen=True)
class SGD(Optimizer):
    r"""Gradient descent with momentum, dampening, Nesterov's rule and weight decay, as ``torch.optim.SGD``.

    .. math:: d = g + \omega\phi,\quad v^+ = \mu v + c_t d,\quad \phi^+ = \phi - \eta q,\qquad
              q = v^+ \text{ or } d + \mu v^+ \text{ (Nesterov)}

    with ``c_1 = 1`` and ``c_t = 1 - dampening`` afterwards: the first step is not dampened. Derivations (2.1).

    Args:
        lr: step size ``eta``.
        momentum: ``mu``; at the float 0 there is no buffer.
        dampening: ``tau``.
        weight_decay: ``omega``, added to the gradient.
        nesterov: needs a momentum and no dampening.
        maximize: climb instead of descend.
    """

    lr: Hyperparameter
    momentum: Hyperparameter = 0.0
    dampening: Hyperparameter = 0.0
    weight_decay: Hyperparameter = 0.0
    nesterov: bool = False
    maximize: bool = False
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse options that ``torch.optim.SGD`` refuses."""
        Options(self).flag("nesterov", "maximize")
        check_range(self, lr=POSITIVE, momentum=POSITIVE, weight_decay=POSITIVE, dampening=FINITE)
        if self.nesterov and (is_zero(self.momentum) or not is_zero(self.dampening)):
            raise HyperparameterError(
                f"SGD: nesterov=True with momentum {self.momentum} and dampening {self.dampening}",
                "momentum > 0 and dampening 0",
            )

    @property
    def proximal_step_size(self) -> Hyperparameter:
        """``lr``."""
        return self.lr

    def init(self, params: Leaves) -> Buffers:
        """A zero velocity, if there is momentum."""
        return {} if is_zero(self.momentum) else {"velocity": params.virtual_zeros()}

    def update(self, params: Leaves, grads: Leaves, buffers: Buffers, step: int) -> tuple[Leaves, Buffers]:
        """One step."""
        direction = decayed(grads, params, self.weight_decay, self.maximize)
        if "velocity" not in buffers:
            return params.minus(self.lr, direction), buffers
        share = direction if is_zero(self.dampening) else self._dampened(direction, step)
        velocity = self.momentum * buffers["velocity"] + share
        move = direction + self.momentum * velocity if self.nesterov else velocity
        return params.minus(self.lr, move), {"velocity": velocity}

    def _dampened(self, direction: Leaves, step: Any) -> Leaves:
        """What a velocity gets of a direction: of the first one, all."""
        first = step == 1
        if isinstance(first, Tensor):  # a compiled step, whose number is not known
            damped = (1 - self.dampening) * direction
            return direction.map(lambda whole, part: torch.where(first, whole, part), damped)
        return direction if first else (1 - self.dampening) * direction
