"""What the optimizers share: checks of their options, and weight decay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt.errors import HyperparameterError
from diffopt.optimizers.base import Hyperparameter, Optimizer, Schedule
from diffopt.tensors import tree
from diffopt.tensors.leaves import Leaves

INFINITY = float("inf")


def check_range(optimizer: Optimizer, **ranges: tuple[float, float]) -> None:
    """Refuse float hyperparameters outside ``low <= value < high``; tensors are the caller's to keep in range."""
    for name, (low, high) in ranges.items():
        value = getattr(optimizer, name)
        leaves, structure = tree.flatten(value.values if isinstance(value, Schedule) else value)
        for path, item in zip(tree.paths(structure), leaves, strict=True):
            outside = isinstance(item, int | float) and not low <= as_float(item) < high
            if outside or isinstance(item, str | bool) or item is None:
                raise HyperparameterError(
                    f"{type(optimizer).__name__}: {name}{path} is {tree.brief(item)}, expected {low} <= {name} < {high}"
                )


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


def as_float(number: float) -> float:
    """A number as torch would take it: a Python integer beyond all floats is infinite."""
    try:
        return float(number)
    except OverflowError:
        return math.copysign(math.inf, number > 0 or -1)


def decayed(grads: Leaves, params: Leaves, weight_decay: Hyperparameter, maximize: bool = False) -> Leaves:
    """``d = g + weight_decay * params``, the descent direction with L2 decay folded in."""
    grads = -grads if maximize else grads
    return grads if is_zero(weight_decay) else grads + weight_decay * params
