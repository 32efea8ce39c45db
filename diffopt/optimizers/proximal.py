"""Gradient descent with a proximal term, as pure dynamics; blocks C, E, D: derivations, section 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from diffopt.optimizers.base import Buffers, Hyperparameter, Optimizer
from diffopt.optimizers.checks import FINITE, POSITIVE, check_range
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.plain_numbers import make_plain


@final
@dataclass(frozen=True)
class ProximalGD(Optimizer):
    r"""Gradient descent on the loss plus a proximal term, the inner solver of iMAML.

    .. math:: \phi^+ = \phi - \eta\,\big(g + \lambda (\phi - c)\big)

    The proximal term is part of the update, not of the loss: it costs no order in the order-truncated estimators
    (derivations, section 2.1).

    Args:
        lr: step size ``eta``.
        strength: ``lambda``, the weight of the proximal term.
        center: ``c``, a tree shaped like ``params``; ``None``: the initial parameters, through which the
            hypergradient then also flows.

    Reference: Rajeswaran et al. (2019), "Meta-Learning with Implicit Gradients", equation (3).
    """

    lr: Hyperparameter
    strength: Hyperparameter
    center: Hyperparameter = None
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse a negative step size or strength."""
        make_plain(self)
        check_range(self, "center", lr=POSITIVE, strength=POSITIVE, center=FINITE)

    @property
    def proximal_step_size(self) -> Hyperparameter:
        """``lr``."""
        return self.lr

    def init(self, params: Leaves) -> Buffers:
        """The center, where it is the initial parameters."""
        return {"center": params} if self.center is None else {}

    def update(self, params: Leaves, grads: Leaves, buffers: Buffers, step: int) -> tuple[Leaves, Buffers]:
        """One step."""
        center = buffers["center"] if self.center is None else self.center
        return params.minus(self.lr, grads + self.strength * (params - center)), buffers
