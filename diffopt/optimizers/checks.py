"""Checks of an optimizer's hyperparameters, which may be trees, schedules and tensors as well as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt.errors import HyperparameterError, OptimizerError
from diffopt.optimizers.base import Bindable, Hyperparameter, Optimizer, Schedule
from diffopt.tensors import hints, tree
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.plain_numbers import as_float

POSITIVE = (0.0, math.inf)
FINITE = (-math.inf, math.inf)


def check_range(optimizer: Bindable, *optional: str, **ranges: tuple[float, float]) -> None:
    """Refuse hyperparameters outside ``low <= value < high``, or not finite; those named may be ``None``.

    Floats only: tensors are the caller's to keep in range, who can look at them without waiting for a device.
    """
    for name, (low, high) in ranges.items():
        value = getattr(optimizer, name)
        if (type(value) is float and low <= value < high and value != -math.inf) or (
            value is None and name in optional
        ):
            continue
        leaves, structure = tree.flatten(value.values if isinstance(value, Schedule) else value)
        for path, item in zip(tree.paths(structure), leaves, strict=True):
            number = as_float(item)
            outside = isinstance(item, int | float) and not (low <= number < high and math.isfinite(number))
            if outside or isinstance(item, str | bool) or item is None:
                none = "None, or " if name in optional else ""
                inside = f"{low:g} <= {name} < {high:g}" if low > -math.inf else f"a finite {name}"
                raise HyperparameterError(
                    f"{type(optimizer).__name__}: {name}{path} is {tree.brief(item)}", f"{none}{inside}"
                )


def check_optimizer_field(owner: Bindable, name: str, value: Any) -> None:
    """Refuse what is no optimizer where one is to be held."""
    if not isinstance(value, Optimizer):
        got = f"{type(owner).__name__}: {name} is {tree.describe(value)}"
        raise OptimizerError(got, "a diffopt.Optimizer such as SGD(0.1)", hints.for_optimizer(value))


def check_one_number(owner: Bindable, name: str, value: Any) -> None:
    """Refuse a hyperparameter that is more than one number at a step: a tree, or a tensor with axes."""
    scheduled = isinstance(value, Schedule)
    inner = value.values if scheduled else value
    axes = inner.ndim - scheduled if isinstance(inner, Tensor) else 0
    listed = scheduled and isinstance(inner, list | tuple) and not any(isinstance(x, Tensor) for x in inner)
    if axes > 0 or not (listed or isinstance(inner, Tensor | int | float | None)):
        raise HyperparameterError(
            f"{type(owner).__name__}: {name} is {tree.describe(inner)}",
            "one number for all parameters: a float, a scalar tensor or a Schedule of them",
            "for numbers of their own, give each group an optimizer: diffopt.Groups",
        )


def check_eps(optimizer: Any, params: Sequence[Tensor]) -> None:
    """Refuse an ``eps`` that is 0 in the dtype of a parameter, where a gradient of 0 would be divided by 0."""
    eps = optimizer.eps
    for dtype in dict.fromkeys(x.dtype for x in params):
        least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # half of which rounds to 0
        if isinstance(eps, int | float) and 0 < eps <= least / 2:
            raise HyperparameterError(
                f"{type(optimizer).__name__}: eps is {eps!r}, which is 0 in {dtype}",
                f"a number above {least:.0e}",
                "a coordinate without gradient would become NaN. Give a larger eps, or params in another dtype",
            )


def is_zero(value: Hyperparameter) -> bool:
    """Whether a hyperparameter is the number 0, so that its term can be left out (a tensor never counts as 0)."""
    return isinstance(value, int | float) and value == 0


def decayed(grads: Leaves, params: Leaves, weight_decay: Hyperparameter, maximize: bool = False) -> Leaves:
    """``d = g + weight_decay * params``, the descent direction with L2 decay folded in."""
    grads = -grads if maximize else grads
    return grads if is_zero(weight_decay) else grads + weight_decay * params
