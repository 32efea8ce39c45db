"""Truncated back-propagation: the exact recursion over the last steps only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from diffopt.adjoint.claims import ALL_INPUTS, Claims, Kind
from diffopt.adjoint.estimator import Adjoint
from diffopt.adjoint.trajectory import Cotangents, Trajectory
from diffopt.errors import StepsError
from diffopt.rollout.record import Checkpoint, Keep, Offload, check_storage
from diffopt.tensors.arguments import Options, check_within_steps
from diffopt.tensors.leaves import Leaves


@final
@dataclass(frozen=True)
class Truncated(Adjoint):
    r"""The hypergradient through the last ``steps`` inner steps only.

    .. math:: \Lambda_{t-1} = J_t^\top\Lambda_t\ (t = T, \dots, T - L + 1),\qquad
              \nabla = \sum_{t > T - L} B_t^\top\Lambda_t
                       + \Big(\frac{\partial s_1}{\partial\theta}\Big)^\top\Lambda_{T-L}

    with ``L = steps``: as if earlier steps were the identity. ``steps=0`` is :class:`FirstOrder`, ``steps=T`` is exact.

    Biased; for gradient descent the bias shrinks like ``(1 - lr * a)**L`` where the inner loss is ``a``-strongly
    convex. Cost: ``L`` HVPs, one after the other. Memory: ``L`` steps, see :class:`Reverse`. Depth ``L``. Not for
    hyperparameters that act early.

    Args:
        steps: ``L``, at most the number of inner steps.
        checkpoint, memory, offload: how and where the last ``L`` steps are kept; see :class:`Reverse`.

    Raises:
        StepsError: ``steps`` is negative or more than the inner problem has.

    Reference: Shaban et al. (2019), "Truncated Back-propagation for Bilevel Optimization". Derivations (3.1).
    """

    steps: int
    checkpoint: Checkpoint = None
    memory: int | str | None = None
    offload: Offload = False
    if_wrong = "drops terms that matter here"
    traced = True

    def __post_init__(self) -> None:
        """Check all options."""
        check_storage(self)
        Options(self).integer("steps", 0, kind=StepsError)

    def claims(self, steps: int) -> Claims:
        """Exact if no step is left out; the first-order estimator if all are."""
        inputs: frozenset[Kind] = ALL_INPUTS if self.steps else frozenset({"init"})
        return Claims("always" if self.steps >= steps else "never", inputs, second_derivatives=self.steps > 0)

    def keep(self, steps: int) -> Keep:
        """The last steps."""
        check_within_steps("Truncated: steps", self.steps, steps)
        return Keep.of(self, steps - self.steps + 1)

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        """The recursion over the last steps."""
        return trajectory.sweep(cotangent, first=self._first(trajectory))

    def pullbacks(self, trajectory: Trajectory, cotangents: Sequence[Leaves]) -> list[Cotangents]:
        """The same for many at once."""
        return trajectory.sweeps(cotangents, first=self._first(trajectory))

    def _first(self, trajectory: Trajectory) -> int:  # (a solve that stops early may have made fewer than ``steps``)
        return max(1, trajectory.steps - self.steps + 1)
