"""A state written into a live ``torch.optim`` optimizer: all of it is looked at before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from diffopt.errors import OptimizerError, ShapeError, StructureError
from diffopt.lifting.live_names import GROUP, KEYS, class_name, counterpart, group_of, keys_of
from diffopt.tensors import tree
from diffopt.tensors.arguments import check_instance
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.like_params import buffer_leaves


@final
@dataclass(frozen=True)
class _Live:
    """The optimizer and its parameters, each with its group and a look at its store (which must not be made by it)."""

    optimizer: torch.optim.Optimizer
    targets: list[Tensor]
    groups: list[dict[str, Any]]
    stores: list[Mapping[str, Any]]

    @property
    def name(self) -> str:
        """Of the class."""
        return class_name(self.optimizer)

    @property
    def exact(self) -> bool:
        """Whether it is a known class and no subclass."""
        return type(self.optimizer) in KEYS


def write(params: Any, buffers: Mapping[str, Any], step: int, optimizer: Any, held: Any) -> None:
    """Copy a state into an optimizer and its parameters, in place."""
    check_instance("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim optimizer", OptimizerError)
    leaves, structure = tree.flatten(params)
    targets = _targets(params, optimizer, held)
    paths = tree.paths(structure)
    for target, leaf, path in zip(targets, leaves, paths, strict=True):
        if not isinstance(leaf, Tensor) or target.shape != leaf.shape:
            raise ShapeError(
                f"params{path} has shape {tuple(getattr(leaf, 'shape', ()))}: {tree.describe(leaf)}",
                f"{tuple(target.shape)}, as the parameter of {class_name(optimizer)} in its place",
                "pass the parameters as a tree: state.into(optimizer, params)",
            )
    groups = [group_of(optimizer, x, f"params{path}") for x, path in zip(targets, paths, strict=True)]
    live = _Live(optimizer, targets, groups, [optimizer.state.get(x, {}) for x in targets])
    if not isinstance(buffers, Mapping):
        raise OptimizerError(f"the state's buffers are {tree.describe(buffers)}", "a dict from name to tree")
    keys = _keys(live, buffers, step)
    values = {keys[name]: buffer_leaves(name, buffer, structure)[0] for name, buffer in buffers.items()}
    places = {key: _places(live, key, found) for key, found in values.items()}
    with torch.no_grad():
        for target, leaf in zip(targets, leaves, strict=True):
            target.copy_(leaf)
        if live.exact or step:
            _write_buffers(live, values, places, step)


def _keys(live: _Live, buffers: Mapping[str, Any], step: int) -> dict[str, str]:
    """What the optimizer calls each of the buffers, which must be those that it keeps."""
    names = keys_of(live.optimizer)
    if live.exact or (names and all(name in names for name in buffers)):
        # spelled as ours, or as a lifted known class has them; no two of them may be one
        keys = {name: names.get(name, name) for name in buffers}
        for group in live.groups:
            ours = counterpart(live.optimizer, group)
            made = {} if ours is None else ours.init(Leaves([torch.zeros((), dtype=torch.float64)]))
            expected = sorted(names[name] for name in made)
            if sorted(keys.values()) != expected:
                _refuse(live, buffers, f"those of {type(ours).__name__} with its options: {sorted(made)}")
    else:
        keys = {name: name for name in buffers}
    if not live.exact and (keys or not names):
        _refuse_unready(live, step)
    if not live.exact and any(live.stores):
        _compare_with_store(live, buffers, set(keys.values()))
    return keys


def _refuse_unready(live: _Live, step: int) -> None:
    """What another class keeps before its first step it alone knows, and what after it is there after one only."""
    if step and not all(live.stores):
        raise OptimizerError(
            f"{live.name} has not made a step yet", "one that has, so that its state is there", "call step() once"
        )
    if step == 0 and any(store and int(store.get("step", 1)) != 0 for store in live.stores):
        raise OptimizerError(
            f"the state is one before the first step, and {live.name} has made steps",
            "one that has not",
            "make the optimizer anew",
        )


def _compare_with_store(live: _Live, buffers: Mapping[str, Any], keys: set[str]) -> None:
    """Every floating tensor that is kept must be written, but the count of the steps, and every buffer be kept."""
    kept = {key for store in live.stores for key, x in store.items() if isinstance(x, Tensor) and x.is_floating_point()}
    there = {key for store in live.stores for key in store}
    there |= {f"{GROUP}{key}" for key in set.intersection(*[set(group) for group in live.groups])}
    if not (kept - {"step"} <= keys <= there):
        _refuse(live, buffers, f"those that {live.name} keeps: {sorted(kept - {'step'})}")


def _refuse(live: _Live, buffers: Mapping[str, Any], expected: str) -> None:
    raise OptimizerError(
        f"the state's buffers are {sorted(map(str, buffers))}, and the optimizer is {live.name}",
        expected,
        "write the state into an optimizer of the kind and options that it is of; if only its params are meant, copy "
        "them: p.copy_(x) under torch.no_grad()",
    )


def _places(live: _Live, key: str, values: Sequence[Any]) -> list[int]:
    """Which of the parameters keep a buffer, as many as there are values of it, with the shapes of these."""
    every = range(len(live.targets))
    if key.startswith(GROUP):
        numbers = {float(x) for x in values if isinstance(x, Tensor) and x.numel() == 1}
        if len(numbers) != 1:
            _refuse_values(live, key, values, "one number, which all its param groups have")
        return []
    places = [i for i in every if live.exact or key in live.stores[i]]
    shapes = [x.shape if isinstance(x, Tensor) else None for x in values]
    expected = []
    for i in places:
        old = live.stores[i].get(key)
        lifted = not live.exact and old is not None
        expected.append((old.shape if isinstance(old, Tensor) else torch.Size()) if lifted else live.targets[i].shape)
    if shapes != expected and (live.exact or any(live.stores)):
        _refuse_values(live, key, values, f"tensors of shapes {list(map(tuple, expected))}")
    return places


def _refuse_values(live: _Live, key: str, values: Sequence[Any], expected: str) -> None:
    raise OptimizerError(
        f"the state's buffer for {key!r} of {live.name} is [{', '.join(map(tree.describe, values[:3]))}]",
        expected,
        "write it into an optimizer of the same parameters and options",
    )


def _write_buffers(
    live: _Live, values: Mapping[str, Sequence[Tensor]], places: Mapping[str, Sequence[int]], step: int
) -> None:
    counts = not isinstance(live.optimizer, torch.optim.SGD)
    for key, found in values.items():
        if key.startswith(GROUP):
            for group in live.groups:
                name = key.removeprefix(GROUP)
                group[name] = _as_before(group[name], found[0])
        for i, value in zip(places[key], found, strict=False):
            store = live.optimizer.state[live.targets[i]]
            if step == 0 and not counts:
                store.pop(key, None)  # the first step is not dampened
            elif live.exact or store.get(key) is None:
                store[key] = value.detach().clone().to(live.targets[i])
            else:
                store[key] = _as_before(store[key], value)
    for target, group in zip(live.targets, live.groups, strict=True):
        store = live.optimizer.state[target] if live.exact and counts else live.optimizer.state.get(target, {})
        if "step" not in values and ("step" in store or (live.exact and counts)):
            store["step"] = _as_before(store["step"], step) if "step" in store else _new_count(step, target, group)


def _as_before(old: Any, value: Any) -> Any:
    """A copy in the dtype and on the device of what was there; a Python number where there was one."""
    if not isinstance(old, Tensor):
        return int(value) if isinstance(value, int) and isinstance(old, int) else float(value)
    if isinstance(value, int):
        return torch.full_like(old, value)
    return value.detach().clone().reshape(old.shape).to(old)


def _new_count(step: int, target: Tensor, group: Mapping[str, Any]) -> Tensor:
    """The count of a parameter that has not been stepped, where and as ``torch.optim`` makes it."""
    fused = bool(group.get("fused"))
    double = torch.get_default_dtype() == torch.float64 and not fused
    device = target.device if fused or group.get("capturable") else "cpu"
    return torch.tensor(float(step), dtype=torch.float64 if double else torch.float32, device=device)


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
            group_of(optimizer, target, f"params{path}")
        return targets
    targets = [x for group in optimizer.param_groups for x in group["params"]]
    names = [name for group in optimizer.param_groups for name in group.get("param_names", ())]
    if len(targets) != len(leaves):
        raise StructureError(
            f"{class_name(optimizer)} holds {len(targets)} parameters",
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
