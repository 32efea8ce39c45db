"""What a stateful optimizer remembers from step to step, found out by watching it, and handed to and from buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor

from diffopt.errors import LiftError
from diffopt.lifting.cells import Cell, cell
from diffopt.optimizers.base import Buffers
from diffopt.tensors import transforms
from diffopt.tensors.leaves import Leaves

Store: TypeAlias = "dict[Any, Any]"
"""Where things are remembered by key: the state of one parameter, a param group, or the leaves of a state."""


@final
@dataclass(frozen=True)
class Memory:
    """One thing that is remembered.

    Attributes:
        key: where, in its store.
        kind: a ``"count"`` of the steps, which is not kept but known; a ``"buffer"``, a floating tensor or a number
            that changes; or a ``"constant"``.
        like: the count or the constant as it is after the first step; a tensor like the buffer, without data.
        buffer: the buffer's name.
    """

    key: Any
    kind: Literal["count", "buffer", "constant"]
    like: Any
    buffer: str


Layout: TypeAlias = "tuple[tuple[Memory, ...], ...]"
"""What is remembered in each store."""


@final
@dataclass(frozen=True)
class Opaque:
    """A value that is neither a tensor nor a number, by what it looks like."""

    text: str


def glimpse(store: Store) -> Store:
    """The contents of a store as they are now; of floating tensors that are no scalars, only shape and dtype."""

    def look(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value if value is None or isinstance(value, bool | int | float | str) else Opaque(repr(value))
        small = value.ndim == 0 or not value.is_floating_point()
        return value.detach().clone() if small else value.detach().to("meta")

    return {key: look(value) for key, value in store.items()}


def memories(seen: Sequence[Store], prefix: str = "", *, constants: bool = True) -> tuple[Memory, ...]:
    """What a store remembers, given glimpses of it after steps 1, 2, ...

    ``constants=False`` leaves out what does not change, of whatever type: it is there anyway.

    Raises:
        LiftError: something changes that is neither a floating tensor, nor a number, nor a count of the steps.
    """
    found = []
    for key in dict.fromkeys(key for store in seen for key in store):
        values = [store.get(key, _MISSING) for store in seen]
        if not constants and all(not isinstance(x, Tensor) and x == values[0] for x in values):
            continue
        kind, like = _kind(key, values), values[0]
        if kind == "buffer":
            like = torch.empty_like(like, device="meta") if isinstance(like, Tensor) else _NUMBER
        if constants or kind != "constant":
            found.append(Memory(key, kind, like, f"{prefix}{key}"))
    return tuple(found)


_MISSING = object()
_NUMBER = torch.empty((), dtype=torch.float64, device="meta")


def _kind(key: Any, values: list[Any]) -> Literal["count", "buffer", "constant"]:
    first = values[0]
    if all(type(x) is type(first) for x in values):
        floating = isinstance(first, Tensor) and first.is_floating_point()
        scalar = type(first) in (int, float) or (isinstance(first, Tensor) and first.ndim == 0)
        if scalar and all(float(b) - float(a) == 1 for a, b in pairwise(values)):
            return "count"
        if floating and all((x.shape, x.dtype) == (first.shape, first.dtype) for x in values):
            return "buffer"
        if isinstance(first, Tensor) and not floating and all(torch.equal(x, first) for x in values):
            return "constant"
        if isinstance(first, type(None) | bool | int | float | str) and all(x == first for x in values):
            return "constant"
        if type(first) is float:
            return "buffer"
    looks = " ".join(str(getattr(first, "text", first)).split())[:60]
    what = "only after its first step" if first is _MISSING else f"which is {looks}"
    raise LiftError(f"it keeps {key!r}, {what}", "floating tensors, numbers and counts of the steps")


def restore(store: Store, kept: Sequence[Memory], waiting: dict[str, Iterator[Tensor]], step: int) -> None:
    """Put back what was remembered at the end of the step before, taking the next tensor of each buffer."""
    for memory in kept:
        if memory.kind == "buffer":
            store[memory.key] = cell(next(waiting[memory.buffer]))
        else:
            value = _expected(memory, step - 1)
            store[memory.key] = cell(value, constant=True) if isinstance(value, Tensor) else value


def collected(stores: Sequence[Store], layout: Layout, step: int, device: torch.device) -> Buffers:
    """The buffers out of the stores after a step.

    Raises:
        LiftError: a store holds something that was not there after the first steps, or holds something no longer; or
            what was the same after each of them, or counted them, does so no longer.
    """
    buffers: dict[str, list[Tensor]] = {}
    for store, kept in zip(stores, layout, strict=True):
        late = [key for key in store if key not in {memory.key for memory in kept}]
        late += [m.key for m in kept if m.key not in store or _has_changed(m, store[m.key], step)]
        if late:
            raise LiftError(
                f"it makes, drops or changes {late[0]!r} only some steps after its first", "the same at every step"
            )
        for memory in kept:
            if memory.kind == "buffer":
                value = store[memory.key]
                if not isinstance(value, Cell):
                    value = cell(torch.as_tensor(value, dtype=memory.like.dtype))
                buffers.setdefault(memory.buffer, []).append(value.value.to(device))
    return {name: Leaves(tensors) for name, tensors in buffers.items()}


def _expected(memory: Memory, step: int) -> Any:
    """A count or a constant after a step."""
    return memory.like + (step - 1) if memory.kind == "count" else memory.like


def _has_changed(memory: Memory, value: Any, step: int) -> bool:
    if memory.kind == "buffer":
        return False
    expected = _expected(memory, step)
    if isinstance(value, Cell) and isinstance(expected, Tensor):
        return not bool((transforms.plain(value.value).cpu() == expected.cpu()).all())
    return not isinstance(value, Tensor) and bool(value != expected)


def empty(layout: Layout, device: torch.device) -> Buffers:
    """Zeros in place of buffers, before the first step."""
    buffers: dict[str, list[Tensor]] = {}
    for memory in (memory for kept in layout for memory in kept if memory.kind == "buffer"):
        buffers.setdefault(memory.buffer, []).append(torch.zeros_like(memory.like, device=device))
    return {name: Leaves(tensors) for name, tensors in buffers.items()}
