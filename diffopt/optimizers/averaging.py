"""Averages of the iterates of another optimizer: beside it, or fed back to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from diffopt.optimizers.base import Buffers, Hyperparameter, Optimizer
from diffopt.optimizers.checks import check_optimizer_field, check_range
from diffopt.optimizers.naming import named_apart, of_name
from diffopt.tensors.arguments import Options
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.plain_numbers import make_plain

_INNER = "inner"
"""Under which the buffers of an optimizer within another are named."""


@final
@dataclass(frozen=True)
class EMA(Optimizer):
    r"""Another optimizer, with a moving average of its iterates beside it.

    .. math:: \phi^+ = U(\phi, g),\qquad a^+ = \delta a + (1 - \delta)\,\phi^+,\qquad a_1 = \phi_1

    The steps are those of the inner optimizer. The average is ``solution.state.buffers["average"]``, a tree like
    ``params``, differentiable like these (Polyak averaging; a mean teacher); the inner optimizer's buffers are named
    ``"inner.velocity"`` and so on. It starts at the initial params, so no correction of a bias is needed.

    Memory: one more copy of the params in each state.

    Args:
        optimizer: the inner optimizer.
        decay: ``delta``: a float in [0, 1), a tensor, a ``Schedule``, or a tree like ``params``.

    Raises:
        HyperparameterError: ``decay`` is out of its range.
        OptimizerError: ``optimizer`` is no optimizer.

    Reference: Polyak and Juditsky (1992), "Acceleration of Stochastic Approximation by Averaging", for the plain mean.

    Example:
        From 1 a step of 0.5 on ``w`` goes to 0.5, and the average half of the way:

        >>> import torch, diffopt
        >>> optimizer = diffopt.EMA(diffopt.SGD(0.5), decay=0.5)
        >>> solution = diffopt.solve(lambda w: w, torch.tensor(1.0), optimizer=optimizer, steps=1)
        >>> solution.params, solution.state.buffers["average"]
        (tensor(0.5000), tensor(0.7500))
    """

    optimizer: Optimizer
    decay: Hyperparameter = 0.999

    def __post_init__(self) -> None:
        """Refuse a decay out of its range."""
        make_plain(self)
        check_optimizer_field(self, "optimizer", self.optimizer)
        check_range(self, decay=(0, 1))

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        """Whether the inner optimizer is."""
        return self.optimizer.elementwise

    @property
    def proximal_step_size(self) -> Any:
        """That of the inner optimizer."""
        return self.optimizer.proximal_step_size

    def init(self, params: Leaves) -> Buffers:
        """The initial params, and the inner optimizer's buffers."""
        return {"average": params, **named_apart(_INNER, self.optimizer.init(params))}

    def update(self, params: Leaves, grads: Leaves, buffers: Buffers, step: int) -> tuple[Leaves, Buffers]:
        """A step of the inner optimizer, and the average with where it went."""
        after, inner = self.optimizer.update(params, grads, of_name(_INNER, buffers), step)
        average = self.decay * buffers["average"] + (1 - self.decay) * after
        return after, {"average": average, **named_apart(_INNER, inner)}


@final
@dataclass(frozen=True)
class Lookahead(Optimizer):
    r"""Another optimizer that goes ahead for some steps, of which a part of the way is then taken.

    .. math:: f = U(\phi, g);\qquad \phi^+ = s^+ = s + \alpha\,(f - s) \text{ if } k \text{ divides } t,\quad
              \text{else } \phi^+ = f,\; s^+ = s

    ``s`` starts at the initial params. The inner optimizer's buffers go on as they are, under the names
    ``"inner.velocity"`` and so on; ``s`` is the buffer ``"slow"``. It counts steps from the start of the optimizer.

    Memory: one more copy of the params in each state. A prox belongs inside: ``Lookahead(Proximal(...))``.

    Args:
        optimizer: the inner optimizer, with the fast weights.
        period: ``k``, after how many steps the way is cut short.
        ratio: ``alpha``: a float in [0, 1], a tensor, a ``Schedule``, or a tree like ``params``.

    Raises:
        HyperparameterError: ``period`` or ``ratio`` is out of its range.
        OptimizerError: ``optimizer`` is no optimizer.

    Reference: Zhang et al. (2019), "Lookahead Optimizer: k steps forward, 1 step back", algorithm 1.

    Example:
        Two steps of 1 on ``w`` lead from 4 to 2; half of the way is 3.

        >>> import torch, diffopt
        >>> optimizer = diffopt.Lookahead(diffopt.SGD(1.0), period=2)
        >>> diffopt.solve(lambda w: w, torch.tensor(4.0), optimizer=optimizer, steps=2).params
        tensor(3.)
    """

    optimizer: Optimizer
    period: int = 5
    ratio: Hyperparameter = 0.5

    def __post_init__(self) -> None:
        """Refuse options out of their ranges."""
        Options(self).integer("period", 1)
        check_optimizer_field(self, "optimizer", self.optimizer)
        check_range(self, ratio=(0, 1 + 2**-52))

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        """Whether the inner optimizer is."""
        return self.optimizer.elementwise

    def init(self, params: Leaves) -> Buffers:
        """The initial params, and the inner optimizer's buffers."""
        return {"slow": params, **named_apart(_INNER, self.optimizer.init(params))}

    def update(self, params: Leaves, grads: Leaves, buffers: Buffers, step: int) -> tuple[Leaves, Buffers]:
        """A step of the inner optimizer; after every ``period`` of them, back to a point on the way."""
        fast, inner = self.optimizer.update(params, grads, of_name(_INNER, buffers), step)
        slow, inner = buffers["slow"], named_apart(_INNER, inner)
        due: Any = step % self.period == 0
        if isinstance(due, Tensor):  # a compiled step, whose number is not known
            back = slow + self.ratio * (fast - slow)
            fast, slow = (back.map(lambda new, old: torch.where(due, new, old), x) for x in (fast, slow))
        elif due:
            fast = slow + self.ratio * (fast - slow)
            slow = fast + 0.0  # a tensor of its own
        return fast, {"slow": slow, **inner}
