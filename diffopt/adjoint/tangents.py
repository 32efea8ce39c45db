"""Tangents carried along a rollout: the forward form of the recursion."""

from __future__ import annotations

import torch
from torch import Tensor

from diffopt.adjoint.trajectory import Trajectory
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.field import stands_behind
from diffopt.rollout.inputs import Inputs, Place
from diffopt.tensors import autograd_graph, derivatives
from diffopt.tensors.leaves import Leaves


def carried(trajectory: Trajectory, place: Place, tangent: Tensor) -> Leaves:
    r"""The tangents of the final state, given that of the input at ``place``; directions along axis 0.

    .. math:: Z_{t+1} = J_t Z_t + B_t

    One more rollout, and one HVP per step and direction, batched over directions.
    """
    layout, size, counts = trajectory.layout, len(tangent), trajectory.record.counts
    dynamics, inputs = trajectory.dynamics.over(size, [place]), trajectory.inputs
    state = trajectory.initial.map(lambda leaf: leaf.expand(size, *leaf.shape))
    moving = state.zeros()
    if place.part in ("params", "buffers"):
        moving = layout.with_state(inputs, moving).put({place: tangent}).state
    else:
        # not an expanded tensor: a loss that differentiates in it in forward mode gives its parts tangents to write to
        inputs = inputs.put({place: inputs.at(place).expand(tangent.shape).contiguous()})
    again = trajectory.losses_to_replay()
    counts.gradients += layout.steps
    for step in range(1, layout.steps + 1):
        counts.add_products(size)
        with trajectory.rollout.replay(step, tangent.device):
            rate = dynamics.layout.slice_at(place, tangent, step)
            state, moving, losses = _step(dynamics, inputs, state, moving, place, rate, step)
            again[..., step - 1] = losses[0]
    trajectory.refuse_other_losses(again)
    return moving


def _step(
    dynamics: Dynamics, inputs: Inputs, state: Leaves, moving: Leaves, place: Place, rate: Tensor, step: int
) -> tuple[Leaves, Leaves, Tensor]:
    """One step of the state and of its tangent, ``C s' + E (H P s' + M theta') + D eta'``.

    Of a vector field ``H`` is its Jacobian ``V``, and the tangent goes through ``V`` itself, not its transpose.
    """
    layout = dynamics.layout
    read, hypers = layout.at_step(inputs, step)
    params, count = layout.params(state), layout.params_count
    with torch.enable_grad():
        of_loss = place.part == "read"
        roots = derivatives.make_roots([*params, *([read[place.number]] if of_loss else [])])
        seen = list(read)
        if of_loss:
            seen[place.number] = roots[count]
        losses = dynamics.losses(roots[:count], seen)
        field = stands_behind(losses)
        found = derivatives.gradient(losses.sum(), roots[:count] if field else roots, differentiable=True)
        if step == 1:
            autograd_graph.refuse_broken_graph([g.grad_fn for g in found if g is not None])
        tangents = [*layout.params(moving), *([rate] if of_loss else [])]
        if field:
            grads_moving = derivatives.filled(derivatives.pushforward(found, roots, tangents), params)
        else:  # three quarters of the time: the second derivatives of a loss are symmetric, the mixed ones, too
            grads_moving = derivatives.pullback(found, roots[:count], tangents)
    grads = derivatives.or_zeros(found[:count], params)
    of_update = [place] if place.part == "hyperparameters" else []

    def update(sources: tuple[Tensor, ...]) -> Leaves:
        now, own, learned = layout.split_update(sources)
        current = list(hypers)
        for at, value in zip(of_update, learned, strict=True):
            current[at.number] = value
        return dynamics.update(now, own, current, step)

    sources = [*state, *grads, *(hypers[at.number] for at in of_update)]
    after, after_moving = derivatives.jvp(update, sources, [*moving, *grads_moving, *(rate for _ in of_update)])
    return Leaves(after), Leaves(after_moving), losses.detach()
