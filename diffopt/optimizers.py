"""The optimizers, as pure dynamics with the semantics of ``torch.optim``; blocks C, E, D: derivations, section 2."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, final

from diffopt import transforms
from diffopt.arguments import check_eps, check_flag, check_range, is_zero
from diffopt.errors import HyperparameterError
from diffopt.leaves import Leaves
from diffopt.optimizer import EACH, Buffers, Hyperparameter, Optimizer
from diffopt.plain_numbers import make_plain

_INFINITY = float("inf")


def _decayed(grads: Leaves, params: Leaves, weight_decay: Hyperparameter, maximize: bool = False) -> Leaves:
    """``d = g + weight_decay * params``, the descent direction with L2 decay folded in."""
    grads = -grads if maximize else grads
    return grads if is_zero(weight_decay) else grads + weight_decay * params


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
        make_plain(self)
        positive = (0, _INFINITY)
        check_range(self, lr=positive, momentum=positive, weight_decay=positive, dampening=(-_INFINITY, _INFINITY))
        check_flag("SGD: nesterov", self.nesterov)
        check_flag("SGD: maximize", self.maximize)
        if self.nesterov and (is_zero(self.momentum) or not is_zero(self.dampening)):
            raise HyperparameterError(
                f"SGD: nesterov=True with momentum {self.momentum} and dampening {self.dampening}, expected "
                "momentum > 0 and dampening 0"
            )

    def init(self, params: Leaves) -> Buffers:
        """A zero velocity, if there is momentum."""
        return {} if is_zero(self.momentum) else {"velocity": params.virtual_zeros()}

    def update(self, params: Leaves, grads: Leaves, buffers: Buffers, step: int) -> tuple[Leaves, Buffers]:
        """One step."""
        direction = _decayed(grads, params, self.weight_decay, self.maximize)
        if "velocity" not in buffers:
            return params.minus(self.lr, direction), buffers
        share = direction if is_zero(self.dampening) or step == 1 else (1 - self.dampening) * direction
        velocity = self.momentum * buffers["velocity"] + share
        move = direction + self.momentum * velocity if self.nesterov else velocity
        return params.minus(self.lr, move), {"velocity": velocity}


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
        direction = _decayed(grads, params, self.weight_decay, self.maximize)
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
    make_plain(optimizer)
    positive = (0, _INFINITY)
    if not isinstance(optimizer.betas, tuple | list) or len(optimizer.betas) != 2:
        raise HyperparameterError(f"{type(optimizer).__name__}: betas is {optimizer.betas!r}, expected two numbers")
    check_range(optimizer, lr=positive, eps=positive, weight_decay=positive, betas=(0, 1))
    check_flag(f"{type(optimizer).__name__}: amsgrad", optimizer.amsgrad)
    check_flag(f"{type(optimizer).__name__}: maximize", optimizer.maximize)


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
        make_plain(self)
        positive = (0, _INFINITY)
        check_range(self, lr=positive, alpha=positive, eps=positive, weight_decay=positive, momentum=positive)
        check_flag("RMSprop: centered", self.centered)
        check_flag("RMSprop: maximize", self.maximize)

    def init(self, params: Leaves) -> Buffers:
        """Zero averages."""
        check_eps(self, params)
        names = ["square"] + ["mean"] * self.centered + ["velocity"] * (not is_zero(self.momentum))
        return {name: params.virtual_zeros() for name in names}

    def update(self, params: Leaves, grads: Leaves, buffers: Buffers, step: int) -> tuple[Leaves, Buffers]:
        """One step."""
        direction = _decayed(grads, params, self.weight_decay, self.maximize)
        new = {"square": self.alpha * buffers["square"] + (1 - self.alpha) * direction * direction}
        variance = new["square"]
        if self.centered:
            new["mean"] = self.alpha * buffers["mean"] + (1 - self.alpha) * direction
            variance = variance - new["mean"] * new["mean"]
        move = direction / (variance.sqrt() + self.eps)
        if "velocity" in buffers:
            new["velocity"] = move = self.momentum * buffers["velocity"] + move
        return params.minus(self.lr, move), new


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
        make_plain(self)
        positive = (0, _INFINITY)
        check_range(self, lr=positive, lr_decay=positive, weight_decay=positive, eps=positive)
        check_range(self, initial_accumulator_value=positive)
        check_flag("Adagrad: maximize", self.maximize)

    def init(self, params: Leaves) -> Buffers:
        """The accumulated squares start at ``initial_accumulator_value``."""
        check_eps(self, params)
        start = self.initial_accumulator_value
        if isinstance(start, Leaves) and any(bool((transforms.plain(x) < 0).any()) for x in start):
            raise HyperparameterError(
                "Adagrad: initial_accumulator_value holds a negative number, expected numbers >= 0, whose root is "
                "taken; learn its logarithm, or clamp it"
            )
        return {"square": params.zeros() + start}

    def update(self, params: Leaves, grads: Leaves, buffers: Buffers, step: int) -> tuple[Leaves, Buffers]:
        """One step."""
        direction = _decayed(grads, params, self.weight_decay, self.maximize)
        square = buffers["square"] + direction * direction
        lr = self.lr if is_zero(self.lr_decay) else self.lr / (1 + (step - 1) * self.lr_decay)
        return params.minus(lr, direction / (square.sqrt() + self.eps)), {"square": square}
