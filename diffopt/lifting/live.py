"""The state of a live ``torch.optim`` optimizer, read as the buffers of one of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diffopt.errors import OptimizerError
from diffopt.lifting.lifted_class import LiftedClass
from diffopt.lifting.live_names import GROUP, KEYS, class_name, counterpart, group_of, keys_of
from diffopt.optimizers.base import Optimizer
from diffopt.tensors import tree
from diffopt.tensors.arguments import check_instance
from diffopt.tensors.leaves import Leaves


def read(optimizer: Any, params: Any, like: Any) -> tuple[Any, dict[str, Any], int]:
    """Copies of the params, of the buffers by name, and the number of steps made."""
    check_instance("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim optimizer", OptimizerError)
    leaves, structure = tree.flatten(params)
    groups = [
        group_of(optimizer, leaf, f"params{path}") for path, leaf in zip(tree.paths(structure), leaves, strict=True)
    ]
    ours = _like(optimizer, groups) if like is None else like
    check_instance("like", ours, Optimizer, "a diffopt.Optimizer", OptimizerError)
    copies = [x.detach().clone() for x in leaves]
    made = ours.init(Leaves(copies))
    stores: list[Mapping[str, Any]] = [optimizer.state.get(x, {}) for x in leaves]
    names = {} if isinstance(ours, LiftedClass) else keys_of(optimizer)  # a lifted class has its own names
    step = _steps_made(optimizer, stores, [names.get(name, name) for name in made], tree.paths(structure))
    buffers: dict[str, Any] = {}
    for name, initial in made.items():
        key = names.get(name, name)
        if name.startswith(GROUP):
            found = [groups[0].get(key.removeprefix(GROUP))] * len(initial)
        else:
            found = [store.get(key) for store in stores] if step else list(initial)
        if len(found) != len(initial) or any(x is None for x in found):
            raise OptimizerError(
                f"{class_name(optimizer)} keeps no {key!r} for each of params",
                f"the buffers of {type(ours).__name__}: {sorted(made)}",
                "pass like=, the diffopt optimizer with the options of this one",
            )
        tensors = [torch.as_tensor(x, dtype=y.dtype, device=y.device) for x, y in zip(found, initial, strict=True)]
        copied = [x.detach().clone() for x in tensors]
        buffers[name] = tree.unflatten(structure, copied) if len(copied) == len(leaves) else tuple(copied)
    return tree.unflatten(structure, copies), buffers, step


def _like(optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]]) -> Optimizer:
    """One of ours with the buffers that the optimizer keeps."""
    kinds = [counterpart(optimizer, group) if type(optimizer) in KEYS else None for group in groups]
    if kinds[0] is None:
        raise OptimizerError(
            f"the optimizer is {class_name(optimizer)}",
            f"one of {sorted(kind.__name__ for kind in KEYS)}, or like=",
            f"pass like=diffopt.from_torch(torch.optim.{class_name(optimizer)}, ...), with which you go on",
        )
    if any(kind != kinds[0] for kind in kinds):
        raise OptimizerError(
            f"the param groups of {class_name(optimizer)} keep different buffers",
            "the same for all of params",
            "pass like=",
        )
    return kinds[0]


def _steps_made(
    optimizer: torch.optim.Optimizer, stores: Sequence[Mapping[str, Any]], keys: Sequence[str], paths: Sequence[str]
) -> int:
    """How many steps it has made on the params; one for any number where it does not count."""
    counts = [
        int(store["step"]) if "step" in store else int(any(store.get(k) is not None for k in keys)) for store in stores
    ]
    other = next((i for i, count in enumerate(counts) if count != counts[0]), None)
    if other is not None:
        raise OptimizerError(
            f"{class_name(optimizer)} made {counts[0]} steps on params{paths[0]}, {counts[other]} on {paths[other]}",
            "as many on each",
            "pass only those that are trained together",
        )
    return counts[0]
