"""The tensors of one inner problem by name, and what is said of each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, final

from torch import Tensor

from diffopt.tensors.leaves import Leaves

Part: TypeAlias = Literal["params", "buffers", "read", "hyperparameters"]


class Place(NamedTuple):
    """Where one input of a problem stands: in which part, and at which place of it."""

    part: Part
    number: int


class Inputs(NamedTuple):
    """All tensors of an inner problem.

    Attributes:
        params: the parameters before the first step.
        buffers: the optimizer's buffers before it; with the params they are the state ``s_1``.
        read: what the loss reads: the tensors of ``args`` and ``batches``.
        hyperparameters: the tensors in the optimizer's fields.
    """

    params: Leaves
    buffers: Leaves
    read: Leaves
    hyperparameters: Leaves

    @property
    def state(self) -> Leaves:
        """The params and the buffers in one."""
        return Leaves((*self.params, *self.buffers))

    @property
    def flat(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of the fields."""
        return (*self.params, *self.buffers, *self.read, *self.hyperparameters)

    def at(self, place: Place) -> Tensor:
        """The tensor at a place."""
        tensor: Tensor = getattr(self, place.part)[place.number]
        return tensor

    def put(self, others: Mapping[Place, Tensor]) -> Inputs:
        """The same with other tensors at some places."""
        parts: dict[str, list[Tensor]] = {part: list(tensors) for part, tensors in self._asdict().items()}
        for place, tensor in others.items():
            parts[place.part][place.number] = tensor
        return Inputs(*map(Leaves, parts.values()))

    def detached(self) -> Inputs:
        """The same, cut off from whatever made them."""
        params, buffers, read, hyperparameters = self
        cut = Tensor.detach
        return Inputs(
            Leaves(map(cut, params)),
            Leaves(map(cut, buffers)),
            Leaves(map(cut, read)),
            Leaves(map(cut, hyperparameters)),
        )


class Names(NamedTuple):
    """What a caller would call the tensors of :class:`Inputs`."""

    params: tuple[str, ...]
    buffers: tuple[str, ...]
    read: tuple[str, ...]
    hyperparameters: tuple[str, ...]


class Flags(NamedTuple):
    """One truth value for each tensor that a step reads besides its state."""

    read: tuple[bool, ...]
    hyperparameters: tuple[bool, ...]


@final
@dataclass(frozen=True)
class Level:
    """One vmap around the problem, whose tasks have states of their own.

    Attributes:
        size: the number of tasks.
        randomness: what the vmap said of random numbers.
        own: which of the tensors that a step reads each task has its own of; the others are shared.
        over_steps: whether its tasks are steps, each of which has a batch of its own of a a function of the step.
    """

    size: int
    randomness: str
    own: Flags
    over_steps: bool = False

    def has(self, place: Place) -> bool:
        """Whether each task has its own tensor at a place."""
        return place.part in STATE_PARTS or bool(getattr(self.own, place.part)[place.number])


STATE_PARTS = ("params", "buffers")
