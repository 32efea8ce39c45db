"""Checks of single arguments, whose messages say where, what was got and what was expected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffopt.errors import DiffoptError, HyperparameterError
from diffopt.tensors.plain_numbers import plain
from diffopt.tensors.tree import describe


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
