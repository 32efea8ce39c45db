"""The contract of an inner optimizer, and how its hyperparameters become tensors that can be learned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
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
GROUPS = {"hyperparameter": "groups"}
"""Field metadata: optimizers by name, each for some leaves of ``params``; ``update`` sees a :class:`Part` for each."""
OPTION = {"hyperparameter": "option"}
"""Field metadata: nothing to be learned, handed to ``update`` as it is whatever it is (a function)."""
PLACING = {"hyperparameter": "placing"}
"""Field metadata: what :meth:`Grouping.places` alone looks at."""


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


class Bindable(ABC):  # noqa: B024  (what is to be done with one, its kinds say)
    """What has hyperparameters: a frozen dataclass whose fields are made ready for arithmetic before it is used.

    A field may hold another one, or a dict, list or tuple of these: their fields are made ready too, at any depth.
    """

    elementwise: ClassVar[bool] = False
    """Whether it treats every coordinate by itself. ``True`` is faster on batches of tasks (updates then run on
    stacked tensors); it must be ``False`` for what mixes coordinates, as a norm or a matrix product does. ``False`` is
    always right, and what one holds within counts too."""


class Optimizer(Bindable):
    r"""One step of an inner optimizer, ``s_{t+1} = U(s_t, g_t; eta)``, as a pure function.

    A subclass is a frozen dataclass whose fields are its hyperparameters ``eta``. Inside ``init`` and ``update`` each
    of them has been made ready for arithmetic with :class:`Leaves`: a float stays a float; a tensor, a tree shaped
    like ``params`` and the current entry of a :class:`Schedule` are ``Leaves``; an optimizer is one whose own fields
    are ready. Booleans, strings and ``None`` stay.

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

    @property
    def proximal_step_size(self) -> Any:
        """By what number an update multiplies a gradient, for :class:`diffopt.Proximal`; ``None``: by no one number.

        A number or ``Leaves`` once the fields are ready. ``None``, as of Adam, is always right: it refuses a prox.
        """
        return None

    @abstractmethod
    def init(self, params: Leaves) -> Buffers:
        """The optimizer's buffers at the start, by name; ``{}`` if it has none."""

    @abstractmethod
    def update(self, params: Leaves, grads: Leaves, buffers: Buffers, step: int) -> tuple[Leaves, Buffers]:
        """The next parameters and buffers; ``step`` counts from 1. Differentiable, nothing in place.

        A buffer that no step changes is returned itself, not a copy: :class:`diffopt.estimators.Implicit` knows by that
        the inputs of a step, which have a derivative, from buffers that move, which it holds fixed.
        """


class Grouping(Optimizer):
    """An optimizer that holds others by name, in a field with the metadata :data:`GROUPS`, each for some leaves."""

    @abstractmethod
    def places(self, paths: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """For each name, which of the leaves at these paths it is for; every leaf belongs to one of them."""


@final
@dataclass(frozen=True)
class Part:
    """The optimizer of some leaves, ready for ``update``, and where they stand among those of ``params``."""

    optimizer: Optimizer
    places: tuple[int, ...]

    def of(self, leaves: Leaves) -> Leaves:
        """The leaves that belong to it."""
        return Leaves([leaves[i] for i in self.places])
