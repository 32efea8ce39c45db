"""How the tensors of one inner problem lie: what each of them is, which run over steps, which tasks have their own.

# NOTE [a batch of tasks is one problem]
Tasks do not interact, so a batch of them is one inner problem whose parameters are the stacked ones and whose loss is
``vmap(loss).sum()``: its gradient, its Hessian-vector products and its updates are those of all tasks at once. Each
``torch.func.vmap`` that a call runs under becomes one :class:`Level` here, and one leading axis of every state tensor,
the outermost vmap's first. Only the loss runs under vmap; all else is plain arithmetic on plain tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from diffopt.errors import BatchesError
from diffopt.optimizers.base import Buffers
from diffopt.rollout.inputs import STATE_PARTS, Flags, Inputs, Level, Names, Part, Place
from diffopt.rollout.stream import Stream, stacked
from diffopt.tensors import tree
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.transforms import Vmap


@final
@dataclass(frozen=True)
class Slot:
    """Stands, among the leaves of ``args``, for the tensor with this number among those that the loss reads."""

    index: int


@final
@dataclass(frozen=True)
class Layout:
    """The numbers, structures and names of one inner problem; it holds no tensor.

    Attributes:
        inner_steps: the number of update steps ``T``.
        params_structure: of the params tree.
        params_count: how many leaves it has.
        buffers_layout: name and number of leaves of each buffer.
        args_leaves: the leaves of ``(args, batches)``; in place of a tensor stands its :class:`Slot`.
        args_structure: of ``(args, batches)``.
        has_batches: whether the loss takes a batch.
        stepped: which tensors run over steps, by their first own axis.
        optimizer_name: what its class is called.
        levels: the vmaps around the problem, innermost first.
        window: how many updates in a row use one gradient; they then count as one step (derivations, section 5).
        start: how many updates had been made before the first of these; what counts or schedules them goes on from it.
        stream: what hands out the batches, if they are a function of the step. Their tensors stand behind those of
            ``args`` in what a step reads, and are none of the inputs.
    """

    inner_steps: int
    params_structure: tree.Structure
    params_count: int
    buffers_layout: tuple[tuple[str, int], ...]
    args_leaves: tuple[Any, ...]
    args_structure: tree.Structure
    has_batches: bool
    stepped: Flags
    optimizer_name: str
    levels: tuple[Level, ...] = ()
    window: int = 1
    start: int = 0
    stream: Stream | None = None

    @cached_property
    def steps(self) -> int:
        """The number of steps of the system: one per gradient, ``T`` unless there are windows."""
        return -(-self.inner_steps // self.window)

    @cached_property
    def state_count(self) -> int:
        """The number of state leaves, params and buffers."""
        return self.params_count + sum([count for _, count in self.buffers_layout])

    @cached_property
    def tasks_shape(self) -> tuple[int, ...]:
        """The sizes of the leading axes that all state tensors have: one per vmap, the outermost first."""
        return tuple([level.size for level in reversed(self.levels)])

    def place(self, number: int) -> Place:
        """The place of the input with this number in the order of :attr:`Inputs.flat`."""
        for part, count in zip(_PARTS, self._counts, strict=True):
            if number < count:
                return Place(part, number)
            number -= count
        raise IndexError(number)

    @cached_property
    def _counts(self) -> tuple[int, ...]:
        return self.params_count, self.state_count - self.params_count, *map(len, self.stepped)

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """The places of all inputs, in the order of :attr:`Inputs.flat`."""
        counts = zip(_PARTS, self._counts, strict=True)
        return tuple([Place(part, i) for part, count in counts for i in range(count)])

    @cached_property
    def sizes_and_modes(self) -> tuple[list[int], list[str]]:
        """Of the vmaps: their numbers of tasks, and what they say of random numbers."""
        return [level.size for level in self.levels], [level.randomness for level in self.levels]

    @cached_property
    def dims_of_loss(self) -> list[tuple[int | None, ...]]:
        """For each vmap, which of the params and of what the loss reads have its axis, as axis 0."""
        own, handed_out = (0,) * self.params_count, 0 if self.stream is None else self.stream.count
        return [
            (*own, *[0 if has else None for has in level.own.read], *(0 if level.over_steps else None,) * handed_out)
            for level in self.levels
        ]

    @cached_property
    def dims_of_update(self) -> list[tuple[int | None, ...]]:
        """The same of the state, of its gradient and of the hyperparameters."""
        own = (0,) * (self.state_count + self.params_count)
        return [(*own, *[0 if has else None for has in level.own.hyperparameters]) for level in self.levels]

    def batched(self, level: Level) -> Layout:
        """The same with one more vmap around it."""
        return replace(self, levels=(*self.levels, level))

    def level(self, vmap: Vmap, dims: Sequence[int | None]) -> Level:
        """The level of a vmap whose tasks have their own where ``dims``, one for each input, is not ``None``."""
        own = tuple([dim is not None for dim in dims])
        first, second = self.state_count, self.state_count + len(self.stepped.read)
        return Level(vmap.batch_size, vmap.randomness, Flags(own[first:second], own[second:]))

    def over(self, size: int, own: Iterable[Place] = (), randomness: str = "same") -> Layout:
        """The same with one more axis in front of every state tensor, and of those at the places ``own``."""
        places = set(own)
        flags = (tuple([Place(part, i) in places for i in range(len(self.stepped[k]))]) for k, part in _READ)
        return self.batched(Level(size, randomness, Flags(*flags)))

    def over_steps(self, count: int) -> Layout:
        """The same for so many steps at once, each with a state and a slice of what runs over steps of its own."""
        return self.batched(Level(count, "error", self.stepped, over_steps=True))

    def inputs(self, flat: Sequence[Tensor], *, of_step: bool = False) -> Inputs:
        """Tensors in the order of :attr:`Inputs.flat`, by name; ``of_step``: those that one step has read."""
        first, second = self.params_count, self.state_count
        third = second + len(self.stepped.read)
        if of_step and self.stream is not None:
            third += self.stream.count
        plain = tuple(flat)
        return Inputs(
            Leaves(plain[:first]), Leaves(plain[first:second]), Leaves(plain[second:third]), Leaves(plain[third:])
        )

    def with_state(self, inputs: Inputs, state: Sequence[Tensor]) -> Inputs:
        """The same inputs from another state."""
        plain = tuple(state)
        return Inputs(Leaves(plain[: self.params_count]), Leaves(plain[self.params_count :]), *inputs[2:])

    def split(self, state: Sequence[Tensor]) -> tuple[Leaves, Buffers]:
        """A state as params and named buffers."""
        plain, start = tuple(state), self.params_count
        buffers: Buffers = {}
        for name, count in self.buffers_layout:
            buffers[name] = Leaves(plain[start : start + count])
            start += count
        return Leaves(plain[: self.params_count]), buffers

    def split_update(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
        """Tensors in a row as the leaves of a state, those of a gradient, and the others."""
        first, second = self.state_count, self.state_count + self.params_count
        return tensors[:first], tensors[first:second], tensors[second:]

    def params(self, state: Sequence[Tensor]) -> Leaves:
        """The params of a state, of its adjoint or of its tangent."""
        return Leaves(tuple(state)[: self.params_count])

    def pushed(self, state: Leaves, push: Leaves) -> Leaves:
        """``x + P' y``: ``push``, which is like the params, added to the params of a state's adjoint."""
        return Leaves((*(x + y for x, y in zip(state, push, strict=False)), *tuple(state)[self.params_count :]))

    def padded(self, params: Leaves, like: Leaves) -> Leaves:
        """``P' y``: an adjoint of the params as one of the state, which is like ``like``: zero for the buffers."""
        return Leaves((*params, *(torch.zeros_like(x) for x in tuple(like)[self.params_count :])))

    def at_step(self, inputs: Inputs, step: int) -> tuple[Leaves, Leaves]:
        """What the loss reads and the hyperparameters in step ``step`` (from 1): slices of what runs over steps."""
        read = inputs.read
        if any(self.stepped.read):
            read = self._slices("read", read, step)
        if self.stream is not None:
            read = Leaves((*read, *self.stream.at(self.start + (step - 1) * self.window)))
        return read, self.hyperparameters_at(inputs, step)

    def hyperparameters_at(self, inputs: Inputs, step: int) -> Leaves:
        """The hyperparameters in step ``step`` alone."""
        own = inputs.hyperparameters
        return self._slices("hyperparameters", own, step) if any(self.stepped.hyperparameters) else own

    def _slices(self, part: Part, tensors: Leaves, step: int) -> Leaves:
        return Leaves([self.slice_at(Place(part, i), x, step) for i, x in enumerate(tensors)])

    def read_at_steps(self, inputs: Inputs, steps: range) -> list[Tensor]:
        """What the loss reads in steps in a row together, for :meth:`over_steps`: what differs by step is stacked."""
        own = [self.slices_at(Place("read", i), x, steps) for i, x in enumerate(inputs.read)]
        if self.stream is None:
            return own
        rows, names = [self.at_step(inputs, t)[0] for t in steps], self.names_of_step()
        return [*own, *[stacked(rows, i, names[i]) for i in range(len(own), len(rows[0]))]]

    @cached_property
    def _batch_axes(self) -> dict[int, int]:
        """The leading axis of each tensor of a step's batch, behind those of the tasks, by its number."""
        count = len(self.stepped.read)
        return {
            i: self.step_axis(Place("read", i)) if i < count else 0
            for i, name in enumerate(self.names_of_step())
            if name.startswith("batches")
        }

    def pieces(self, read: Sequence[Tensor], count: int) -> list[tuple[list[Tensor], float]]:
        """What a step reads, with one of ``count`` pieces of its batch at a time, and the share of each in its size.

        The size is the length of the leading axis that most tensors of the batch have; others are in every piece.
        """
        lengths = {i: read[i].shape[axis] for i, axis in self._batch_axes.items() if read[i].ndim > axis}
        if not lengths:
            raise BatchesError("micro_batches: no tensor of the batch has an axis", "one that runs over examples", "")
        size = Counter(lengths.values()).most_common(1)[0][0]
        parts, first, found = max(1, min(count, size)), 0, []
        for number in range(parts):
            last = first + size // parts + (number < size % parts)
            piece = [
                x.narrow(self._batch_axes[i], first, last - first) if lengths.get(i) == size else x
                for i, x in enumerate(read)
            ]
            found.append((piece, (last - first) / size))
            first = last
        return found

    def runs_over_steps(self, place: Place) -> bool:
        """Whether the tensor at a place runs over steps."""
        return place.part not in STATE_PARTS and bool(getattr(self.stepped, place.part)[place.number])

    def slice_at(self, place: Place, tensor: Tensor, step: int) -> Tensor:
        """What step ``step`` sees of the tensor at a place: a view of its slice, or all of it.

        A batch is the one its gradient is taken on. A hyperparameter of a window of several updates keeps its axis.
        Batches are those of these steps; a schedule has an entry for every update since the optimizer's first.
        """
        if not self.runs_over_steps(place):
            return tensor
        axis, first = self.step_axis(place), (step - 1) * self.window
        if place.part == "read":
            return tensor.select(axis, first)
        first += self.start
        return tensor.select(axis, first) if self.window == 1 else tensor.narrow(axis, first, self.length(step))

    def slices_at(self, place: Place, tensor: Tensor, steps: range) -> Tensor:
        """What steps in a row, which make equally many updates, see of the tensor at a place: a view, steps in front.

        Or all of it, if it does not run over steps; see :meth:`slice_at`.
        """
        if not self.runs_over_steps(place):
            return tensor
        axis, first, count = self.step_axis(place), (steps.start - 1) * self.window, len(steps)
        if place.part == "read":
            return tensor.movedim(axis, 0)[first : first + (count - 1) * self.window + 1 : self.window]
        updates = self.length(steps.start)
        part = tensor.narrow(axis, self.start + first, count * updates)
        if self.window > 1:
            part = part.view(*part.shape[:axis], count, updates, *part.shape[axis + 1 :])
        return part.movedim(axis, 0)

    def first_update(self, step: int) -> int:
        """The number, since the optimizer's first, of the first update that step ``step`` makes."""
        return self.start + (step - 1) * self.window + 1

    def length(self, step: int) -> int:
        """How many updates step ``step`` makes: the last window may be short."""
        return min(self.window, self.inner_steps - (step - 1) * self.window)

    def step_axis(self, place: Place) -> int:
        """The axis that runs over steps of the tensor at a place, behind the axes of the levels that have their own."""
        return sum([level.has(place) for level in self.levels])

    def own_axes(self, place: Place) -> list[bool]:
        """For each leading axis of the state, outermost first, whether the tensor at a place has it too."""
        return [level.has(place) for level in reversed(self.levels)]

    def names(self) -> Names:
        """What a caller would call the inputs (a leaf of a buffer: by the buffer's name)."""
        params = tuple(f"params{path}" for path in tree.paths(self.params_structure))
        buffers = tuple(name for name, count in self.buffers_layout for _ in range(count))
        read = tuple(self.names_of_step()[: len(self.stepped.read)])
        own = f"a hyperparameter of {self.optimizer_name}"
        return Names(params, buffers, read, (own,) * len(self.stepped.hyperparameters))

    def names_of_step(self) -> list[str]:
        """What a caller would call the tensors that the loss reads in a step."""
        return [path for path, leaf in self._read() if isinstance(leaf, Slot)]

    def constants(self) -> dict[str, Any]:
        """What the loss is given that is no tensor, by the name that a caller would use."""
        return {path: leaf for path, leaf in self._read() if not isinstance(leaf, Slot)}

    def _read(self) -> list[tuple[str, Any]]:
        """The leaves that the loss is given besides the params, by name; their structure is that of (args, batches)."""
        return list(zip(names_of_read(self.args_structure), self.args_leaves, strict=True))


_PARTS: tuple[Part, ...] = ("params", "buffers", "read", "hyperparameters")
_READ: tuple[tuple[int, Part], ...] = ((0, "read"), (1, "hyperparameters"))


def names_of_read(structure: tree.Structure) -> list[str]:
    """What a caller would call the leaves of ``(args, batches)``."""
    return [
        f"args{path.removeprefix('[0]')}" if path.startswith("[0]") else f"batches{path.removeprefix('[1]')}"
        for path in tree.paths(structure)
    ]
