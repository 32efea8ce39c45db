"""Forward mode: one tangent per hyperparameter, carried along the rollout."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from diffopt.adjoint.estimator import Adjoint
from diffopt.adjoint.tangents import response, response_alone
from diffopt.adjoint.trajectory import Cotangents, Trajectory
from diffopt.distributed.sharded import on_all_ranks, spread_like
from diffopt.rollout.inputs import Place
from diffopt.rollout.record import Keep
from diffopt.tensors.arguments import Options
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.spread import gathered, is_spread


@final
@dataclass(frozen=True)
class ForwardMode(Adjoint):
    r"""The exact hypergradient, by carrying the tangents of every hyperparameter forward.

    .. math:: Z_1 = \frac{\partial s_1}{\partial\theta},\quad Z_{t+1} = J_t Z_t + B_t,\qquad
              \nabla = Z_{T+1}^\top\,\frac{\partial F}{\partial s_{T+1}}

    Exact. Cost: one more rollout and ``T * p`` HVPs for ``p`` hyperparameters (per task), batched over ``p``. Memory:
    ``p`` states, independent of ``T``. Depth ``T``. All that for each tensor that is learned, one after the other:
    twelve tensors of one number have the depth ``12 * T``, so put them in one and let the loss take it apart.

    Of params that are DTensors, each tangent is carried by itself, and costs a rollout: no vmap knows them.

    Args:
        chunk_size: how many tangents are carried at once; ``None``: all of one tensor. Bounds the memory, and each
            chunk costs a rollout.

    Not for: many hyperparameters, an initialisation above all. Whatever requires grad gets its tangents, also if the
    backward pass is asked for other inputs only: detach an initialisation that is not to be learned.

    Reference: Franceschi et al. (2017), "Forward and Reverse Gradient-Based Hyperparameter Optimization", algorithm 2.
    Derivations, section 1.
    """

    chunk_size: int | None = None
    takes_running_costs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check ``chunk_size``."""
        Options(self).integer("chunk_size", 1, also=(None,))

    def keep(self, steps: int) -> Keep:
        """No step: the rollout is run again with its tangents."""
        return Keep(first=steps + 1)

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        """The product of the cotangent with the tangents of every wanted input."""
        found = {place: self._derivative(trajectory, cotangent, place) for place in trajectory.wanted_places}
        return Cotangents.of(found, trajectory)

    def _derivative(self, trajectory: Trajectory, cotangent: Leaves, place: Place) -> Tensor:
        """The derivative for one input, all its coordinates in turn."""
        like, shared = trajectory.inputs.at(place), trajectory.layout.own_axes(place)
        if any(map(is_spread, trajectory.initial)) and not trajectory.layout.levels:
            return _one_by_one(trajectory, place, like, cotangent)
        own = like.shape[sum(shared) :]
        size = math.prod(own)
        if size == 0:
            return torch.zeros_like(like)
        parts = []
        for indices in torch.split(torch.arange(size, device=like.device), self.chunk_size or size):
            basis = torch.nn.functional.one_hot(indices, size).to(like.dtype)
            tangent = basis.reshape(-1, *(1,) * sum(shared), *own).expand(-1, *like.shape)
            part = response(trajectory, place, tangent, cotangent)
            if like.is_complex():  # torch's gradient: the real part's derivative plus i times the imaginary part's
                part = torch.complex(part, response(trajectory, place, 1j * tangent, cotangent))
            parts.append(part)
        return torch.cat(parts).movedim(0, -1).reshape(like.shape)


def _one_by_one(trajectory: Trajectory, place: Place, like: Tensor, cotangent: Leaves) -> Tensor:
    """The derivative for one input of a problem that is spread over ranks, a coordinate at a time."""
    inputs, mesh = trajectory.inputs, next(x for x in trajectory.initial if is_spread(x))
    plain = [at for at in trajectory.layout.places if not is_spread(inputs.at(at))]
    trajectory = replace(trajectory, inputs=inputs.put({at: on_all_ranks(inputs.at(at), mesh) for at in plain}))
    rows, factors = (
        torch.eye(like.numel(), dtype=like.dtype, device=like.device),
        (1, 1j) if like.is_complex() else (1,),
    )
    parts = []
    for row in rows:
        tangent = spread_like(row.reshape(like.shape), trajectory.inputs.at(place))
        found = [gathered(response_alone(trajectory, place, x * tangent, cotangent)) for x in factors]
        parts.append(torch.complex(*found) if like.is_complex() else found[0])
    derivative = torch.cat(parts).reshape(like.shape)
    return spread_like(derivative, like) if is_spread(like) else derivative
