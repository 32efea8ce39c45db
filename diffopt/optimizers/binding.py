"""How the hyperparameters of an optimizer become tensors that can be learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, final

import torch
from torch import Tensor

from diffopt.errors import (
    DeviceError,
    DtypeError,
    HyperparameterError,
    OptimizerError,
    ShapeError,
    StepsError,
    StructureError,
)
from diffopt.optimizers.base import Optimizer, Schedule
from diffopt.tensors import hints, tree
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.plain_numbers import is_integer, plain_tree
from diffopt.tensors.usable import usable, usable_leaves


@dataclass(frozen=True)
class _Slot:
    """Stands for the tensor with this number."""

    index: int


@final
@dataclass(frozen=True)
class BoundOptimizer:
    """An optimizer taken apart into its tensors and everything else, checked against the parameters.

    Attributes:
        template: the optimizer as the user made it.
        tensors: the tensors in its fields, in a fixed order.
        scheduled: for each tensor, whether its leading axis runs over steps.
        elementwise: whether updates may run on stacked tensors: the template says so, and no field is a tree of its
            own shape, which could not be matched with the tasks' axes.
    """

    template: Optimizer
    tensors: tuple[Tensor, ...]
    scheduled: tuple[bool, ...]
    elementwise: bool
    _values: tuple[tuple[str, Callable[..., Any]], ...]

    def at(self, step: int, params: Leaves, tensors: Sequence[Tensor]) -> Optimizer:
        """The optimizer with its hyperparameters ready for ``update`` at this step.

        ``tensors`` stand for :attr:`tensors`, at this step where scheduled; those that belong to a leaf of ``params``
        may lack its trailing axes (a scalar per task), which are added here.
        """
        if not self._values:
            return self.template
        ready: Optimizer = object.__new__(type(self.template))
        for field in fields(self.template):  # type: ignore[arg-type]
            object.__setattr__(ready, field.name, getattr(self.template, field.name))
        for name, value in self._values:
            object.__setattr__(ready, name, value(step, params, tensors))
        return ready


def bind(optimizer: object, params: Sequence[Tensor], structure: tree.Structure, steps: int) -> BoundOptimizer:
    """Take an optimizer apart and check every hyperparameter against the parameters.

    Raises:
        OptimizerError: not an :class:`Optimizer`, or not a dataclass.
        StructureError, ShapeError, DtypeError, DeviceError: a hyperparameter tree does not fit ``params``.
        StepsError: a schedule's length is not ``steps``.
    """
    if not isinstance(optimizer, Optimizer):
        fix = hints.for_optimizer(optimizer)
        raise OptimizerError(f"optimizer is {tree.describe(optimizer)}", "a diffopt.Optimizer such as SGD", fix)
    if not is_dataclass(optimizer):
        raise OptimizerError(
            f"{type(optimizer).__name__} is not a dataclass",
            "its hyperparameters to be the fields of one",
            "decorate the class with @dataclass(frozen=True)",
        )
    binder = _Binder(params, structure, steps)
    values = []
    for field in fields(optimizer):
        value, kind = getattr(optimizer, field.name), field.metadata.get("hyperparameter", "leafwise")
        if type(value) in _PLAIN and kind != "prefix":
            continue
        reader = binder.bind(field.name, value, kind)
        if reader is not None:
            values.append((field.name, reader))
    elementwise = optimizer.elementwise and not binder.whole_trees
    return BoundOptimizer(
        optimizer,
        tuple(binder.tensors),
        tuple(binder.scheduled),
        elementwise,
        tuple(values),
    )


_PLAIN = (float, int, bool, str, type(None))
"""Types of hyperparameters that are handed on as they are."""


class _Binder:
    """Walks over the fields of one optimizer, collecting tensors and making a reader for every field that needs one."""

    def __init__(self, params: Sequence[Tensor], structure: tree.Structure, steps: int) -> None:
        self.params, self.structure, self.steps = params, structure, steps
        self.tensors: list[Tensor] = []
        self.scheduled: list[bool] = []
        self.whole_trees = False

    def bind(self, name: str, value: Any, kind: str) -> Callable[..., Any] | None:
        """A reader ``(step, params, tensors) -> value for update``; ``None`` if the value needs no work."""
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
        return self._leafwise(name, value)

    def _slot(self, tensor: Tensor, scheduled: bool) -> _Slot:
        self.tensors.append(tensor)
        self.scheduled.append(scheduled)
        return _Slot(len(self.tensors) - 1)

    def _whole_tree(self, name: str, value: Any) -> Callable[..., Any] | None:
        leaves, structure = tree.flatten(value)
        leaves = usable_leaves(leaves, lambda: [f"{name}{path}" for path in tree.paths(structure)])
        slots = [self._slot(x, False) if isinstance(x, Tensor) else x for x in leaves]
        self.whole_trees = self.whole_trees or any(isinstance(slot, _Slot) for slot in slots)
        if not any(isinstance(slot, _Slot) for slot in slots):
            return None
        return lambda step, params, now: tree.unflatten(
            structure, [now[s.index] if isinstance(s, _Slot) else s for s in slots]
        )

    def _prefix(self, name: str, value: Any) -> Callable[..., Any]:
        entries = [self._whole_tree(name, entry) or _always(entry) for entry in self._like_params(name, value)]
        return lambda *now: tuple(entry(*now) for entry in entries)

    def _leafwise(self, name: str, value: Any) -> Callable[..., Any] | None:
        scheduled = isinstance(value, Schedule)
        inner = plain_tree(value.values if scheduled else value)
        inner = usable(inner, lambda: name) if isinstance(inner, Tensor) else inner
        if scheduled and (isinstance(inner, int | float) or (isinstance(inner, Tensor) and inner.ndim == 0)):
            raise StepsError(f"the schedule of {name} is {tree.describe(inner)}", f"{self.steps} values, one a step")
        if scheduled and _is_list_of_numbers(inner):
            self._check_length(name, len(inner))
            return lambda step, params, now: float(inner[step - 1])
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
            self._entry(name, path, x, leaf, scheduled)
            for path, x, leaf in zip(tree.paths(self.structure), entries, self.params, strict=True)
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

    def _like_params(self, name: str, value: Any, meant: str = "") -> list[Any]:
        try:
            return tree.flatten_up_to(self.structure, value)
        except (ValueError, TypeError) as error:
            found, odd = tree.flatten(value)[1], ""
            if found.type is not None and (not meant or found.type is self.structure.type):
                named = tree.differences(name, value, self.structure, deeper=True)
                odd = f" ({(named or ['it has other kinds of branches'])[0]})"
            raise StructureError(
                f"{name} is {tree.describe(value)}{odd}",
                "a float, a scalar tensor, a Schedule, or a tree with the structure of params",
                meant,
            ) from error

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


def _always(value: Any) -> Callable[..., Any]:
    return lambda *now: value


def _is_list_of_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(x, int | float) for x in value)
