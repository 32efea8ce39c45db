"""Rollouts from other inputs: what the final state answers to a change."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffopt.adjoint.trajectory import Trajectory
from diffopt.rollout.layout import Place
from diffopt.rollout.loop import roll_out
from diffopt.tensors.leaves import Leaves


def final_states(trajectory: Trajectory, moved: Mapping[Place, Tensor]) -> Leaves:
    """The final states of rollouts with some inputs replaced by stacks of them, along a new first axis."""
    size, inputs, rollout = len(next(iter(moved.values()))), trajectory.inputs, trajectory.rollout
    state = trajectory.layout.with_state(inputs, trajectory.initial.map(lambda x: x.expand(size, *x.shape)))
    counts, before = trajectory.record.counts, trajectory.record.counts.gradients
    with rollout.replay(None, trajectory.final[0].device):
        dynamics = trajectory.dynamics.over(size, moved)
        final = roll_out(dynamics, state.put(moved), counts=counts, draws=rollout.draws)[0]
    counts.gradients = before + size * trajectory.steps
    return final


def refuse_other_losses_again(trajectory: Trajectory) -> None:
    """Refuse, where checks are on, a loss that differs in one more rollout: that would drown the differences."""
    if not trajectory.check:
        return
    rollout = trajectory.rollout
    with rollout.replay(None, trajectory.final[0].device):
        counts = trajectory.record.counts
        again = roll_out(trajectory.dynamics, trajectory.inputs, counts=counts, draws=rollout.draws)[1].losses
    assert again is not None
    trajectory.refuse_other_losses(again)


def groups_of(trajectory: Trajectory) -> list[list[Place]]:
    """The wanted inputs, those together that the same levels have."""
    groups: dict[tuple[bool, ...], list[Place]] = {}
    for place in trajectory.wanted_places:
        groups.setdefault(tuple(trajectory.layout.own_axes(place)), []).append(place)
    return list(groups.values())


def as_real(x: Tensor) -> Tensor:
    """A complex number is two real ones, each with directions of its own."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def at_places(places: list[Place], found: Leaves, trajectory: Trajectory) -> dict[Place, Tensor]:
    """Real numbers by the places of their inputs, complex ones where the input is."""
    pairs = zip(places, found, strict=True)
    complexes = {place: trajectory.inputs.at(place).is_complex() for place in places}
    return {place: torch.complex(x[..., 0], x[..., 1]) if complexes[place] else x for place, x in pairs}
