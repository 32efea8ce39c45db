"""The contract of an inner optimizer, and how its hyperparameters become tensors that can be learned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, final

from diffopt.tensors.leaves import Leaves
from diffopt.tensors.plain_numbers import plain_list

Buffers: TypeAlias = dict[str, Leaves]
Hyperparameter: TypeAlias = Any
"""What a user may write: a float, a tensor, a tree shaped like ``params``, or a :class:`Schedule` of these."""

EACH = {"hyperparameter": "each"}
"""Field metadata: a tuple, or a dictionary by name, of hyperparameters of their own, such as Adam's ``betas``."""
PREFIX = {"hyperparameter": "prefix"}
"""Field metadata: a tree with ``params``' branches and anything below them; ``update`` sees one entry per leaf."""
TREE = {"hyperparameter": "tree"}
"""Field metadata: any tree of tensors, handed to ``update`` as it is (the weights of a learned optimizer)."""


@final
@dataclass(frozen=True)
class Schedule:
    """A hyperparameter that changes from step to step: step ``t`` (from 1) uses ``values[t - 1]``.

    Args:
        values: a tensor of shape ``[steps]``, a list of ``steps`` floats, or a tree shaped like ``params`` whose
            tensors have a leading axis of length ``steps``. Tensors are learnable; numpy's numbers are floats.
    """

    values: Any

    def __post_init__(self) -> None:
        """Take numpy's numbers for what they are."""
        object.__setattr__(self, "values", plain_list(self.values))


class Optimizer(ABC):
    r"""One step of an inner optimizer, ``s_{t+1} = U(s_t, g_t; eta)``, as a pure function.

    A subclass is a frozen dataclass whose fields are its hyperparameters ``eta``. Inside ``init`` and ``update`` each
    of them has been made ready for arithmetic with :class:`Leaves`: a float stays a float; a tensor, a tree shaped
    like ``params`` and the current entry of a :class:`Schedule` are ``Leaves``. Booleans, strings and ``None`` stay.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch, diffopt
        >>> @dataclass(frozen=True)
        ... class SoftSign(diffopt.Optimizer):
        ...     lr: float
        ...     elementwise = True
        ...     def init(self, params):
        ...         return {}
        ...     def update(self, params, grads, buffers, step):
        ...         return params - self.lr * grads.map(torch.tanh), buffers
        >>> solution = diffopt.solve(lambda w: w.square().sum(), torch.ones(2), optimizer=SoftSign(0.5), steps=1)
        >>> solution.params
        tensor([0.5180, 0.5180])
    """

    elementwise: ClassVar[bool] = False
    """Whether ``update`` treats every coordinate by itself. ``True`` is faster on batches of tasks (updates then run
    on stacked tensors); it must be ``False`` for an update that mixes coordinates, as a norm or a matrix product
    does. ``False`` is always right."""

    @abstractmethod
    def init(self, params: Leaves) -> Buffers:
        """The optimizer's buffers at the start, by name; ``{}`` if it has none."""

    @abstractmethod
    def update(self, params: Leaves, grads: Leaves, buffers: Buffers, step: int) -> tuple[Leaves, Buffers]:
        """The next parameters and buffers; ``step`` counts from 1. Differentiable, nothing in place."""
