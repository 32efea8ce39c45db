"""Tangents carried along a rollout: the forward form of the recursion."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from diffopt.adjoint.trajectory import Trajectory
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.field import stands_behind
from diffopt.rollout.inputs import STATE_PARTS, Inputs, Place
from diffopt.rollout.ranks import refuse_held_apart, refuse_shards
from diffopt.tensors import autograd_graph, derivatives
from diffopt.tensors.leaves import Leaves


def unit_tangents(trajectory: Trajectory, place: Place, chunk_size: int | None) -> Iterator[Tensor]:
    """The unit vectors of the input at ``place``, the same for all tasks: ``[p, ...]`` with ``p <= chunk_size``."""
    value, own_axes = trajectory.inputs.at(place), trajectory.layout.own_axes(place)
    shape = value.shape[sum(own_axes) :]  # of each task's own
    size = math.prod(shape)
    for indices in torch.split(torch.arange(size, device=value.device), chunk_size or size) if size else ():
        basis = torch.nn.functional.one_hot(indices, size).to(value.dtype)
        yield basis.reshape(-1, *(1,) * sum(own_axes), *shape).expand(-1, *value.shape)


Pair: TypeAlias = "tuple[Sequence[Tensor], Sequence[Tensor]]"


@final
@dataclass(frozen=True)
class MovingProblem:
    """The inner problem while one of its inputs moves, in all directions at once.

    Attributes:
        dynamics: the problem, with the directions as one more axis in front of every state.
        inputs: its inputs.
        place: the input that moves.
        tangent: how it moves: directions along axis 0, behind it the tasks of its own.
        own: of each leading axis of the state, whether the input has it too.
        alone: whether there is one direction instead, without an axis of its own.
    """

    dynamics: Dynamics
    inputs: Inputs
    place: Place
    tangent: Tensor
    own: Sequence[bool]
    alone: bool = False

    @staticmethod
    def of(trajectory: Trajectory, place: Place, tangent: Tensor, *, alone: bool = False) -> MovingProblem:
        """The problem of a trajectory."""
        refuse_shards(trajectory.rollout.shards, "ForwardMode")
        inputs, own = trajectory.inputs, trajectory.layout.own_axes(place)
        if alone:
            return MovingProblem(trajectory.dynamics, inputs, place, tangent, own, alone)
        if place.part not in STATE_PARTS:
            # copied, not expanded: a loss that differentiates in it in forward mode gives its parts tangents in place
            inputs = inputs.put({place: inputs.at(place).expand(tangent.shape).contiguous()})
        return MovingProblem(trajectory.dynamics.over(len(tangent), [place]), inputs, place, tangent, own)

    @property
    def directions(self) -> int:
        """How many there are."""
        return 1 if self.alone else len(self.tangent)

    def contracted(self, tangents: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """The inner product of each tangent with its weight, per task where the input is a task's own: ``[p, ...]``."""
        terms = []
        for tangent, weight in zip(tangents, weights, strict=True):
            rows = tangent.unsqueeze(0) if self.alone else tangent
            product = (rows * weight.conj()).real if rows.is_complex() else rows * weight
            summed = [axis + 1 for axis in range(product.ndim - 1) if axis >= len(self.own) or not self.own[axis]]
            terms.append(product.sum(dim=summed) if summed else product)
        return sum(terms[1:], terms[0])

    def start(self) -> tuple[Leaves, Leaves]:
        """``s_1``, once for each direction, and its tangents ``Z_1``."""
        layout, state = self.dynamics.layout, self.inputs.state
        if not self.alone:
            state = state.map(lambda leaf: leaf.expand(self.directions, *leaf.shape))
        still = state.zeros()
        if self.place.part not in STATE_PARTS:
            return state, still
        return state, layout.with_state(self.inputs, still).put({self.place: self.tangent}).state

    def take_step(
        self, state: Leaves, moving: Leaves, step: int, cotangents: Sequence[Tensor | None]
    ) -> tuple[Leaves, Leaves, Tensor, list[Pair]]:
        """``s_{t+1}`` and ``Z_{t+1} = C Z_t + E (H P Z_t + M theta') + D eta'``; the losses.

        And, for the ``cotangents`` of what the step hands out, the tangents of what that depends on and their weights.

        Of a vector field ``H`` is its Jacobian ``V``, and the tangent goes through ``V`` itself, not its transpose.
        """
        dynamics, layout, place = self.dynamics, self.dynamics.layout, self.place
        rate, (read, hypers) = layout.slice_at(place, self.tangent, step), layout.at_step(self.inputs, step)
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
        return Leaves(after), Leaves(after_moving), (losses if self.alone else losses[0]).detach(), along


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
