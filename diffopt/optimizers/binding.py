"""How the hyperparameters of an optimizer become tensors that can be learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from diffopt.errors import (
    DeviceError,
    DtypeError,
    HyperparameterError,
    OptimizerError,
    ShapeError,
    StepsError,
)
from diffopt.optimizers.base import Bindable, Optimizer, Part, Schedule
from diffopt.optimizers.branches import Branches, other_structure
from diffopt.tensors import hints, tree
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.plain_numbers import is_integer, plain_tree
from diffopt.tensors.usable import usable, usable_leaves

_OWN = ("diffopt.optimizers.", "diffopt.prox")
"""Modules of this library with optimizers, and what these hold."""


@dataclass(frozen=True)
class _Slot:
    """Stands for the tensor with this number."""

    index: int


Reader: TypeAlias = Callable[[int, Leaves, Sequence[Tensor]], Any]
"""``(step, params, tensors) ->`` what ``update`` sees in a field."""


@final
@dataclass(frozen=True)
class BoundOptimizer:
    """An optimizer taken apart into its tensors and everything else, checked against the parameters.

    Attributes:
        template: the optimizer as the user made it.
        tensors: the tensors in its fields, and in those of the optimizers that it holds, in a fixed order.
        scheduled: for each tensor, whether its leading axis runs over steps.
        elementwise: whether updates may run on stacked tensors: the template and all that it holds say so, and no field
            is a tree of its own shape, which could not be matched with the tasks' axes.
        own: whether all of it is of this library.
        placed: which of the params each group has, in the order in which groups were met.
    """

    template: Optimizer
    tensors: tuple[Tensor, ...]
    scheduled: tuple[bool, ...]
    elementwise: bool
    own: bool
    placed: tuple[tuple[int, ...], ...]
    _reader: Reader | None

    def at(self, step: int, params: Leaves, tensors: Sequence[Tensor]) -> Optimizer:
        """The optimizer with its hyperparameters ready for ``update`` at this step.

        ``tensors`` stand for :attr:`tensors`, at this step where scheduled; those that belong to a leaf of ``params``
        may lack its trailing axes (a scalar per task), which are added here.
        """
        if self._reader is None:
            return self.template
        ready: Optimizer = self._reader(step, params, tensors)
        return ready


def bind(optimizer: object, params: Sequence[Tensor], structure: tree.Structure, steps: int) -> BoundOptimizer:
    """Take an optimizer apart and check every hyperparameter against the parameters.

    Raises:
        OptimizerError: not an :class:`Optimizer`, or not a dataclass; nor what it holds.
        StructureError, ShapeError, DtypeError, DeviceError: a hyperparameter tree does not fit ``params``.
        StepsError: a schedule's length is not ``steps``.
    """
    if not isinstance(optimizer, Optimizer):
        fix = hints.for_optimizer(optimizer)
        raise OptimizerError(f"optimizer is {tree.describe(optimizer)}", "a diffopt.Optimizer such as SGD", fix)
    found = _Found()
    reader = _Binder(params, Branches.all(structure), steps, found).whole("", optimizer)
    return BoundOptimizer(
        optimizer,
        tuple(found.tensors),
        tuple(found.scheduled),
        found.elementwise,
        found.own,
        tuple(found.placed),
        reader,
    )


def ready(holder: Bindable, params: Sequence[Tensor], structure: tree.Structure) -> Any:
    """What has hyperparameters, with all of them ready for arithmetic with ``params``; of a schedule the one entry."""
    found = _Found()
    reader = _Binder(params, Branches.all(structure), 1, found).whole("", holder)
    now = [x[0] if scheduled else x for x, scheduled in zip(found.tensors, found.scheduled, strict=True)]
    return holder if reader is None else reader(1, Leaves(params), now)


_PLAIN = (float, int, bool, str, type(None))
"""Types of hyperparameters that are handed on as they are."""


class _Found:
    """What is collected on the way through an optimizer and all that it holds."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.scheduled: list[bool] = []
        self.elementwise = True
        self.own = True
        self.placed: list[tuple[int, ...]] = []


