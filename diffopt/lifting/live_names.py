"""What the classes of ``torch.optim`` call the buffers of ours, and which of them an instance keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffopt.errors import OptimizerError
from diffopt.optimizers.adagrad import Adagrad
from diffopt.optimizers.adam import Adam, AdamW
from diffopt.optimizers.base import Optimizer
from diffopt.optimizers.rmsprop import RMSprop
from diffopt.optimizers.sgd import SGD
from diffopt.tensors import tree

_ADAM = {"mean": "exp_avg", "square": "exp_avg_sq", "largest_square": "max_exp_avg_sq"}
KEYS: dict[type, dict[str, str]] = {
    torch.optim.SGD: {"velocity": "momentum_buffer"},
    torch.optim.AdamW: _ADAM,  # before Adam, of which it may be a subclass
    torch.optim.Adam: _ADAM,
    torch.optim.RMSprop: {"square": "square_avg", "mean": "grad_avg", "velocity": "momentum_buffer"},
    torch.optim.Adagrad: {"square": "sum"},
}
"""By class: what it calls the buffers of ours. Where there is no entry both have one name, as lifted optimizers do."""
GROUP = "group "
"""How the names of buffers begin that a lifted optimizer keeps in its param groups."""


def keys_of(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """What the class, or the known one that it is a subclass of, calls the buffers of ours."""
    return next((names for kind, names in KEYS.items() if isinstance(optimizer, kind)), {})


def counterpart(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> Optimizer | None:
    """One of ours with what decides which buffers there are in a param group, and how they start."""
    if isinstance(optimizer, torch.optim.SGD):
        return SGD(0.0, momentum=0.5 if group["momentum"] else 0.0)
    if isinstance(optimizer, torch.optim.AdamW):
        return AdamW(amsgrad=group["amsgrad"])
    if isinstance(optimizer, torch.optim.Adam):
        return Adam(amsgrad=group["amsgrad"])
    if isinstance(optimizer, torch.optim.RMSprop):
        return RMSprop(momentum=0.5 if group["momentum"] else 0.0, centered=group["centered"])
    if isinstance(optimizer, torch.optim.Adagrad):
        return Adagrad(initial_accumulator_value=group["initial_accumulator_value"])
    return None


def class_name(optimizer: Any) -> str:
    """For messages."""
    return type(optimizer).__name__


def group_of(optimizer: torch.optim.Optimizer, leaf: Any, name: str) -> dict[str, Any]:
    """The param group that holds a parameter.

    Raises:
        OptimizerError: none does.
    """
    for group in optimizer.param_groups:
        if any(leaf is held for held in group["params"]):
            return group
    raise OptimizerError(
        f"{name} is {tree.describe(leaf)}, which {class_name(optimizer)} does not hold",
        "the parameter objects that the optimizer was made with",
        "pass dict(net.named_parameters()) of the module that it trains, not copies",
    )
