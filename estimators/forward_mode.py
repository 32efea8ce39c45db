"""Forward mode: one tangent per hyperparameter, carried along the rollout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from diffopt.adjoint.estimator import Adjoint
from diffopt.adjoint.spread_tangents import is_spread_out, one_by_one
from diffopt.adjoint.tangents import MovingProblem, unit_tangents
from diffopt.adjoint.trajectory import Cotangents, Trajectory
from diffopt.rollout.inputs import Place
from diffopt.rollout.record import Keep
from diffopt.tensors.arguments import Options
from diffopt.tensors.leaves import Leaves


@final
@dataclass(frozen=True)
class ForwardMode(Adjoint):
    r"""The exact hypergradient, by carrying the tangents of every hyperparameter forward.

    .. math:: Z_1 = \frac{\partial s_1}{\partial\theta},\quad Z_{t+1} = J_t Z_t + B_t,\qquad
              \nabla = Z_{T+1}^\top\,\frac{\partial F}{\partial s_{T+1}}

    Exact. Cost: one more rollout and ``T * p`` HVPs for ``p`` hyperparameters (per task), batched over ``p``. Memory:
    ``p`` states, independent of ``T``. Depth ``T``. All that for each tensor that is learned, one after the other:
    twelve tensors of one number have the depth ``12 * T``, so put them in one and let the loss take it apart.

    Not for: many hyperparameters, an initialisation above all. Every input that requires grad gets tangents, even if
    the backward pass is asked for others only: detach an initialisation that is not to be learned. Of params that are
    DTensors, each tangent is carried by itself, and costs a rollout: no vmap knows them.

    Args:
        chunk_size: how many tangents are carried at once; ``None``: all of one tensor. Bounds the memory, and each
            chunk costs a rollout.

    Raises:
        HyperparameterError: ``chunk_size`` is not ``None`` or an integer >= 1.

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
        found = {place: self._derivative(trajectory, place, cotangent) for place in trajectory.wanted_places}
        return Cotangents.of(found, trajectory)

    def _derivative(self, trajectory: Trajectory, place: Place, cotangent: Leaves) -> Tensor:
        """The derivative in one input, all its coordinates in turn."""
        if is_spread_out(trajectory):
            return one_by_one(trajectory, place, lambda spread, x: _rate(spread, place, x, cotangent, alone=True))
        value, parts = trajectory.inputs.at(place), []
        for tangent in unit_tangents(trajectory, place, self.chunk_size):
            part = _rate(trajectory, place, tangent, cotangent)
            if value.is_complex():  # torch's gradient: the real part's derivative plus i times the imaginary part's
                part = torch.complex(part, _rate(trajectory, place, 1j * tangent, cotangent))
            parts.append(part)
        return torch.cat(parts).movedim(0, -1).reshape(value.shape) if parts else torch.zeros_like(value)


def _rate(trajectory: Trajectory, place: Place, tangent: Tensor, cotangent: Leaves, *, alone: bool = False) -> Tensor:
    """How fast the outer loss moves with the input at ``place``, one number for each direction ``[p, ...]``.

    What was handed out along the way counts at its step (13.1).
    """
    counts, running, again = trajectory.record.counts, trajectory.running, trajectory.losses_to_replay()
    problem = MovingProblem.of(trajectory, place, tangent, alone=alone)
    state, moving = problem.start()  # s_1 and Z_1
    total = 0 * problem.contracted(moving, cotangent)
    counts.gradients += trajectory.steps
    for step in range(1, trajectory.steps + 1):
        counts.add_products(problem.directions)
        cotangents = [] if running is None else running.at(step)
        with trajectory.rollout.replay(step, tangent.device):
            state, moving, losses, along = problem.take_step(state, moving, step, cotangents)  # Z_{t+1} = J_t Z_t + B_t
        again[..., step - 1] = losses
        for tangents, weights in along:
            total = total + problem.contracted(tangents, weights)
    trajectory.refuse_other_losses(again)
    return total + problem.contracted(moving, cotangent)  # Z_{T+1}' dF/ds_{T+1}
