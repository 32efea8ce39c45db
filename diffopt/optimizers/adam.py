"""The optimizers, as pure dynamics with the semantics of ``torch.optim``; blocks C, E, D: derivations, section 2."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, final

from diffopt.errors import HyperparameterError
from diffopt.optimizers.base import EACH, Buffers, Hyperparameter, Optimizer
from diffopt.optimizers.checks import POSITIVE, check_eps, check_range, decayed, is_zero
from diffopt.tensors.arguments import Options
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.tree import describe


@final
@dataclass(frozen=True)
class Adam(Optimizer):
    r"""Adam, as ``torch.optim.Adam``; weight decay is added to the gradient (L2). Derivations (2.2)-(2.3).

    .. math:: m^+ = \beta_1 m + (1-\beta_1) d,\quad v^+ = \beta_2 v + (1-\beta_2) d^2,\quad
              \phi^+ = \phi - \eta\,\frac{m^+/(1-\beta_1^t)}{\sqrt{v^+/(1-\beta_2^t)} + \epsilon}

    With ``amsgrad`` the running maximum of ``v`` takes its place under the root. Where a coordinate's gradient has
    always been exactly zero the root's derivative is taken as 0: the hypergradient is finite there.

    Not to be trusted for the first step in float32: it moves by the sign of the gradient, whose derivative is the
    difference of two nearly equal numbers.
    """

    lr: Hyperparameter = 1e-3
    betas: tuple[Hyperparameter, Hyperparameter] = field(default=(0.9, 0.999), metadata=EACH)
    eps: Hyperparameter = 1e-8
    weight_decay: Hyperparameter = 0.0
    amsgrad: bool = False
    maximize: bool = False
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse options that ``torch.optim.Adam`` refuses."""
        _check_adam(self)

    def init(self, params: Leaves) -> Buffers:
        """Zero moments."""
        return _zero_moments(self, params)

    def update(self, params: Leaves, grads: Leaves, buffers: Buffers, step: int) -> tuple[Leaves, Buffers]:
        """One step."""
        direction = decayed(grads, params, self.weight_decay, self.maximize)
        move, buffers = _adam_move(self.betas, self.eps, direction, buffers, step)
        return params.minus(self.lr, move), buffers


@final
@dataclass(frozen=True)
class AdamW(Optimizer):
    r"""Adam with decoupled weight decay, as ``torch.optim.AdamW``: ``phi`` shrinks by ``1 - lr * weight_decay``.

    The rest is :class:`Adam`. Derivations (2.2)-(2.3).
    """

    lr: Hyperparameter = 1e-3
    betas: tuple[Hyperparameter, Hyperparameter] = field(default=(0.9, 0.999), metadata=EACH)
    eps: Hyperparameter = 1e-8
    weight_decay: Hyperparameter = 1e-2
    amsgrad: bool = False
    maximize: bool = False
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse options that ``torch.optim.AdamW`` refuses."""
        _check_adam(self)

    def init(self, params: Leaves) -> Buffers:
        """Zero moments."""
        return _zero_moments(self, params)

    def update(self, params: Leaves, grads: Leaves, buffers: Buffers, step: int) -> tuple[Leaves, Buffers]:
        """One step."""
        move, buffers = _adam_move(self.betas, self.eps, -grads if self.maximize else grads, buffers, step)
        shrunk = params if is_zero(self.weight_decay) else params.minus(self.lr * self.weight_decay, params)
        return shrunk.minus(self.lr, move), buffers


def _check_adam(optimizer: Adam | AdamW) -> None:
    Options(optimizer).flag("amsgrad", "maximize")
    if not isinstance(optimizer.betas, tuple | list) or len(optimizer.betas) != 2:
        raise HyperparameterError(f"{type(optimizer).__name__}: betas is {describe(optimizer.betas)}", "two numbers")
    check_range(optimizer, lr=POSITIVE, eps=POSITIVE, weight_decay=POSITIVE, betas=(0, 1))


def _zero_moments(optimizer: Adam | AdamW, params: Leaves) -> Buffers:
    check_eps(optimizer, params)
    names = ("mean", "square", "largest_square") if optimizer.amsgrad else ("mean", "square")
    return {name: params.virtual_zeros() for name in names}


def _adam_move(
    betas: tuple[Hyperparameter, Hyperparameter],
    eps: Hyperparameter,
    direction: Leaves,
    buffers: Buffers,
    step: int,
) -> tuple[Leaves, Buffers]:
    """The normalised move of Adam and the new moments."""
    beta1, beta2 = betas
    mean = beta1 * buffers["mean"] + (1 - beta1) * direction
    square = beta2 * buffers["square"] + (1 - beta2) * direction * direction
    new = {"mean": mean, "square": square}
    if "largest_square" in buffers:
        new["largest_square"] = square = square.where_greater(buffers["largest_square"])
    root = (square / (1 - beta2**step)).sqrt() + eps
    return mean / (1 - beta1**step) / root, new
