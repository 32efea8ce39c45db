"""Gradients that are clipped before another optimizer sees them, as ``torch.nn.utils`` clips them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch

from diffopt.errors import HyperparameterError
from diffopt.optimizers.base import Buffers, Hyperparameter, Optimizer
from diffopt.optimizers.checks import POSITIVE, check_one_number, check_optimizer_field, check_range
from diffopt.optimizers.norm import at_most, norm, one_number, times
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.plain_numbers import make_plain

_EPS = 1e-6
"""That of ``torch.nn.utils.clip_grad_norm_``."""


@final
@dataclass(frozen=True)
class Clip(Optimizer):
    r"""Another optimizer on clipped gradients, as ``clip_grad_norm_`` or ``clip_grad_value_`` before ``step()``.

    .. math:: g' = \min\Big(1, \frac{c}{\lVert g\rVert + 10^{-6}}\Big)\, g
              \qquad\text{or}\qquad g'_i = \min(\max(g_i, -c), c)

    The norm is that of all leaves together, of each task's own under ``vmap``; its derivative at zero is zero. Weight
    decay is the inner optimizer's, which adds it to what has been clipped, as in ``torch.optim``.

    Args:
        optimizer: the inner optimizer, whose buffers keep their names.
        max_norm: ``c`` of the first form: one number for all leaves, a float, a scalar tensor or a schedule.
        value: ``c`` of the second form: a hyperparameter like any other, a tree shaped like ``params`` included.

    Exact under every exact estimator. By value it is elementwise if the inner optimizer is; by norm it is not. The
    derivative is that of the branch taken: zero by a gradient that is cut off.

    Raises:
        HyperparameterError: both or neither are given, one is negative, or ``max_norm`` is not one number.
        OptimizerError: ``optimizer`` is no optimizer.

    Reference: Pascanu et al. (2013), "On the difficulty of training Recurrent Neural Networks", algorithm 1.

    Example:
        The gradient (3, 4) of norm 5 becomes (0.6, 0.8):

        >>> import torch, diffopt
        >>> slope = torch.tensor([3.0, 4.0])
        >>> optimizer = diffopt.Clip(diffopt.SGD(1.0), max_norm=1.0)
        >>> diffopt.solve(lambda w, a: (a * w).sum(), torch.zeros(2), slope, optimizer=optimizer, steps=1).params
        tensor([-0.6000, -0.8000])
    """

    optimizer: Optimizer
    max_norm: Hyperparameter = None
    value: Hyperparameter = None

    def __post_init__(self) -> None:
        """Refuse anything but one bound."""
        make_plain(self)
        check_optimizer_field(self, "optimizer", self.optimizer)
        if (self.max_norm is None) == (self.value is None):
            both = "both max_norm and value" if self.value is not None else "neither max_norm nor value"
            raise HyperparameterError(f"Clip: {both} were given", "one of them", "nest two Clips to clip in two ways")
        check_range(self, "max_norm", "value", max_norm=POSITIVE, value=POSITIVE)
        check_one_number(self, "max_norm", self.max_norm)

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        """By value, as far as the inner optimizer is."""
        return self.value is not None and self.optimizer.elementwise

    @property
    def proximal_step_size(self) -> Any:
        """That of the inner optimizer."""
        return self.optimizer.proximal_step_size

    def init(self, params: Leaves) -> Buffers:
        """The inner optimizer's buffers."""
        return self.optimizer.init(params)

    def update(self, params: Leaves, grads: Leaves, buffers: Buffers, step: int) -> tuple[Leaves, Buffers]:
        """One step of the inner optimizer."""
        return self.optimizer.update(params, self._clipped(grads), buffers, step)

    def _clipped(self, grads: Leaves) -> Leaves:
        if self.value is None:
            total = norm(grads)
            return times(grads, at_most(one_number(self.max_norm, total) / (total + _EPS), 1.0))
        if isinstance(self.value, Leaves):
            return grads.map(lambda g, most: torch.clamp(g, -most, most), self.value)
        return grads.map(lambda g: torch.clamp(g, -self.value, self.value))
