"""Forward mode of a problem that is spread over ranks: no vmap knows DTensors, so each coordinate moves by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from diffopt.adjoint.trajectory import Trajectory
from diffopt.distributed.sharded import on_all_ranks, spread_like
from diffopt.rollout.inputs import Place
from diffopt.tensors.spread import gathered, is_spread


def is_spread_out(trajectory: Trajectory) -> bool:
    """Whether the state of a trajectory consists of DTensors."""
    return any(map(is_spread, trajectory.initial)) and not trajectory.layout.levels


def one_by_one(trajectory: Trajectory, place: Place, rate: Callable[[Trajectory, Tensor], Tensor]) -> Tensor:
    """The derivative in the input at ``place``; ``rate``: how the outer loss moves with it in one direction."""
    inputs, mesh = trajectory.inputs, next(x for x in trajectory.initial if is_spread(x))
    plain = [at for at in trajectory.layout.places if not is_spread(inputs.at(at))]
    like = inputs.at(place)
    inputs = inputs.put({at: on_all_ranks(inputs.at(at), mesh) for at in plain})
    trajectory = replace(trajectory, inputs=inputs)
    parts = []
    for row in torch.eye(like.numel(), dtype=like.dtype, device=like.device):
        tangent = spread_like(row.reshape(like.shape), inputs.at(place))
        found = [gathered(rate(trajectory, x * tangent)) for x in ((1, 1j) if like.is_complex() else (1,))]
        parts.append(torch.complex(*found) if like.is_complex() else found[0])
    derivative = torch.cat(parts).reshape(like.shape)
    return spread_like(derivative, like) if is_spread(like) else derivative
