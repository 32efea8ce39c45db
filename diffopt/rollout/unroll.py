"""All steps as plain differentiable code, for estimators that leave the derivative to autograd."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffopt.rollout.checks import refuse_non_finite, warn_of_precision
from diffopt.rollout.dynamics import Level
from diffopt.rollout.loop import roll_out_recorded
from diffopt.rollout.problem import Outcome, Problem
from diffopt.rollout.record import Record, Watch
from diffopt.tensors import transforms
from diffopt.tensors.leaves import all_finite


def unroll(problem: Problem) -> Outcome:
    """Run all steps as plain differentiable code, under whatever records or transforms the caller.

    Under vmap the steps run below it on stacked tensors, as those of an :class:`Adjoint` do; under another transform
    the inner gradient is ``torch.func``'s, else plain autograd's.
    """
    tensors = (*problem.state, *problem.extras)
    size = transforms.innermost_vmap_size()
    if size is not None:
        lower = partial(_unroll_below, problem, transforms.transform_level())
        *state, losses = transforms.below_vmap(lower, tensors, size)
        return Outcome(tuple(state), losses, Record())
    watch = Watch(values=problem.check, levels=problem.popped)
    if problem.check and not transforms.transforms_active():
        tensors = tuple(_refusing_non_finite(x) for x in tensors)
    count = problem.dynamics.state_count
    if problem.check and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        warn_of_precision(problem.dynamics, tensors)
    final, losses = roll_out_recorded(problem.dynamics, tensors[:count], tensors[count:], watch)
    # without a step, what comes out is still not the caller's own tensor
    return Outcome(final.tensors if problem.dynamics.steps else tuple(x.clone() for x in final), losses, Record())


def _unroll_below(
    problem: Problem, level: int, info: Any, dims: tuple[int | None, ...], tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Unroll outside the innermost vmap, the transform number ``level``: stacked, unless its tasks share everything."""
    count, dynamics = problem.dynamics.state_count, problem.dynamics
    if any(dim is not None for dim in dims):
        tensors, dims = transforms.stacked(tensors, dims, info.batch_size, set(range(count)))
        dynamics = dynamics.batched(Level(dims, info.batch_size, info.randomness))
    popped = range(level, problem.popped.stop or level + 1) if problem.check else range(0)
    outcome = unroll(Problem(dynamics, tuple(tensors[:count]), tuple(tensors[count:]), problem.check, popped))
    return (*outcome.state, outcome.losses)


def _refusing_non_finite(tensor: Tensor) -> Tensor:
    """An alias whose gradient is refused if it is not finite, as an adjoint rule's result is."""
    if not (torch.is_grad_enabled() and tensor.requires_grad):
        return tensor
    alias = tensor.view_as(tensor)
    alias.register_hook(_refuse_non_finite_gradient)  # type: ignore[no-untyped-call]
    return alias


def _refuse_non_finite_gradient(gradient: Tensor) -> None:
    if not (transforms.transforms_active() or transforms.grads_batched()) and not all_finite([gradient]):
        refuse_non_finite(())
