"""Tangents carried along a rollout: the forward form of the recursion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from diffopt.adjoint.trajectory import Trajectory
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.field import stands_behind
from diffopt.rollout.inputs import Inputs, Place
from diffopt.rollout.ranks import refuse_held_apart
from diffopt.tensors import autograd_graph, derivatives
from diffopt.tensors.leaves import Leaves


def response(trajectory: Trajectory, place: Place, tangent: Tensor, cotangent: Leaves) -> Tensor:
    r"""How the outer loss moves with the input at ``place``; directions along axis 0, behind it the tasks of its own.

    .. math:: Z_{t+1} = J_t Z_t + B_t,\qquad \dot F = \Big\langle\frac{\partial F}{\partial s_{T+1}}, Z_{T+1}\Big\rangle

    and the same of what was handed out along the way (13.1). One more rollout, and one HVP per step and direction,
    batched over directions.
    """
    layout, size = trajectory.layout, len(tangent)
    dynamics, inputs = trajectory.dynamics.over(size, [place]), trajectory.inputs
    state = trajectory.initial.map(lambda leaf: leaf.expand(size, *leaf.shape))
    moving = state.zeros()
    if place.part in ("params", "buffers"):
        moving = layout.with_state(inputs, moving).put({place: tangent}).state
    else:
        # not an expanded tensor: a loss that differentiates in it in forward mode gives its parts tangents to write to
        inputs = inputs.put({place: inputs.at(place).expand(tangent.shape).contiguous()})
    return _carried(trajectory, dynamics, inputs, state, moving, place, tangent, cotangent)


def response_alone(trajectory: Trajectory, place: Place, tangent: Tensor, cotangent: Leaves) -> Tensor:
    """:func:`response` to one direction, which is like the input: without the vmap, under which no DTensor can run."""
    moving, inputs = trajectory.initial.zeros(), trajectory.inputs
    if place.part in ("params", "buffers"):
        moving = trajectory.layout.with_state(inputs, moving).put({place: tangent}).state
    given = trajectory.dynamics, inputs, trajectory.initial, moving
    return _carried(trajectory, *given, place, tangent, cotangent, alone=True)


def _carried(
    trajectory: Trajectory,
    dynamics: Dynamics,
    inputs: Inputs,
    state: Leaves,
    moving: Leaves,
    place: Place,
    tangent: Tensor,
    cotangent: Leaves,
    *,
    alone: bool = False,
) -> Tensor:
    """Carry the tangents ``moving`` of ``state`` through all steps; ``alone``: they have no axis of directions."""

    def product(tangents: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        return contracted([x.unsqueeze(0) for x in tangents] if alone else tangents, weights, own)

    layout, counts = trajectory.layout, trajectory.record.counts
    again, running, own = trajectory.losses_to_replay(), trajectory.running, layout.own_axes(place)
    total = 0 * product(moving, cotangent)
    counts.gradients += layout.steps
    for step in range(1, layout.steps + 1):
        counts.add_products(1 if alone else len(tangent))
        with trajectory.rollout.replay(step, tangent.device):
            rate = dynamics.layout.slice_at(place, tangent, step)
            cotangents = [] if running is None else running.at(step)
            state, moving, losses, along = _step(dynamics, inputs, state, moving, place, rate, step, cotangents)
            again[..., step - 1] = losses if alone else losses[0]
            for tangents, weights in along:
                total = total + product(tangents, weights)
    trajectory.refuse_other_losses(again)
    return total + product(moving, cotangent)


def contracted(tangents: Sequence[Tensor], weights: Sequence[Tensor], own: Sequence[bool]) -> Tensor:
    """The inner product of each tangent with its weight, per task where the input is a task's own: ``[p, ...]``.

    ``own`` says so of each leading axis of the state; what is like the input has only the axes of its own.
    """
    terms = []
    for tangent, weight in zip(tangents, weights, strict=True):
        product = (tangent * weight.conj()).real if tangent.is_complex() else tangent * weight
        summed = [axis + 1 for axis in range(product.ndim - 1) if axis >= len(own) or not own[axis]]
        terms.append(product.sum(dim=summed) if summed else product)
    return sum(terms[1:], terms[0])


def _step(
    dynamics: Dynamics,
    inputs: Inputs,
    state: Leaves,
    moving: Leaves,
    place: Place,
    rate: Tensor,
    step: int,
    cotangents: Sequence[Tensor | None],
) -> tuple[Leaves, Leaves, Tensor, list[Pair]]:
    """One step of the state and of its tangent, ``C s' + E (H P s' + M theta') + D eta'``; its losses.

    And, for the ``cotangents`` of what it hands out, the tangents of what that depends on and their weights.

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
        if of_loss and step == 1:
            refuse_held_apart(losses, roots[count], layout.names().read[place.number], "ForwardMode")
        field = stands_behind(losses)
        found = derivatives.gradient(losses.sum(), roots[:count] if field else roots, differentiable=True)
        if step == 1:
            autograd_graph.refuse_broken_graph([g.grad_fn for g in found if g is not None])
        tangents = [*layout.params(moving), *([rate] if of_loss else [])]
        along = _weighed([losses], roots, tangents, cotangents[:1])
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
    if any([x is not None for x in cotangents[1:]]):
        with torch.enable_grad():
            roots = derivatives.make_roots([*layout.params(after), *([read[place.number]] if of_loss else [])])
            if of_loss:
                seen[place.number] = roots[count]
            observed = dynamics.observed(roots[:count], seen)
            rates = [*layout.params(after_moving), *([rate] if of_loss else [])]
            along += _weighed(observed, roots, rates, cotangents[1:])
    return Leaves(after), Leaves(after_moving), losses.detach(), along


Pair: TypeAlias = "tuple[Sequence[Tensor], Sequence[Tensor]]"


def _weighed(
    values: Sequence[Tensor], roots: Sequence[Tensor], tangents: Sequence[Tensor], cotangents: Sequence[Tensor | None]
) -> list[Pair]:
    """The tangents of ``roots``, and the gradient in them of the values' product with their cotangents."""
    pairs = [(x, c) for x, c in zip(values, cotangents, strict=False) if c is not None and x.requires_grad]
    if not pairs:
        return []
    values, given = [x for x, _ in pairs], [c.expand_as(x) for x, c in pairs]
    weights = derivatives.pullback(values, roots, given, retain=True)
    return [(tangents, weights)]
