"""The options of an optimizer to be lifted, taken apart into what is learned and all else."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from diffopt.errors import HyperparameterError
from diffopt.optimizers.base import Schedule
from diffopt.tensors import tree


@final
@dataclass(frozen=True)
class Learned:
    """Stands for an option that is learned: a number to check it at, and whether leaves may differ in it."""

    sample: float
    per_leaf: bool


@final
@dataclass(frozen=True)
class Options:
    """Options without their tensors: all that a check depends on.

    Attributes:
        entries: each by name, the elements of a pair by names such as ``betas[1]``.
        types: the entries' types, for 1 == 1.0 == True.
        scalar_dtype: torch's default dtype, in which scalars are kept.
    """

    entries: tuple[tuple[str, Any], ...]
    types: tuple[type, ...]
    scalar_dtype: torch.dtype

    def learned(self) -> dict[str, Learned]:
        """The learned ones by name."""
        return {name: value for name, value in self.entries if isinstance(value, Learned)}

    def samples(self) -> dict[str, float]:
        """A number for each learned one."""
        return {name: option.sample for name, option in self.learned().items()}

    def shown(self, values: dict[str, Any]) -> str:
        """All options as a call has them, cut short; without what nobody wrote."""
        options = {k: " ".join(repr(v).split()) for k, v in self.at(values).items() if k != "foreach"}
        return "".join(f", {k}={v if len(v) <= 60 else v[:57] + '...'}" for k, v in options.items())

    def at(self, values: dict[str, Any]) -> dict[str, Any]:
        """All options by the names that a constructor has for them, the learned ones at these values."""
        options: dict[str, Any] = {}
        for entry, value in self.entries:
            now = values[entry] if isinstance(value, Learned) else value
            name, _, element = entry.partition("[")
            options[name] = (*options.get(name, ()), now) if element else now
        return options


@functools.lru_cache(maxsize=256)
def defaults_of(function: Any) -> dict[str, Any]:
    """A function's or a class's options with their defaults; ``None`` where there is none."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a function that does not say what it takes
        return {}
    return {k: None if p.default is inspect.Parameter.empty else p.default for k, p in parameters.items()}


def taken_apart(values: dict[str, Any], defaults: dict[str, Any]) -> tuple[Options, dict[str, Any]]:
    """Options without their tensors; and the tensors, trees and schedules by name.

    ``defaults`` say which options are pairs, whose elements are options of their own.
    """
    entries: dict[str, Any] = {}
    for name, value in values.items():
        default = defaults.get(name)
        if _is_pair(default, value):
            known = isinstance(default, tuple | list) and len(default) == len(value)
            samples: Any = default if known else (None,) * len(value)
            mixed = any(map(_is_learned, value))  # then its numbers become tensors too: a pair has one type
            items = [_scalar(x) if mixed and isinstance(x, float) else x for x in value]
            entries |= {f"{name}[{i}]": pair for i, pair in enumerate(zip(items, samples, strict=True))}
        else:
            entries[name] = (value, default)
    learned = {name: value for name, (value, _) in entries.items() if _is_learned(value)}
    marked = {
        name: Learned(_sample(default), _differs_between_leaves(value)) if name in learned else _fixed(name, value)
        for name, (value, default) in entries.items()
    }
    return Options(tuple(marked.items()), tuple(map(type, marked.values())), torch.get_default_dtype()), learned


def _is_pair(default: Any, value: Any) -> bool:
    """Whether an option's elements are options of their own, such as Adam's ``betas``, and not a tree like params."""
    if not isinstance(value, tuple | list) or isinstance(default, int | float):
        return False
    if isinstance(default, tuple | list) and len(default) == len(value):
        return True
    return all(isinstance(x, int | float) or _is_scalar(x) for x in value)


def _scalar(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64, device="cpu")


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def _is_learned(value: Any) -> bool:
    leaves = tree.flatten(value)[0]
    numbers = isinstance(value, dict | list | tuple) and all(isinstance(x, int | float) for x in leaves)
    return isinstance(value, Schedule) or numbers or any(isinstance(x, Tensor) for x in leaves)


def _differs_between_leaves(value: Any) -> bool:
    if isinstance(value, Schedule):
        inner = value.values
        numbers = isinstance(inner, list | tuple) and all(isinstance(x, int | float) for x in inner)
        return not numbers and not (isinstance(inner, Tensor) and inner.ndim <= 1)
    return not _is_scalar(value)


def _sample(default: Any) -> float:
    """A number for an option, from which a small step either way stays within its range and hits no other option."""
    if not isinstance(default, int | float) or abs(default) < 1e-3:
        return 0.07
    if 0.9 < default < 1:
        return 0.9
    return default * 1.1 if default >= 1 else default


def _fixed(name: str, value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        raise HyperparameterError(
            f"{name} is {tree.describe(value)}", "a number, a switch, a tensor, a tree or a Schedule"
        ) from None
    return value
