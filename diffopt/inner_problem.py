"""The inner problem that :func:`diffopt.solve` is given, taken apart and checked before its loss runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffopt.errors import GradModeError, LossError, OptimizerError
from diffopt.optimizers.binding import BoundOptimizer, bind
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.given import checked_steps, params_leaves, refuse_frozen
from diffopt.rollout.inputs import Flags, Inputs
from diffopt.rollout.layout import Layout
from diffopt.rollout.problem import Problem
from diffopt.rollout.reading import what_is_read
from diffopt.state import State
from diffopt.tensors import hints, transforms, tree
from diffopt.tensors.arguments import check_flag, check_function
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.like_params import buffer_leaves
from diffopt.tensors.torch_errors import forward_mode_error
from diffopt.tensors.usable import usable_leaves


def checked_problem(
    loss: Callable[..., Tensor],
    params: Any,
    args: tuple[Any, ...],
    optimizer: Any,
    steps: Any,
    batches: Any,
    check: bool,
) -> Problem:
    """Flatten what :func:`solve` is given and check all that can be checked without running the loss."""
    steps = checked_steps(steps)
    check_flag("check", check)
    if torch.is_inference_mode_enabled():
        raise GradModeError(
            "solve was called in torch.inference_mode",
            "a mode that allows inner gradients",
            f"use torch.no_grad(){hints.in_inference_mode()}",
        )
    check_function("loss", loss, "a function loss(params, *args)", LossError)
    start, given = (params.step, params) if isinstance(params, State) else (0, None)
    leaves, structure = params_leaves(params if given is None else given.params)
    if check:
        refuse_frozen(leaves, structure)
    bound = bind(optimizer, leaves, structure, start + steps)
    buffers = _initial_buffers(bound, leaves, start)
    if given is not None:
        buffers = _given_buffers(given, buffers, bound, structure)
    reading = what_is_read(args, batches, start, steps, leaves[0].device)
    layout = Layout(
        inner_steps=steps,
        params_structure=structure,
        params_count=len(leaves),
        buffers_layout=tuple([(name, len(buffer)) for name, buffer in buffers.items()]),
        args_leaves=reading.leaves,
        args_structure=reading.structure,
        has_batches=batches is not None,
        stepped=Flags(reading.stepped, bound.scheduled),
        optimizer_name=type(bound.template).__name__,
        start=start,
        stream=reading.stream,
    )
    flat = [leaf for buffer in buffers.values() for leaf in buffer]
    if transforms.has_tangent([*leaves, *flat, *reading.tensors, *bound.tensors]):
        raise forward_mode_error()
    inputs = Inputs(Leaves(leaves), Leaves(flat), Leaves(reading.tensors), Leaves(bound.tensors))
    return Problem(Dynamics(layout, loss, bound), inputs, check)


def _initial_buffers(bound: BoundOptimizer, leaves: list[Tensor], start: int) -> dict[str, Leaves]:
    params = Leaves(leaves)
    pairs = zip(bound.tensors, bound.scheduled, strict=True)
    now = [x[min(start, len(x) - 1)] if scheduled and len(x) else x for x, scheduled in pairs]
    buffers = bound.at(start + 1, params, now).init(params)
    name = type(bound.template).__name__
    if not isinstance(buffers, dict) or not all([isinstance(buffer, Leaves) for buffer in buffers.values()]):
        raise OptimizerError(f"{name}.init returned {tree.describe(buffers)}", "a dict from name to Leaves")
    for key, buffer in buffers.items():
        for leaf in buffer:
            if not leaf.is_floating_point():
                raise OptimizerError(
                    f"{name}.init returned {tree.describe(leaf)} in {key!r}",
                    "floating tensors",
                    "make a flag or a count a floating one (update is given the number of its step)",
                )
    return buffers


def _given_buffers(
    state: State[Any], made: dict[str, Leaves], bound: BoundOptimizer, structure: tree.Structure
) -> dict[str, Leaves]:
    """The buffers of a state, which are like those that the optimizer would have ``made``."""
    name, fix = type(bound.template).__name__, "go on with the optimizer that made the state, or anew from state.params"
    if not isinstance(state.buffers, Mapping) or set(state.buffers) != set(made):
        raise OptimizerError(
            f"the state's buffers are {tree.describe(state.buffers)}", f"those of {name}: {sorted(made)}", fix
        )
    buffers = {}
    for key, expected in made.items():
        leaves, names = buffer_leaves(key, state.buffers[key], structure)
        leaves = usable_leaves(leaves, names.copy)
        kinds = [(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else None for x in leaves]
        if kinds != [(x.shape, x.dtype, x.device) for x in expected]:
            raise OptimizerError(
                f"the state's buffer {key!r} is {tree.describe(state.buffers[key])}",
                f"tensors as {name} makes for these params, in shape, dtype and device: {expected}",
                fix,
            )
        buffers[key] = Leaves(leaves)
    return buffers
