"""``solve``: minimise an inner loss by a fixed number of steps, differentiable in everything that went in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar, final

import torch
from torch import Tensor

from diffopt.adjoint.estimator import Estimator, check_estimator, refuse_changes, versions
from diffopt.adjoint.reverse import Reverse
from diffopt.errors import GradModeError, LossError, OptimizerError
from diffopt.optimizers.base import Optimizer
from diffopt.optimizers.binding import BoundOptimizer, bind
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.given import (
    check_batches,
    checked_steps,
    params_leaves,
    refuse_frozen,
)
from diffopt.rollout.inputs import Flags, Inputs
from diffopt.rollout.layout import Layout, Slot, names_of_read
from diffopt.rollout.problem import Outcome, Problem
from diffopt.rollout.record import Counts
from diffopt.rollout.record import Kept as Kept
from diffopt.tensors import hints, transforms, tree
from diffopt.tensors.arguments import check_flag, check_function
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.torch_errors import forward_mode_error
from diffopt.tensors.usable import usable_leaves

Params = TypeVar("Params")


class State(NamedTuple):
    """The optimizer's state: the parameters and its buffers by name, each shaped like the parameters."""

    params: Any
    buffers: dict[str, Any]


@final
@dataclass(frozen=True)
class Solution(Generic[Params]):
    """What :func:`solve` returns.

    Attributes:
        params: final inner parameters, a tree like the initial ones; differentiable in params, args, batches and the
            optimizer's tensors.
        state: final optimizer state (params and buffers), differentiable too.
        losses: inner losses before each step, shape ``[steps]``, detached.
        kept: what was stored for the backward pass.
        counts: gradients and curvature products computed, per task; the backward pass adds to it.
        diagnostics: what the estimator reports of its own quality, by name; the backward pass fills it in.
    """

    params: Params
    state: State
    losses: Tensor
    kept: Kept
    counts: Counts
    diagnostics: dict[str, Tensor]


@transforms.outside_compile
def solve(
    loss: Callable[..., Tensor],
    params: Params,
    *args: Any,
    optimizer: Optimizer,
    steps: int,
    batches: Any = None,
    estimator: Estimator | None = None,
    check: bool = True,
    compile: bool = False,
) -> Solution[Params]:
    r"""Run ``steps`` steps of ``optimizer`` on ``loss`` from ``params``, with a hypergradient by ``estimator``.

    .. math:: s_{t+1} = \Phi_t(s_t) = U(s_t, \nabla_{params}\, loss(params_t, *args); \eta), \qquad t = 1, \dots, T

    Nothing is declared to be a meta-parameter: whatever requires grad, or is differentiated by ``torch.func``, gets
    its hypergradient. Works under ``torch.func.grad``, ``vmap`` (over tasks) and their compositions.

    Args:
        loss: ``loss(params, *args)``, with ``batches`` ``loss(params, *args, batch)``; returns a floating scalar. It
            must get every tensor that is to have a hypergradient through its arguments, not by closure. Or a
            :class:`diffopt.VectorField`, whose value is used where the gradient is.
        params: where the inner problem starts: a tree of floating tensors.
        args: whatever else the loss reads: trees of tensors of any dtype and of other values.
        optimizer: the update rule, such as :class:`diffopt.SGD`; its tensor fields are differentiable.
        steps: number of inner steps ``T``.
        batches: a tree of tensors with a leading axis of length ``steps``; step ``t`` sees entry ``t - 1``.
        estimator: how the backward pass is computed; default: exact, :class:`diffopt.estimators.Reverse`.
        check: refuse, at once and by a typed error, non-finite losses, states and hypergradients, losses that do not
            depend on ``params``, tensors captured by closure, operations without a second derivative, and what is
            changed in place. Costs a few synchronisations on a GPU. (:func:`diffopt.check` looks closer, once.)
        compile: compile a step and its pullback (seconds, once for a loss, optimizer and shapes), for small models
            whose time is overhead. ``loss`` must then be one function that lives on, and what it reads besides its
            arguments is frozen; an update may calculate with the number of its step, but not branch on it. Used by
            steps that are taken without their graph and, where the estimator is exact or truncated, in the backward
            pass, which then keeps every state, or every k-th where the estimator says so (``Reverse("sqrt")``). What
            cannot be compiled runs without, with a :class:`diffopt.CompileWarning`.

    Returns:
        A :class:`Solution`.

    Raises:
        LossError: the loss is not one floating scalar.
        NonFiniteLossError, DivergenceError: it is not finite at the start, or later.
        DisconnectedError, CapturedTensorError: it ignores ``params``, or reads tensors it was not given.
        InPlaceError, VmapError: it writes into what it is given, or cannot run under the vmap around the call.
        LeafError: ``params`` has a leaf that is not a floating, non-empty tensor.
        StepsError, BatchesError, OptimizerError, EstimatorError: the argument named is not what was expected.
        StructureError, ShapeError, DtypeError, DeviceError: a hyperparameter does not fit ``params``.

    Example:
        The learning rate's hypergradient for one step on ``w**2`` is ``-2w * 2 (w - 0.1 * 2w)``.

        >>> import torch, diffopt
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> w = torch.tensor(1.0)
        >>> solution = diffopt.solve(lambda w: w**2, w, optimizer=diffopt.SGD(lr), steps=1)
        >>> (solution.params**2).backward()
        >>> lr.grad
        tensor(-3.2000)
    """
    rule = _EXACT if estimator is None else estimator
    check_estimator(rule)
    check_flag("compile", compile)
    problem = checked_problem(loss, params, args, optimizer, steps, batches, check)
    if compile:
        problem = replace(problem, dynamics=replace(problem.dynamics, compile=True))
    before = versions(problem)
    outcome = rule.run(problem)
    refuse_changes(problem, before)
    return _solution(problem.dynamics.layout, outcome)


