"""Torch's operations, as far as a lifted step needs them in another form, under all names that torch has for arguments.

These have no batching rule, turn a tensor argument into a number, have no derivative at zero, or exist in place only.
``x.foo_(...)`` is ``foo`` here. The parameters of a rule are called as torch's documentation calls them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt.errors import LiftError
from diffopt.tensors.leaves import root


def _add(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    return torch.add(input, other, alpha=alpha) if not isinstance(alpha, Tensor) else input + alpha * other


def _sub(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    return _add(input, other, alpha=-alpha)


def _pow(input: Any, exponent: Any) -> Any:
    half = isinstance(input, Tensor) and isinstance(exponent, float) and exponent == 0.5
    return root(input) if half else input**exponent


def _set_item(input: Tensor, index: Any, value: Any) -> Tensor:
    if isinstance(index, Tensor) and index.dtype == torch.bool and index.shape == input.shape:
        return torch.where(index, value, input)
    new = input.clone()
    new[index] = value
    return new


def _clamp(input: Tensor, min: Any = None, max: Any = None) -> Tensor:
    if not isinstance(min, Tensor) and not isinstance(max, Tensor):
        return torch.clamp(input, min, max)
    bounds = [b if b is None or isinstance(b, Tensor) else torch.full_like(input, b) for b in (min, max)]
    return torch.clamp(input, *bounds)


RULES: dict[str, Callable[..., Any]] = {
    "add": _add,
    "sub": _sub,
    "subtract": _sub,
    "rsub": lambda input, other, *, alpha=1: _sub(other, input, alpha=alpha),
    "addcmul": lambda input, tensor1, tensor2, *, value=1: input + value * (tensor1 * tensor2),
    "addcdiv": lambda input, tensor1, tensor2, *, value=1: input + value * (tensor1 / tensor2),
    "lerp": lambda input, end, weight: input + weight * (end - input),
    "sqrt": root,
    "pow": _pow,
    "clamp": _clamp,
    "clip": _clamp,
    "clone": lambda input, *, memory_format=None: input,
    "copy": lambda input, other, non_blocking=False: other.expand(input.shape),
    "set_data": lambda input, other: other,
    "zero": torch.zeros_like,
    "fill": lambda input, value: torch.zeros_like(input) + value,
    "full_like": lambda input, fill_value, **options: torch.zeros_like(input, **options) + fill_value,
    "__setitem__": _set_item,
    "__deepcopy__": lambda input, memo: input,
}

# other names that torch takes for an argument, some from numpy, some from its own schemas
_SYNONYMS = {"self": "input", "x": "input", "x1": "input", "a": "input", "x2": "other", "src": "other"}
# old orders of arguments: the name of each, in a call of that many
_OLD_ORDERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("add", "sub"), ("input", "alpha", "other")),
    **dict.fromkeys(("addcmul", "addcdiv"), ("input", "value", "tensor1", "tensor2")),
}


def first_in_place(
    name: str, in_place: bool, args: tuple[Any, ...], options: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with what it works on in the first place, where a call has named all of them."""
    named = next((key for key in options if _SYNONYMS.get(key, key) == "input"), None)
    if args or named is None or not (in_place or name in RULES):
        return args, dict(options)
    return (options[named],), {key: value for key, value in options.items() if key != named}


def apply_rule(name: str, values: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """What the rule of this name makes of the arguments, in whatever spelling of torch's they came."""
    rule = RULES[name]
    named = {_SYNONYMS.get(key, key): value for key, value in options.items()}
    old = _OLD_ORDERS.get(name, ())
    if len(values) == len(old) and not set(old) & set(named):
        named, values = {**named, **dict(zip(old, values, strict=True))}, ()
    signature = _signature(rule)
    try:
        if signature is not None:
            signature.bind(*values, **named)
    except TypeError as error:
        raise LiftError(f"its step calls {name} in another way ({error})", "arguments that torch names") from error
    return rule(*values, **named)


@functools.cache
def _signature(rule: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(rule)
    except ValueError:  # torch's own functions do not say what they take, but check it
        return None
