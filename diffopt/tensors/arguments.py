"""The one validator of arguments and options: every error says where, what was got, what was expected and the fix.

Each check returns the value as it is to be used, numbers of numpy as Python's own. What is accepted besides is named in
``also``, such as ``also=(None,)``. Values are looked at by their type first: ``==``, a truth or a ``repr`` of a
stranger's may raise.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor

from diffopt.errors import DiffoptError, HyperparameterError, LossError, StepsError
from diffopt.tensors import hints
from diffopt.tensors.plain_numbers import as_float, is_integer, make_plain, plain
from diffopt.tensors.tree import brief, describe
from diffopt.tensors.usable import is_calculable, refuse_unusable

MOST = 10_000
"""Of what a call does so many times: more would not end."""
_LARGEST = 2**63 - 1
"""The largest integer that torch takes as a scalar; above it, it wants a float."""


def check_flag(where: str, value: Any) -> bool:
    """Refuse what is neither ``True`` nor ``False``."""
    flag = plain(value)
    if not isinstance(flag, bool):
        raise HyperparameterError(f"{where} is {describe(value)}", "True or False")
    return flag


def check_integer(
    where: str,
    value: Any,
    low: int,
    *,
    also: tuple[str | None, ...] = (),
    kind: type[DiffoptError] = HyperparameterError,
    note: str = "",
    fix: str = "",
    high: int = 2**63,
) -> Any:
    """Refuse what is not an integer of ``low <= value < high``.

    Torch has no integers from ``2**63`` on, and so much of anything is a mistake. ``note`` is what else is to be said
    of what is expected, with the space before it; ``fix``: what to do.
    """
    number = plain(value)
    if _is_among(number, also):
        return number
    if not is_integer(number) or not low <= number < high:
        most = " and < 2**63" if high == 2**63 and is_integer(number) and number >= high else ""
        raise kind(f"{where} is {describe(number)}", _either(also, f"an integer >= {low}{most}{note}"), fix)
    return int(number)


def check_number(
    where: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    also: tuple[str | None, ...] = (),
    kind: type[DiffoptError] = HyperparameterError,
    above: bool = False,
    up_to: bool = False,
) -> Any:
    """Refuse what is not a finite number of ``low <= value < high``.

    ``above``: nor ``low`` itself; ``up_to``: nor what is above ``high``, but not ``high``.
    """
    number = plain(value)
    if _is_among(number, also):
        return number
    found = as_float(number)
    right = (low < found if above else low <= found) and (found <= high if up_to else found < high)
    if not right or not math.isfinite(found):
        least = "" if low == -math.inf else f" {'>' if above else '>='} {low:g}"
        most = "" if high == math.inf else f"{' and' if least else ''} {'<=' if up_to else '<'} {high:g}"
        raise kind(f"{where} is {describe(number)}", _either(also, f"a finite number{least}{most}"))
    return found if abs(number) > _LARGEST else number


def check_within_steps(where: str, count: int, steps: int) -> None:
    """Refuse more of an inner problem's steps than it has."""
    if count > steps:
        has = f"the inner problem has only {steps} steps (each window of MultiStep counts as one)"
        raise StepsError(f"{where} is {brief(count)}", f"at most {steps}", f"{has}: take fewer, or more inner steps")


def check_choice(where: str, value: Any, *choices: str, also: str = "") -> str:
    """Refuse what is none of these words; ``also`` names before them what else would have been taken."""
    if not _is_among(value, choices):
        raise HyperparameterError(f"{where} is {describe(value)}", also + _either(choices[:-1], repr(choices[-1])))
    return str(value)


def check_instance(
    where: str,
    value: Any,
    kind: type[Any],
    expected: str,
    error: type[DiffoptError] = HyperparameterError,
    *,
    also: tuple[None, ...] = (),
    fix: str = "",
) -> Any:
    """Refuse what is no object of this class; of the class itself, say that it is to be called."""
    if not isinstance(value, kind) and not _is_among(value, also):
        uncalled = isinstance(value, type) and issubclass(value, kind)
        call = f"call it: {where.rpartition(' ')[2]}={value.__name__}(...)" if uncalled else fix
        raise error(f"{where} is {describe(value)}", _either(also, expected), call)
    return value


