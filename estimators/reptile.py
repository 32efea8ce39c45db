"""Reptile: move the initial parameters towards the solution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from diffopt.adjoint.claims import Claims
from diffopt.adjoint.estimator import Adjoint
from diffopt.adjoint.trajectory import Cotangents, Trajectory
from diffopt.rollout.record import Keep
from diffopt.tensors.leaves import Leaves


@final
@dataclass(frozen=True)
class Reptile(Adjoint):
    r"""The direction ``initial - final`` of the parameters, in place of a hypergradient.

    .. math:: \Lambda_0 := \phi_1 - \phi_{T+1}\quad(\text{for gradient descent } \alpha\textstyle\sum_t g_t),\qquad
              \text{direct terms} := 0

    Not a gradient. Neither the value nor the gradient of the outer loss matters; it only starts the backward pass. So a
    factor on it has no effect: over a batch of tasks the result is the sum of the tasks' directions, also when the
    outer loss is their mean. Cost: nothing beyond the rollout. Memory: no states. Depth 0.

    Not for: anything but the initial parameters (all else gets a zero), or outer losses on other data than the inner.

    Reference: Nichol et al. (2018), "On First-Order Meta-Learning Algorithms", algorithm 1. Derivations, section 3.1.
    """

    traced = True

    def claims(self, steps: int) -> Claims:
        """No gradient, so not linear either, and for the initial params only."""
        return Claims("never", frozenset({"init"}), second_derivatives=False, linear=False)

    def keep(self, steps: int) -> Keep:
        """No step."""
        return Keep(first=steps + 1, evaluates=False)

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        """Initial minus final parameters; zero for the buffers."""
        layout = trajectory.layout
        moved = trajectory.inputs.params - layout.params(trajectory.final)
        return Cotangents(layout.padded(moved, cotangent), {})