class _Binder:
    """Walks over the fields of one optimizer, collecting tensors and making a reader for every field that needs one."""

    def __init__(self, params: Sequence[Tensor], branches: Branches, steps: int, found: _Found) -> None:
        self.params, self.branches, self.steps, self.found = params, branches, steps, found

    def whole(self, name: str, holder: Bindable) -> Reader | None:
        """A reader for what has hyperparameters of its own; ``None`` if none of them needs work."""
        if not is_dataclass(holder):
            raise OptimizerError(
                f"{type(holder).__name__} is not a dataclass",
                "its hyperparameters to be the fields of one",
                "decorate the class with @dataclass(frozen=True)",
            )
        self.found.elementwise &= bool(holder.elementwise)
        self.found.own &= type(holder).__module__.startswith(_OWN)
        readers: dict[str, Reader] = {}
        for field in fields(holder):
            value, kind = getattr(holder, field.name), field.metadata.get("hyperparameter", "leafwise")
            if kind in ("option", "placing") or (type(value) in _PLAIN and kind != "prefix"):
                continue
            named = f"{name}{field.name}"
            reader = self._groups(named, value, holder) if kind == "groups" else self.bind(named, value, kind)
            if reader is not None:
                readers[field.name] = reader
        return None if not readers else lambda *now: _with_fields(holder, {k: r(*now) for k, r in readers.items()})

    def _groups(self, name: str, value: dict[str, Optimizer], holder: Any) -> Reader:
        """A reader for optimizers of parts of the params."""
        readers: list[tuple[str, Optimizer, tuple[int, ...], Reader | None]] = []
        for key, places in holder.places(self.branches.paths()).items():
            self.found.placed.append(places)
            own = _Binder([self.params[i] for i in places], self.branches.part(places), self.steps, self.found)
            readers.append((key, value[key], places, own.whole(f"{name}[{key!r}].", value[key])))

        def read(step: int, params: Leaves, now: Sequence[Tensor]) -> dict[str, Part]:
            found = {}
            for key, optimizer, places, reader in readers:
                own = Leaves([params[i] for i in places])
                found[key] = Part(optimizer if reader is None else reader(step, own, now), places)
            return found

        return read

    def bind(self, name: str, value: Any, kind: str) -> Reader | None:
        """A reader for a field, or for an entry of one; ``None`` if the value needs no work."""
        if kind == "each":
            named = value if isinstance(value, dict) else {f"{name}[{i}]": item for i, item in enumerate(value)}
            readers = {key: self.bind(key, item, "leafwise") for key, item in named.items()}
            kind_of = dict if isinstance(value, dict) else lambda pairs: tuple(item for _, item in pairs)
            if not any(readers.values()):
                return None
            return lambda *now: kind_of((key, r(*now) if r else named[key]) for key, r in readers.items())
        if kind == "tree":
            return self._whole_tree(name, value)
        if kind == "prefix":
            return None if value is None else self._prefix(name, value)
        if isinstance(value, Bindable):
            return self.whole(f"{name}.", value)
        if isinstance(value, dict | list | tuple) and any(isinstance(x, Bindable) for x in tree.flatten(value)[0]):
            return self._holders(name, value)
        return self._leafwise(name, value)

    def _holders(self, name: str, value: Any) -> Reader | None:
        """A reader for a dict, list or tuple with optimizers among its entries."""
        leaves, structure = tree.flatten(value)
        named = zip(tree.paths(structure), leaves, strict=True)
        readers = [self.bind(f"{name}{path}", leaf, "leafwise") for path, leaf in named]
        if not any(readers):
            return None
        pairs = list(zip(readers, leaves, strict=True))
        return lambda *now: tree.unflatten(structure, [r(*now) if r else leaf for r, leaf in pairs])

    def _slot(self, tensor: Tensor, scheduled: bool) -> _Slot:
        self.found.tensors.append(tensor)
        self.found.scheduled.append(scheduled)
        return _Slot(len(self.found.tensors) - 1)

    def _whole_tree(self, name: str, value: Any) -> Reader | None:
        leaves, structure = tree.flatten(value)
        leaves = usable_leaves(leaves, lambda: [f"{name}{path}" for path in tree.paths(structure)])
        readers = [self._as_it_is(name, leaf) for leaf in leaves]
        if not any(readers):
            return None
        pairs = list(zip(readers, leaves, strict=True))
        return lambda *now: tree.unflatten(structure, [r(*now) if r else leaf for r, leaf in pairs])

    def _as_it_is(self, name: str, leaf: Any) -> Reader | None:
        if isinstance(leaf, Bindable):
            return self.whole(f"{name}.", leaf)
        if not isinstance(leaf, Tensor):
            return None
        self.found.elementwise = False  # of a shape of its own
        slot = self._slot(leaf, False)
        return lambda step, params, now: now[slot.index]

    def _prefix(self, name: str, value: Any) -> Reader:
        entries = [self._whole_tree(name, entry) or _always(entry) for _, entry in self._like_params(name, value)]
        return lambda *now: tuple(entry(*now) for entry in entries)

    def _leafwise(self, name: str, value: Any) -> Reader | None:
        scheduled = isinstance(value, Schedule)
        inner = plain_tree(value.values if scheduled else value)
        inner = usable(inner, lambda: name) if isinstance(inner, Tensor) else inner
        if scheduled and (isinstance(inner, int | float) or (isinstance(inner, Tensor) and inner.ndim == 0)):
            raise StepsError(f"the schedule of {name} is {tree.describe(inner)}", f"{self.steps} values, one a step")
        if scheduled and _is_list_of_numbers(inner):
            self._check_length(name, len(inner))
            numbers: Sequence[float] = inner  # type: ignore[assignment]
            return lambda step, params, now: _entry_of(numbers, step)
        if not scheduled and (inner is None or isinstance(inner, bool | str | int | float)):
            return None if inner is value else _always(inner)
        if isinstance(inner, Tensor) and inner.ndim == int(scheduled):
            self._check_floating(name, inner)
            if inner.device.type == "meta":
                raise DeviceError(f"{name} is on meta", f"{self.params[0].device} as params", "make it there")
            if scheduled:
                self._check_length(name, len(inner))
            slot = self._slot(inner, scheduled)
            return lambda step, params, now: Leaves(_fit(now[slot.index].to(x), x) for x in params)
        entries = self._like_params(name, inner, self._meant(inner, scheduled))
        slots = [
            self._entry(name, path, x, leaf, scheduled) for (path, x), leaf in zip(entries, self.params, strict=True)
        ]
        return lambda step, params, now: Leaves(
            _fit(now[slot.index], x) if isinstance(slot, _Slot) else torch.tensor(slot, dtype=x.dtype, device=x.device)
            for slot, x in zip(slots, params, strict=True)
        )

    def _entry(self, name: str, path: str, value: Any, leaf: Tensor, scheduled: bool) -> Any:
        where = f"{name}{path}"
        if isinstance(value, float) or is_integer(value):
            return float(value)
        if not isinstance(value, Tensor):
            raise HyperparameterError(
                f"{where} is {tree.describe(value)}", "a float or a tensor", self._meant(value, scheduled)
            )
        value = usable(value, lambda: where)
        self._check_floating(where, value)
        shape = tuple(value.shape)
        if scheduled:
            self._check_length(where, shape[0] if shape else 0)
            shape = shape[1:]
        if shape not in ((), tuple(leaf.shape)):
            raise ShapeError(
                f"{where} has shape {shape}",
                f"() or the shape {tuple(leaf.shape)} of the parameter there",
                self._meant(value, scheduled),
            )
        if value.dtype != leaf.dtype:
            raise DtypeError(
                f"{where} is {value.dtype}", f"{leaf.dtype} as the parameter there", "convert one with .to()"
            )
        if value.device != leaf.device:
            raise DeviceError(
                f"{where} is on {value.device}", f"{leaf.device} as the parameter there", "move one with .to()"
            )
        return self._slot(value, scheduled)

    def _like_params(self, name: str, value: Any, meant: str = "") -> list[tuple[str, Any]]:
        """The path and the entry for each of the params."""
        try:
            return self.branches.entries(value)
        except (ValueError, TypeError) as error:
            raise other_structure(name, value, self.branches, meant) from error

    def _meant(self, value: Any, scheduled: bool) -> str:
        """What to write for several values, or a function, where one value is expected."""
        return hints.for_hyperparameter(value, self.steps, scheduled)

    def _check_length(self, name: str, length: int) -> None:
        if length < self.steps:
            raise StepsError(
                f"the schedule of {name} has {length} entries", f"at least one per step since the first: {self.steps}"
            )

    def _check_floating(self, name: str, value: Tensor) -> None:
        if not value.is_floating_point():
            raise DtypeError(f"{name} is a {value.dtype} tensor", "a floating dtype")


def _fit(value: Tensor, leaf: Tensor) -> Tensor:
    """Append axes of length 1, so that a scalar per task broadcasts against a leaf per task."""
    missing = leaf.ndim - value.ndim
    return value.reshape(value.shape + (1,) * missing) if value.ndim and missing > 0 else value


def _entry_of(numbers: Sequence[float], step: Any) -> Any:
    """The number of a step; as a tensor if the step is one, whose number is not known."""
    if isinstance(step, Tensor):
        all_numbers = torch.tensor([float(x) for x in numbers], dtype=torch.float64, device=step.device)
        return all_numbers.index_select(0, (step - 1).long().reshape(1)).reshape(())
    return float(numbers[step - 1])


def _always(value: Any) -> Reader:
    return lambda *now: value


def _with_fields(holder: Any, values: dict[str, Any]) -> Any:
    """The same with other values in some fields, which are not looked at: they are no longer what a user writes."""
    made = object.__new__(type(holder))
    for field in fields(holder):
        object.__setattr__(made, field.name, values.get(field.name, getattr(holder, field.name)))
    return made


def _is_list_of_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(x, int | float) for x in value)