def check_function(where: str, value: Any, expected: str, error: type[DiffoptError], fix: str = "") -> None:
    """Refuse what cannot be called, and a class, whose call would only make an object."""
    if not callable(value) or isinstance(value, type):
        make = "that is a class: pass an object of it" if isinstance(value, type) else fix
        raise error(f"{where} is {describe(value)}", expected, make)


def check_measured(where: str, value: Any) -> Tensor:
    """Refuse what is not one number, or one number for each metric."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim > 1 or not value.numel():
        fix = "flatten it" if isinstance(value, Tensor) and value.ndim > 1 else hints.for_measured(value)
        raise LossError(f"{where} returned {describe(value)}", "a floating scalar or a vector [m]", fix)
    return value


def check_generator(where: str, value: Any, kind: type[DiffoptError] = HyperparameterError) -> None:
    """Refuse what is not a source of random numbers."""
    make = "make one and seed it with manual_seed()"
    check_instance(where, value, torch.Generator, "a torch.Generator", kind, fix=make)


def check_floating(kind: type[DiffoptError], **tensors: Any) -> None:
    """Refuse what are not finite floating tensors of one dtype, on one device; named by their keywords."""
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise kind(f"{name} is {describe(x)}", "a floating tensor", "convert it with torch.as_tensor")
        refuse_unusable(x, lambda name=name: name)  # type: ignore[misc]
        if (x.dtype, x.device) != (first.dtype, first.device):
            raise kind(f"{name} is {describe(x)}", f"{first.dtype} on {first.device} as {first_name}", "use .to()")
        if not is_calculable(x):
            raise kind(f"{name} is {describe(x)} and {x.layout}", "a dense tensor of numbers", "use .to_dense()")
        if not bool(x.isfinite().all()):
            raise kind(f"{name} holds NaN or infinite numbers", "finite ones", "check the data")


@final
class Options:
    """The options of a frozen dataclass that is being made: checked by name, and kept as the checks return them."""

    def __init__(self, owner: Any) -> None:
        """Convert numpy's numbers first, in all fields."""
        make_plain(owner)
        self._owner = owner

    def flag(self, *names: str) -> None:
        """Options that are ``True`` or ``False``."""
        for name in names:
            self._keep(name, check_flag(self._where(name), getattr(self._owner, name)))

    def integer(self, name: str, low: int, **how: Any) -> None:
        """An integer; see :func:`check_integer`."""
        self._keep(name, check_integer(self._where(name), getattr(self._owner, name), low, **how))

    def number(self, name: str, low: float = -math.inf, high: float = math.inf, **how: Any) -> None:
        """A finite number; see :func:`check_number`."""
        self._keep(name, check_number(self._where(name), getattr(self._owner, name), low, high, **how))

    def choice(self, name: str, *choices: str, also: str = "") -> None:
        """One of several words; see :func:`check_choice`."""
        check_choice(self._where(name), getattr(self._owner, name), *choices, also=also)

    def instance(self, name: str, kind: type[Any], expected: str, *error: type[DiffoptError], **how: Any) -> None:
        """An object of a class; see :func:`check_instance`."""
        check_instance(self._where(name), getattr(self._owner, name), kind, expected, *error, **how)

    def _where(self, name: str) -> str:
        return f"{type(self._owner).__name__}: {name}"

    def _keep(self, name: str, value: Any) -> None:
        if value is not getattr(self._owner, name):
            object.__setattr__(self._owner, name, value)


def _is_among(value: Any, also: tuple[str | None, ...]) -> bool:
    return (value is None and None in also) or (isinstance(value, str) and str(value) in also)


def _either(also: tuple[str | None, ...], last: str) -> str:
    return f"{', '.join(map(repr, also))} or {last}" if also else last
