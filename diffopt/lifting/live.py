"""The state of a live ``torch.optim`` optimizer, read as the buffers of one of ours, and written back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt.errors import OptimizerError, ShapeError, StructureError
from diffopt.optimizers.adagrad import Adagrad
from diffopt.optimizers.adam import Adam, AdamW
from diffopt.optimizers.base import Optimizer
from diffopt.optimizers.rmsprop import RMSprop
from diffopt.optimizers.sgd import SGD
from diffopt.tensors import tree
from diffopt.tensors.arguments import check_instance
from diffopt.tensors.leaves import Leaves

_ADAM = {"mean": "exp_avg", "square": "exp_avg_sq", "largest_square": "max_exp_avg_sq"}
_KEYS: dict[type, dict[str, str]] = {
    torch.optim.SGD: {"velocity": "momentum_buffer"},
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.RMSprop: {"square": "square_avg", "mean": "grad_avg", "velocity": "momentum_buffer"},
    torch.optim.Adagrad: {"square": "sum"},
}
"""By class: what it calls the buffers of ours. Where there is no entry both have one name, as lifted optimizers do."""
_GROUP = "group "
"""How the names of buffers begin that a lifted optimizer keeps in its param groups."""


def read(optimizer: Any, params: Any, like: Any) -> tuple[Any, dict[str, Any], int]:
    """Copies of the params, of the buffers by name, and the number of steps made."""
    check_instance("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim optimizer", OptimizerError)
    leaves, structure = tree.flatten(params)
    groups = [
        _group_of(optimizer, leaf, f"params{path}") for path, leaf in zip(tree.paths(structure), leaves, strict=True)
    ]
    ours = _like(optimizer, groups) if like is None else like
    check_instance("like", ours, Optimizer, "a diffopt.Optimizer", OptimizerError)
    copies = [x.detach().clone() for x in leaves]
    made = ours.init(Leaves(copies))
    stores: list[Mapping[str, Any]] = [optimizer.state.get(x, {}) for x in leaves]
    names = _KEYS.get(type(optimizer), {})
    step = _steps_made(optimizer, stores, [names.get(name, name) for name in made], tree.paths(structure))
    buffers: dict[str, Any] = {}
    for name, initial in made.items():
        key = names.get(name, name)
        if name.startswith(_GROUP):
            found = [groups[0].get(key.removeprefix(_GROUP))] * len(initial)
        else:
            found = [store.get(key) for store in stores] if step else list(initial)
        if len(found) != len(initial) or any(x is None for x in found):
            raise OptimizerError(
                f"{_name(optimizer)} keeps no {key!r} for each of params",
                f"the buffers of {type(ours).__name__}: {sorted(made)}",
                "pass like=, the diffopt optimizer with the options of this one",
            )
        tensors = [torch.as_tensor(x, dtype=y.dtype, device=y.device) for x, y in zip(found, initial, strict=True)]
        copied = [x.detach().clone() for x in tensors]
        buffers[name] = tree.unflatten(structure, copied) if len(copied) == len(leaves) else tuple(copied)
    return tree.unflatten(structure, copies), buffers, step


def _group_of(optimizer: torch.optim.Optimizer, leaf: Any, name: str) -> dict[str, Any]:
    for group in optimizer.param_groups:
        if any(leaf is held for held in group["params"]):
            return group
    raise OptimizerError(
        f"{name} is {tree.describe(leaf)}, which {_name(optimizer)} does not hold",
        "the parameter objects that the optimizer was made with",
        "pass dict(net.named_parameters()) of the module that it trains, not copies",
    )


def _like(optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]]) -> Optimizer:
    """One of ours with the buffers that the optimizer keeps."""
    kinds = [_options(optimizer, group) for group in groups]
    if kinds[0] is None:
        raise OptimizerError(
            f"the optimizer is {_name(optimizer)}",
            f"one of {sorted(kind.__name__ for kind in _KEYS)}, or like=",
            f"pass like=diffopt.from_torch(torch.optim.{_name(optimizer)}, ...), with which you go on",
        )
    if any(kind != kinds[0] for kind in kinds):
        raise OptimizerError(
            f"the param groups of {_name(optimizer)} keep different buffers", "the same for all of params", "pass like="
        )
    return kinds[0]


def _options(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> Optimizer | None:
    """What decides which buffers there are, and how they start."""
    kind = type(optimizer)
    if kind is torch.optim.SGD:
        return SGD(0.0, momentum=0.5 if group["momentum"] else 0.0)
    if kind in (torch.optim.Adam, torch.optim.AdamW):
        return (Adam if kind is torch.optim.Adam else AdamW)(amsgrad=group["amsgrad"])
    if kind is torch.optim.RMSprop:
        return RMSprop(momentum=0.5 if group["momentum"] else 0.0, centered=group["centered"])
    if kind is torch.optim.Adagrad:
        return Adagrad(initial_accumulator_value=group["initial_accumulator_value"])
    return None


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
            f"{_name(optimizer)} has made {counts[0]} steps on params{paths[0]}, {counts[other]} on {paths[other]}",
            "as many on each",
            "pass only those that are trained together",
        )
    return counts[0]


def write(params: Any, buffers: Mapping[str, Any], step: int, optimizer: Any, held: Any) -> None:
    """Copy a state into an optimizer and its parameters, in place."""
    check_instance("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim optimizer", OptimizerError)
    leaves, structure = tree.flatten(params)
    targets = _targets(params, optimizer, held)
    names = _KEYS.get(type(optimizer), {})
    found = {name: tree.flatten(value)[0] for name, value in buffers.items()}
    counts = type(optimizer) is not torch.optim.SGD
    for target, leaf, path in zip(targets, leaves, tree.paths(structure), strict=True):
        if target.shape != leaf.shape:
            raise ShapeError(
                f"params{path} has shape {tuple(leaf.shape)}",
                f"{tuple(target.shape)}, as the parameter of {_name(optimizer)} in its place",
                "pass the parameters as a tree: state.into(optimizer, params)",
            )
        if not names and step and not optimizer.state[target]:
            raise OptimizerError(
                f"{_name(optimizer)} has not made a step yet",
                "one that has, so that its state is there",
                "call step() once",
            )
    with torch.no_grad():
        for i, (target, leaf) in enumerate(zip(targets, leaves, strict=True)):
            target.copy_(leaf)
            store = optimizer.state[target]
            for name, values in found.items():
                key = names.get(name, name)
                if name.startswith(_GROUP):
                    for group in optimizer.param_groups:
                        group[key.removeprefix(_GROUP)] = float(values[0])
                elif step == 0 and not counts:
                    store.pop(key, None)
                else:
                    store[key] = values[i].detach().clone().to(target.device)
            if counts and (names or "step" in store):
                store["step"] = torch.tensor(float(step), dtype=torch.get_default_dtype())


def _targets(params: Any, optimizer: torch.optim.Optimizer, held: Any) -> list[Tensor]:
    """The optimizer's parameters in the order of the leaves of ``params``."""
    leaves, structure = tree.flatten(params)
    if held is not None:
        try:
            targets = tree.flatten_up_to(structure, held)
        except ValueError as error:
            raise StructureError(
                f"params is {tree.describe(held)}",
                "a tree like the state's params",
                "pass the live parameters in its form",
            ) from error
        for path, target in zip(tree.paths(structure), targets, strict=True):
            _group_of(optimizer, target, f"params{path}")
        return targets
    targets = [x for group in optimizer.param_groups for x in group["params"]]
    names = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
    if len(targets) != len(leaves):
        raise StructureError(
            f"{_name(optimizer)} holds {len(targets)} parameters",
            f"the {len(leaves)} of the state",
            "pass the parameters as a tree: state.into(optimizer, params)",
        )
    if isinstance(params, Mapping) and set(names) == set(params):
        by_name = dict(zip(names, targets, strict=True))
        return tree.flatten({name: by_name[name] for name in params})[0]
    # a tree's leaves are in the order of sorted keys; the optimizer's in the order in which a user wrote them
    order = tree.in_order_of_writing(params)
    placed = dict(zip(order, targets, strict=True))
    return [placed[i] for i in range(len(leaves))]


def _name(optimizer: Any) -> str:
    return type(optimizer).__name__