_EXACT = Reverse()


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
    leaves, structure = params_leaves(params)
    if check:
        refuse_frozen(leaves, structure)
    bound = bind(optimizer, leaves, structure, steps)
    buffers = _initial_buffers(bound, leaves)
    args_leaves, args_structure, read, stepped = _read(args, batches, steps)
    layout = Layout(
        inner_steps=steps,
        params_structure=structure,
        params_count=len(leaves),
        buffers_layout=tuple([(name, len(buffer)) for name, buffer in buffers.items()]),
        args_leaves=args_leaves,
        args_structure=args_structure,
        has_batches=batches is not None,
        stepped=Flags(stepped, bound.scheduled),
        optimizer_name=type(bound.template).__name__,
    )
    if transforms.has_tangent([*leaves, *read, *bound.tensors]):
        raise forward_mode_error()
    state = [leaf for buffer in buffers.values() for leaf in buffer]
    inputs = Inputs(Leaves(leaves), Leaves(state), Leaves(read), Leaves(bound.tensors))
    return Problem(Dynamics(layout, loss, bound), inputs, check)


def _initial_buffers(bound: BoundOptimizer, leaves: list[Tensor]) -> dict[str, Leaves]:
    params = Leaves(leaves)
    now = [x[0] if scheduled and len(x) else x for x, scheduled in zip(bound.tensors, bound.scheduled, strict=True)]
    buffers = bound.at(1, params, now).init(params)
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


def _read(
    args: tuple[Any, ...], batches: Any, steps: int
) -> tuple[tuple[Any, ...], tree.Structure, list[Tensor], tuple[bool, ...]]:
    """What the loss reads: leaves with a slot for each tensor, their structure, the tensors, which run over steps."""
    leaves, structure = tree.flatten((args, batches))
    leaves = usable_leaves(leaves, lambda: names_of_read(structure))
    first_batch = len(leaves)
    if batches is not None:
        check_batches(batches, steps)
        first_batch = len(tree.flatten(args)[0])
    tensors: list[Tensor] = []
    stepped: list[bool] = []
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            leaves[i] = Slot(len(tensors))
            tensors.append(leaf)
            stepped.append(i >= first_batch and batches is not None)
    return tuple(leaves), structure, tensors, tuple(stepped)


def _solution(layout: Layout, outcome: Outcome) -> Solution[Any]:
    structure, (params, buffers) = layout.params_structure, layout.split(outcome.state)
    named = {
        name: tree.unflatten(structure, buffer) if len(buffer) == len(params) else tuple(buffer)
        for name, buffer in buffers.items()
    }
    final, record = tree.unflatten(structure, params), outcome.record
    return Solution(final, State(final, named), outcome.losses, record.kept, record.counts, record.diagnostics)
