"""All steps as plain differentiable code, for estimators that leave the derivative to autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffopt.rollout.checks import Checks
from diffopt.rollout.divergence import losses_at, refuse_divergence
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.inputs import Inputs
from diffopt.rollout.problem import Outcome, Problem
from diffopt.rollout.record import Record, Watch
from diffopt.rollout.refusals import apart_from, is_imprecise, refuse_bad_start, refuse_non_finite, warn_of_precision
from diffopt.tensors import autograd_graph, derivatives, transforms
from diffopt.tensors.leaves import Leaves, all_finite


def unroll(problem: Problem) -> Outcome:
    """Run all steps as plain differentiable code, under whatever records or transforms the caller.

    Under vmap the steps run below it on stacked tensors, as those of an :class:`Adjoint` do; under another transform
    the inner gradient is ``torch.func``'s, else plain autograd's.
    """
    inputs, layout = problem.inputs, problem.dynamics.layout
    vmap = transforms.innermost_vmap()
    if vmap is not None:
        lower = partial(_unroll_below, problem, transforms.transform_level())
        *state, losses = transforms.below_vmap(lower, vmap, inputs.flat)
        return Outcome(tuple(state), losses, Record())
    if problem.check and not transforms.transforms_active():
        inputs = Inputs(*(Leaves(map(_refusing_non_finite, part)) for part in inputs))
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in inputs.flat)
    if problem.check and recorded and is_imprecise(problem.dynamics, inputs.params):
        warn_of_precision(problem.dynamics, inputs.params)
    watch = Watch(values=problem.check, levels=problem.popped)
    with derivatives.named_in_place_changes():
        final, losses = roll_out_recorded(problem.dynamics, inputs, watch)
    # without a step, what comes out is still not the caller's own tensor
    return Outcome(tuple(final) if layout.steps else tuple(x.clone() for x in final), losses, Record())


def roll_out_recorded(dynamics: Dynamics, inputs: Inputs, watch: Watch) -> tuple[Leaves, Tensor]:
    """Run all steps as plain code that whatever surrounds the caller records; the final state and the losses."""
    layout, now, losses, largest = dynamics.layout, inputs.state, [], []
    checks = Checks(dynamics, watch, passes_tangents=True) if watch else None
    recorded = torch.is_grad_enabled() or transforms.in_dual_level()
    for step in range(1, layout.steps + 1):
        read, hyperparameters = layout.at_step(inputs, step)
        before = params = layout.params(now)
        grads: Sequence[Tensor | None]
        if transforms.transforms_active():
            function = partial(losses_at, dynamics, read)
            levels = range(0) if checks is None else checks.levels_at(step)
            grads, loss = apart_from(levels, transforms.functional_gradient, function, tuple(before))
        else:
            with torch.enable_grad():
                # views, so that a tensor that is also an argument counts here as the params only
                params = Leaves([p.view_as(p) if p.requires_grad else p.detach().requires_grad_() for p in before])
                loss = (checks or dynamics).losses(params, read, step)
                grads = derivatives.gradient(loss, params, differentiable=recorded)
                if step == 1 and watch.values:
                    autograd_graph.refuse_broken_graph([g.grad_fn for g in grads if g is not None])
        if step == 1 and watch.values:
            refuse_bad_start(dynamics, loss, grads, params, read)
        now = dynamics.update(now, derivatives.filled(grads, before), hyperparameters, step)
        losses.append(loss.detach())
        if watch.values:
            # the largest number of each leaf, in one call: it is looked at only if the end is not finite
            largest.append(torch.stack(torch._foreach_norm([transforms.plain(x) for x in now if x.numel()], math.inf)))
    table = torch.stack(losses, dim=-1) if losses else now[0].new_empty(0)
    if watch.values:
        refuse_divergence(dynamics, inputs, table, now, (all_finite([x]) for x in largest))
    return now, table


def _unroll_below(
    problem: Problem, level: int, vmap: transforms.Vmap, dims: tuple[int | None, ...], tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Unroll outside the innermost vmap, the transform number ``level``: stacked, unless its tasks share everything."""
    dynamics = problem.dynamics
    if any(dim is not None for dim in dims):
        own = frozenset(range(dynamics.layout.state_count))
        tensors, dims = transforms.stacked(tensors, dims, vmap.batch_size, own)
        dynamics = dynamics.batched(dynamics.layout.level(vmap, dims))
    popped = range(level, problem.popped.stop or level + 1) if problem.check else range(0)
    outcome = unroll(Problem(dynamics, dynamics.layout.inputs(tensors), problem.check, popped))
    return (*outcome.state, outcome.losses)


def _refusing_non_finite(tensor: Tensor) -> Tensor:
    """An alias whose gradient is refused if it is not finite, as an adjoint rule's result is."""
    if not (torch.is_grad_enabled() and tensor.requires_grad):
        return tensor
    alias = tensor.view_as(tensor)
    alias.register_hook(_refuse_non_finite_gradient)  # type: ignore[no-untyped-call]
    return alias


def _refuse_non_finite_gradient(gradient: Tensor) -> Any:
    if not (transforms.transforms_active() or transforms.grads_batched()) and not all_finite([gradient]):
        refuse_non_finite(())
