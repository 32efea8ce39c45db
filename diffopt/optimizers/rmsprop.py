"""RMSprop, with the semantics of ``torch.optim.RMSprop``; blocks C, E, D: derivations, section 2.4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from diffopt.optimizers.base import Buffers, Hyperparameter, Optimizer
from diffopt.optimizers.checks import POSITIVE, check_eps, check_range, decayed, is_zero
from diffopt.tensors.arguments import Options
from diffopt.tensors.leaves import Leaves


@final
@dataclass(frozen=True)
class RMSprop(Optimizer):
    r"""RMSprop, as ``torch.optim.RMSprop``. Derivations, section 2.4.

    .. math:: v^+ = \alpha v + (1-\alpha) d^2,\quad b^+ = \mu b + d / (\sqrt{v^+} + \epsilon),\quad
              \phi^+ = \phi - \eta b^+

    ``centered`` subtracts the square of the running mean of ``d`` under the root.
    """

    lr: Hyperparameter = 1e-2
    alpha: Hyperparameter = 0.99
    eps: Hyperparameter = 1e-8
    weight_decay: Hyperparameter = 0.0
    momentum: Hyperparameter = 0.0
    centered: bool = False
    maximize: bool = False
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse options that ``torch.optim.RMSprop`` refuses."""
        Options(self).flag("centered", "maximize")
        check_range(self, lr=POSITIVE, alpha=POSITIVE, eps=POSITIVE, weight_decay=POSITIVE, momentum=POSITIVE)

    def init(self, params: Leaves) -> Buffers:
        """Zero averages."""
        check_eps(self, params)
        names = ["square"] + ["mean"] * self.centered + ["velocity"] * (not is_zero(self.momentum))
        return {name: params.virtual_zeros() for name in names}

    def update(self, params: Leaves, grads: Leaves, buffers: Buffers, step: int) -> tuple[Leaves, Buffers]:
        """One step."""
        direction = decayed(grads, params, self.weight_decay, self.maximize)
        new = {"square": self.alpha * buffers["square"] + (1 - self.alpha) * direction * direction}
        variance = new["square"]
        if self.centered:
            new["mean"] = self.alpha * buffers["mean"] + (1 - self.alpha) * direction
            variance = variance - new["mean"] * new["mean"]
        move = direction / (variance.sqrt() + self.eps)
        if "velocity" in buffers:
            new["velocity"] = move = self.momentum * buffers["velocity"] + move
        return params.minus(self.lr, move), new
