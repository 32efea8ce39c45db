"""The numbers in an optimizer's fields: found, and replaced by tensors or other forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffopt.optimizers.base import Bindable, Optimizer, Schedule
from diffopt.tensors import tree

Change = Callable[[str, Any], Any]
Holder = TypeVar("Holder", bound=Bindable)

_OPTIONS = ("option", "placing")
"""Kinds of fields in which no number is learned."""


def numbers(optimizer: Optimizer) -> dict[str, Tensor]:
    """Every float and floating tensor in the fields, by name, as tensors: all that can be learned.

    Integers, booleans and strings are options, not hyperparameters; so are floats within a tree that ``update`` gets
    as it is.
    """
    found: dict[str, Tensor] = {}

    def note(name: str, value: Any) -> Any:
        found[name] = torch.as_tensor(value, dtype=torch.float64).detach().clone()
        return value

    changed(optimizer, note)
    return found


def bare(optimizer: Bindable, prefix: str = "") -> dict[str, float]:
    """Those numbers that stand for themselves, not in a tree or a schedule: they may have any form."""
    found: dict[str, float] = {}
    for field in fields(optimizer):  # type: ignore[arg-type]
        value, kind = getattr(optimizer, field.name), field.metadata.get("hyperparameter", "leafwise")
        if kind in _OPTIONS:
            continue
        named = f"{prefix}{field.name}"
        leaves, structure = tree.flatten(value)
        for path, leaf in zip(tree.paths(structure), leaves, strict=True):
            if isinstance(leaf, Bindable):
                found |= bare(leaf, f"{named}{path}.")
        each = {f"{named}[{i}]": x for i, x in enumerate(value)} if kind == "each" else {}
        for name, x in (each or ({named: value} if kind == "leafwise" else {})).items():
            if isinstance(x, float) or (isinstance(x, Tensor) and x.ndim == 0 and x.is_floating_point()):
                found[name] = float(x)
    return found


def with_forms(optimizer: Optimizer, values: Mapping[str, Any]) -> Optimizer:
    """The optimizer with these values in place of the numbers of the same name."""
    return changed(optimizer, lambda name, value: values.get(name, value))


def forms(params: Any, value: float, steps: int) -> dict[str, Any]:
    """One number in every form that a hyperparameter may have."""
    number = torch.tensor(value, dtype=torch.float64)
    each = torch.full((steps,), value, dtype=torch.float64)
    return {
        "float": value,
        "tensor": number,
        "tree of numbers": tree.map_leaves(lambda p: number, params),
        "tree": tree.map_leaves(lambda p: torch.full_like(p, value), params),
        "schedule of floats": Schedule([value] * steps),
        "schedule": Schedule(each),
        "schedule of trees": Schedule(
            tree.map_leaves(lambda p: torch.full_like(p, value).expand(steps, *p.shape), params)
        ),
    }


def changed(optimizer: Holder, change: Change, prefix: str = "") -> Holder:
    """The optimizer with ``change(name, number)`` in place of every number, in the optimizers that it holds too."""
    found = [field for field in fields(optimizer) if field.init]  # type: ignore[arg-type]
    options = {field.name: _changed(field, getattr(optimizer, field.name), change, prefix) for field in found}
    return replace(optimizer, **options)  # type: ignore[type-var]


def _changed(field: Field[Any], value: Any, change: Change, prefix: str) -> Any:
    kind = field.metadata.get("hyperparameter")
    whole = kind in ("tree", "prefix")

    def walk(name: str, value: Any) -> Any:
        if isinstance(value, Schedule):
            inner = value.values
            listed = isinstance(inner, list | tuple) and all(isinstance(x, float | int) for x in inner)
            return Schedule(walk(name, torch.tensor(inner, dtype=torch.float64) if listed else inner))
        leaves, structure = tree.flatten(value, is_leaf=lambda x: isinstance(x, Schedule))
        named = zip(tree.paths(structure), leaves, strict=True)
        return tree.unflatten(structure, [one(name + path, leaf) for path, leaf in named])

    def one(name: str, leaf: Any) -> Any:
        if isinstance(leaf, Schedule):
            return walk(name, leaf)
        if isinstance(leaf, Bindable):
            return changed(leaf, change, f"{name}.")
        learnable = (isinstance(leaf, float) and not whole) or (isinstance(leaf, Tensor) and leaf.is_floating_point())
        return change(name, leaf) if learnable else leaf

    return value if kind in _OPTIONS else walk(f"{prefix}{field.name}", value)
