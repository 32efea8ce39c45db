"""All steps as plain differentiable code, for estimators that leave the derivative to autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffopt.errors import DiffoptError, EstimatorError
from diffopt.rollout.along import NEVER, Stop
from diffopt.rollout.checks import Checks
from diffopt.rollout.divergence import refuse_divergence
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.field import as_written
from diffopt.rollout.inputs import Inputs
from diffopt.rollout.problem import Outcome, Problem
from diffopt.rollout.ranks import refuse_other_cotangents
from diffopt.rollout.record import Record, Rollout, Watch
from diffopt.rollout.refusals import apart_from, is_imprecise, refuse_bad_start, refuse_non_finite, warn_of_precision
from diffopt.tensors import autograd_graph, derivatives, transforms
from diffopt.tensors.leaves import Leaves, all_finite
from diffopt.tensors.spread import placed_alike
from diffopt.tensors.torch_errors import changed_in_place, no_tangent_error


def unroll(problem: Problem) -> Outcome:
    """Run all steps as plain differentiable code, under whatever records or transforms the caller.

    Under vmap the steps run below it on stacked tensors, as those of an :class:`Adjoint` do; under another transform
    the inner gradient is ``torch.func``'s, else plain autograd's.
    """
    inputs, layout = problem.inputs, problem.dynamics.layout
    vmap = transforms.innermost_vmap()
    if vmap is not None:
        refuse_stopping(problem.stop)
        lower = partial(_unroll_below, problem, transforms.transform_level())
        record = Record()
        found = transforms.below_vmap(partial(lower, record), vmap, inputs.flat)
        count = layout.state_count
        return Outcome(tuple(found[:count]), tuple(found[count:]), record)
    if problem.check and not transforms.transforms_active():
        inputs = Inputs(*(Leaves(map(_refusing_non_finite, part)) for part in inputs))
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in inputs.flat)
    if problem.check and recorded and is_imprecise(problem.dynamics, inputs.params):
        warn_of_precision(problem.dynamics, inputs.params)
    watch = Watch(values=problem.check, levels=problem.popped)
    with derivatives.named_in_place_changes():
        final, along, enough = roll_out_recorded(problem.dynamics, inputs, watch, problem.stop)
    # without a step, what comes out is still not the caller's own tensor
    steps = along[0].shape[-1]
    updates = problem.dynamics.until(steps).layout.inner_steps
    state = tuple(final) if steps else tuple(x.clone() for x in final)
    return Outcome(state, along, Record(rollout=Rollout(steps=steps, updates=updates, enough=enough)))


def roll_out_recorded(
    dynamics: Dynamics, inputs: Inputs, watch: Watch, stop: Stop = NEVER
) -> tuple[Leaves, tuple[Tensor, ...], Tensor | None]:
    """Run all steps as plain code that whatever surrounds the caller records.

    Returns the final state, what was handed out along the way, and whether each task's gradient was small enough.
    """
    layout, now, rows, largest, enough = dynamics.layout, inputs.state, [], [], None
    nothing: list[Tensor] = []
    checks = Checks(dynamics, watch, passes_tangents=True) if watch else None
    ranks = None if checks is None or transforms.transforms_active() else checks.ranks
    # (torch.func.jvp differentiates under no_grad, too)
    recorded = torch.is_grad_enabled() or transforms.in_dual_level() or transforms.transforms_active()
    for step in range(1, layout.steps + 1):
        read, hyperparameters = layout.at_step(inputs, step)
        before = params = layout.params(now)
        aux: list[Tensor] = []
        grads: Sequence[Tensor | None]
        levels = range(0) if checks is None else checks.levels_at(step)
        if transforms.transforms_active():
            grads, loss = apart_from(levels, _functional_gradient, dynamics, read, tuple(before), aux)
        else:
            with torch.enable_grad():
                # views, so that a tensor that is also an argument counts here as the params only
                params = Leaves([p.view_as(p) if p.requires_grad else p.detach().requires_grad_() for p in before])
                loss = (checks or dynamics).losses(params, read, step, aux)
                if ranks is None or step > 1:
                    grads = derivatives.gradient(loss, params, differentiable=recorded)
                else:
                    grads = ranks.gradient(loss, params, differentiable=recorded)
                if step == 1 and watch.values:
                    autograd_graph.refuse_broken_graph([g.grad_fn for g in grads if g is not None])
        if step == 1 and watch.values:
            refuse_bad_start(dynamics, loss, grads, params, read, differentiated=recorded)
        # (a sparse one, for which not every update is written, is not refused where nothing is recorded)
        dense = [g.to_dense() if g is not None and transforms.is_sparse(g) else g for g in grads]
        filled = derivatives.filled(dense, before)
        enough = stop.reached([transforms.plain(g) for g in filled], loss.ndim)
        if enough is not None and bool(enough.all()):
            if step == 1:  # what would have been handed out, of which there is nothing, says its form
                first = (loss, *_observed(dynamics, before, read, levels), *aux)
                nothing = [x.detach().unsqueeze(len(layout.levels)).narrow(len(layout.levels), 0, 0) for x in first]
            break
        now = dynamics.update(now, filled, hyperparameters, step)
        if ranks is not None and step == 1:
            ranks.refuse_other_updates(now)
        loss = loss if recorded and as_written(dynamics.loss) is dynamics.loss else loss.detach()
        rows.append((loss, *_observed(dynamics, layout.params(now), read, levels), *aux))
        if watch.values:
            # the largest number of each leaf, in one call: it is looked at only if the end is not finite
            largest.append(torch.stack(torch._foreach_norm([transforms.plain(x) for x in now if x.numel()], math.inf)))
        if stop.told(layout.first_update(step) + layout.length(step) - 1, transforms.plain(loss)):
            break
    axis = len(layout.levels)
    along = [torch.stack(placed_alike(table), dim=axis) for table in zip(*rows, strict=True)]
    along = along or nothing or [now[0].new_empty(*layout.tasks_shape, 0)]
    if watch.values:
        refuse_divergence(dynamics, inputs, along[0].detach(), now, (all_finite([x]) for x in largest))
    if ranks is not None and ranks.copied_to:
        found = _watched([*now, *along], ranks.copied_to)
        now, along = Leaves(found[: len(now)]), found[len(now) :]
    return now, tuple(along), enough


def _watched(tensors: Sequence[Tensor], copied_to: Sequence[Any]) -> list[Tensor]:
    """Aliases whose gradients are refused if they differ between the ranks that share a solve."""
    found = list(tensors)
    places = [i for i, x in enumerate(tensors) if torch.is_grad_enabled() and x.requires_grad]
    if places:
        aliases = transforms.apply(_Watched, copied_to, *(tensors[i] for i in places))
        for i, x in zip(places, aliases, strict=True):
            found[i] = x
    return found


class _Watched(torch.autograd.Function):
    """``(groups, x, ...) -> (x, ...)``: one node for all, so that all ranks compare, whatever an outer loss uses."""

    @staticmethod
    def forward(copied_to: Sequence[Any], *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple([x.view_as(x) for x in tensors])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.copied_to = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        refuse_other_cotangents(ctx.copied_to, cotangents)
        return None, *cotangents

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tuple([x.view_as(x) for x in tangents[1:]])


def _observed(dynamics: Dynamics, params: Leaves, read: Leaves, levels: range) -> Sequence[Tensor]:
    if dynamics.observer is None:
        return ()
    versions = [transforms.version(x) for x in params]
    found = apart_from(levels, dynamics.observed, params, read) if levels else dynamics.observed(params, read)
    observed: Sequence[Tensor] = found
    if versions != [transforms.version(x) for x in params]:
        raise changed_in_place()
    return observed


def _functional_gradient(
    dynamics: Dynamics, read: Sequence[Tensor], params: tuple[Tensor, ...], aux: list[Tensor]
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """The gradient by ``torch.func``, and the losses; to ``aux`` goes what the loss returns besides."""

    def function(*params: Tensor) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        return dynamics.losses(params, read, aux=found), *found

    try:
        grads, (losses, *besides) = transforms.functional_gradient(function, params)
    except RuntimeError as error:
        named = None if isinstance(error, DiffoptError) else no_tangent_error(error)
        if named is None:
            raise
        raise named from error
    aux += besides
    return grads, losses


def _unroll_below(
    problem: Problem,
    level: int,
    record: Record,
    vmap: transforms.Vmap,
    dims: tuple[int | None, ...],
    tensors: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Unroll outside the innermost vmap, the transform number ``level``: stacked, unless its tasks share everything."""
    dynamics = problem.dynamics
    if any(dim is not None for dim in dims):
        own = frozenset(range(dynamics.layout.state_count))
        tensors, dims = transforms.stacked(tensors, dims, vmap.batch_size, own)
        dynamics = dynamics.batched(dynamics.layout.level(vmap, dims))
    popped = range(level, problem.popped.stop or level + 1) if problem.check else range(0)
    outcome = unroll(Problem(dynamics, dynamics.layout.inputs(tensors), problem.check, popped))
    record.rollout = outcome.record.rollout
    return (*outcome.state, *outcome.along)


def refuse_stopping(stop: Stop) -> None:
    """Refuse what may end a rollout early where tasks are unrolled together."""
    if stop != NEVER:
        raise EstimatorError(
            "tol or on_step with Unrolled under vmap",
            "an estimator that sees all tasks as one problem",
            "use Reverse()",
        )


def _refusing_non_finite(tensor: Tensor) -> Tensor:
    """An alias whose gradient is refused if it is not finite, as an estimator's result is."""
    if not (torch.is_grad_enabled() and tensor.requires_grad):
        return tensor
    alias = tensor.view_as(tensor)
    alias.register_hook(_refuse_non_finite_gradient)  # type: ignore[no-untyped-call]
    return alias


def _refuse_non_finite_gradient(gradient: Tensor) -> Any:
    if gradient is None or transforms.transforms_active() or transforms.grads_batched():
        return
    if not all_finite([gradient]):
        refuse_non_finite(())
