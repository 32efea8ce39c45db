"""Adagrad, with the semantics of ``torch.optim.Adagrad``; blocks C, E, D: derivations, section 2.4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from diffopt.optimizers.base import Buffers, Hyperparameter, Optimizer
from diffopt.optimizers.checks import POSITIVE, check_eps, check_range, decayed, is_zero
from diffopt.tensors.arguments import Options
from diffopt.tensors.leaves import Leaves


@final
@dataclass(frozen=True)
class Adagrad(Optimizer):
    r"""Adagrad, as ``torch.optim.Adagrad``. Derivations, section 2.4.

    .. math:: a^+ = a + d^2,\quad \phi^+ = \phi - \frac{\eta}{1 + (t-1)\gamma}\,\frac{d}{\sqrt{a^+} + \epsilon}
    """

    lr: Hyperparameter = 1e-2
    lr_decay: Hyperparameter = 0.0
    weight_decay: Hyperparameter = 0.0
    initial_accumulator_value: Hyperparameter = 0.0
    eps: Hyperparameter = 1e-10
    maximize: bool = False
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse options that ``torch.optim.Adagrad`` refuses."""
        Options(self).flag("maximize")
        check_range(self, lr=POSITIVE, lr_decay=POSITIVE, weight_decay=POSITIVE, eps=POSITIVE)
        check_range(self, initial_accumulator_value=POSITIVE)

    def init(self, params: Leaves) -> Buffers:
        """The accumulated squares start at ``initial_accumulator_value``."""
        check_eps(self, params)
        return {"square": params.zeros() + self.initial_accumulator_value}

    def update(self, params: Leaves, grads: Leaves, buffers: Buffers, step: int) -> tuple[Leaves, Buffers]:
        """One step."""
        direction = decayed(grads, params, self.weight_decay, self.maximize)
        square = buffers["square"] + direction * direction
        lr = self.lr if is_zero(self.lr_decay) else self.lr / (1 + (step - 1) * self.lr_decay)
        return params.minus(lr, direction / (square.sqrt() + self.eps)), {"square": square}
