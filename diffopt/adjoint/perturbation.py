"""Rollouts from other inputs: what the final state answers to a change."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, final

import torch
from torch import Tensor

from diffopt.adjoint.trajectory import Trajectory
from diffopt.rollout.inputs import Place
from diffopt.rollout.loop import roll_out
from diffopt.rollout.ranks import refuse_held_apart, refuse_other_directions, refuse_shards
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.tasks import Tasks

Sampling = Literal["gaussian", "rademacher", "sphere", "orthonormal"]


def directions(base: Tensor, count: int, sampling: Sampling, generator: torch.Generator | None) -> tuple[Tensor, float]:
    """Directions ``[Q, ..., p]`` for vectors ``[..., p]``, and the factor that makes their mean unbiased."""
    size, device = base.shape[-1], base.device if generator is None else generator.device
    if sampling == "orthonormal":
        normal = torch.randn(*base.shape, min(count, size), generator=generator, device=device, dtype=base.dtype)
        # the signs of R's diagonal make the frame's distribution uniform
        q, r = torch.linalg.qr(normal)
        frame = q * r.diagonal(dim1=-2, dim2=-1).sgn()[..., None, :]
        return frame.movedim(-1, 0).to(base.device), float(size)
    shape = (count, *base.shape)
    z = torch.randn(shape, generator=generator, device=device, dtype=base.dtype).to(base.device)
    if sampling == "rademacher":
        return torch.where(z > 0, 1.0, -1.0).to(base.dtype), 1.0
    if sampling == "sphere":
        return z / z.norm(dim=-1, keepdim=True), float(size)
    return z, 1.0


@final
@dataclass(frozen=True)
class Group:
    """Wanted inputs that the same levels have of their own, as one vector of real numbers ``[..., p]``, one per task.

    A complex number is two real ones, each with directions of its own.
    """

    trajectory: Trajectory
    places: tuple[Place, ...]

    @staticmethod
    def all_of(trajectory: Trajectory) -> list[Group]:
        """The groups of all wanted inputs."""
        groups: dict[tuple[bool, ...], list[Place]] = {}
        for place in trajectory.wanted_places:
            groups.setdefault(tuple(trajectory.layout.own_axes(place)), []).append(place)
        return [Group(trajectory, tuple(places)) for places in groups.values()]

    @cached_property
    def own(self) -> list[bool]:
        """For each leading axis of the state, outermost first, whether the inputs have it too."""
        return self.trajectory.layout.own_axes(self.places[0])

    @cached_property
    def inputs(self) -> Leaves:
        """The inputs, each as real numbers."""
        given = (self.trajectory.inputs.at(place) for place in self.places)
        return Leaves([torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in given])

    @property
    def vector(self) -> Tensor:
        """All of them, ``[..., p]``, in single precision at least."""
        return Tasks(sum(self.own)).flatten(self.inputs.widened())

    def rolled_out(self, moves: Tensor) -> Leaves:
        """The final states of rollouts from moved inputs, for ``moves`` ``[Q, ..., p]``; ``Q`` is their first axis."""
        size, rollout, counts = len(moves), self.trajectory.rollout, self.trajectory.record.counts
        stacked = self.inputs.map(lambda x: x.expand(size, *x.shape))
        moved = self._at_places(stacked + Tasks(1 + sum(self.own)).unflatten(moves, stacked).cast(self.inputs))
        state = self.trajectory.initial.map(lambda x: x.expand(size, *x.shape))
        inputs, before = self.trajectory.layout.with_state(self.trajectory.inputs, state).put(moved), counts.gradients
        with rollout.replay(None, moves.device):
            final, _ = roll_out(self.trajectory.dynamics.over(size, moved), inputs, counts=counts, draws=rollout.draws)
        counts.gradients = before + size * self.trajectory.steps
        return final

    def responses(self, slope: Leaves, cotangent: Leaves) -> Tensor:
        """The cotangent's product with each row of ``slope``, summed over tasks that share the inputs: ``[Q, ...]``."""
        total = Tasks(1 + len(self.own)).dot(slope, slope.map(lambda s, c: c.expand_as(s), cotangent))
        summed = [axis + 1 for axis, own in enumerate(self.own) if not own]
        return total.sum(dim=summed) if summed else total

    def by_place(self, vector: Tensor) -> dict[Place, Tensor]:
        """A vector ``[..., p]`` in the form of the inputs, by their places."""
        return self._at_places(Tasks(sum(self.own)).unflatten(vector, self.inputs).cast(self.inputs))

    def _at_places(self, parts: Leaves) -> dict[Place, Tensor]:
        pairs = zip(self.places, parts, strict=True)
        complexes = {place: self.trajectory.inputs.at(place).is_complex() for place in self.places}
        return {place: torch.complex(x[..., 0], x[..., 1]) if complexes[place] else x for place, x in pairs}


def refuse_other_ranks(trajectory: Trajectory, moves: Tensor) -> None:
    """Refuse, if ranks share the solve, that they move inputs by different amounts, or inputs that each has its own."""
    rollout, layout = trajectory.rollout, trajectory.layout
    refuse_shards(rollout.shards, "ESJacobian")
    if not rollout.copied_to or not trajectory.check:
        return
    refuse_other_directions(rollout.copied_to, moves)
    places = [place for place in trajectory.wanted_places if place.part == "read"]
    read = list(layout.at_step(trajectory.inputs, 1)[0])
    with rollout.replay(1, moves.device), torch.enable_grad():
        for place in places:
            read[place.number] = read[place.number].detach().requires_grad_()
        params = [x.detach().requires_grad_() for x in layout.params(trajectory.initial)]
        losses = trajectory.dynamics.losses(params, read)
    for place in places:
        refuse_held_apart(losses, read[place.number], layout.names().read[place.number], "ESJacobian")


def refuse_a_loss_that_does_not_repeat(trajectory: Trajectory) -> None:
    """Refuse, where checks are on, a loss that differs in one more rollout: that would drown the differences."""
    if not trajectory.check:
        return
    rollout, counts = trajectory.rollout, trajectory.record.counts
    with rollout.replay(None, trajectory.final[0].device):
        again = roll_out(trajectory.dynamics, trajectory.inputs, counts=counts, draws=rollout.draws)[1].losses
    assert again is not None
    trajectory.refuse_other_losses(again)
