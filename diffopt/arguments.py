"""Checks of single arguments, whose messages say where, what was got and what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt import tree
from diffopt.errors import DiffoptError, HyperparameterError
from diffopt.optimizer import Hyperparameter, Optimizer, Schedule
from diffopt.plain_numbers import plain
from diffopt.tree import describe


def check_flag(where: str, value: Any) -> None:
    """Refuse what is neither ``True`` nor ``False``."""
    if not isinstance(plain(value), bool):
        raise HyperparameterError(f"{where} is {describe(value)}, expected True or False")


def check_whole(where: str, value: Any, low: int, kind: type[DiffoptError] = HyperparameterError) -> None:
    """Refuse what is not an integer of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise kind(f"{where} is {describe(value)}, expected an integer >= {low}")


def integer(where: str, value: Any, low: int) -> int:
    """The same, for an option that may be one of numpy's integers; returned as one of Python's."""
    value = plain(value)
    check_whole(where, value, low)
    return int(value)


def check_generator(where: str, value: Any, kind: type[DiffoptError] = HyperparameterError) -> None:
    """Refuse what is not a source of random numbers."""
    if not isinstance(value, torch.Generator):
        raise kind(f"{where} is {describe(value)}, expected a torch.Generator; make one and seed it with manual_seed()")


def check_floating(kind: type[DiffoptError], **tensors: Any) -> None:
    """Refuse what are not finite floating tensors of one dtype, on one device; named by their keywords."""
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise kind(f"{name} is {describe(x)}, expected a floating tensor; convert it with torch.as_tensor")
        if (x.dtype, x.device) != (first.dtype, first.device):
            raise kind(f"{name} is {describe(x)}, expected {first.dtype} on {first.device} as {first_name}; use .to()")
        if not bool(x.isfinite().all()):
            raise kind(f"{name} holds NaN or infinite numbers, expected finite ones; check the data")


def check_range(optimizer: Optimizer, **ranges: tuple[float, float]) -> None:
    """Refuse float hyperparameters outside ``low <= value < high``; tensors are the caller's to keep in range."""
    for name, (low, high) in ranges.items():
        value = getattr(optimizer, name)
        leaves, structure = tree.flatten(value.values if isinstance(value, Schedule) else value)
        for path, item in zip(tree.paths(structure), leaves, strict=True):
            outside = isinstance(item, int | float) and not low <= _as_float(item) < high
            if outside or isinstance(item, str | bool) or item is None:
                raise HyperparameterError(
                    f"{type(optimizer).__name__}: {name}{path} is {tree.brief(item)}, expected {low} <= {name} < {high}"
                )


def _as_float(number: float) -> float:
    """A number as torch would take it: a Python integer beyond all floats is infinite."""
    try:
        return float(number)
    except OverflowError:
        return math.copysign(math.inf, number > 0 or -1)


def check_eps(optimizer: Any, params: Sequence[Tensor]) -> None:
    """Refuse an ``eps`` that is 0 in the dtype of a parameter, where a gradient of 0 would be divided by 0."""
    eps = optimizer.eps
    for dtype in dict.fromkeys(x.dtype for x in params):
        least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # half of which rounds to 0
        if isinstance(eps, int | float) and 0 < eps <= least / 2:
            raise HyperparameterError(
                f"{type(optimizer).__name__}: eps is {eps!r}, which is 0 in {dtype}, expected a number above "
                f"{least:.0e}: a coordinate without gradient would become "
                "NaN. Give a larger eps, or params in another dtype"
            )


def is_zero(value: Hyperparameter) -> bool:
    """Whether a hyperparameter is the number 0, so that its term can be left out (a tensor never counts as 0)."""
    return isinstance(value, int | float) and value == 0
