"""First-order MAML: the gradient at the solution, handed to the initial parameters."""

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
class FirstOrder(Adjoint):
    r"""The hypergradient with every step's Jacobian taken to be the identity (first-order MAML).

    .. math:: \Lambda_0 := \Lambda_T = \frac{\partial F}{\partial s_{T+1}},\qquad \text{direct terms} := 0

    Biased: the error is of first order in ``lr * T``. Cost: nothing beyond the rollout; no second derivative of the
    loss is taken. Memory: no states. Depth 0.

    Not for: anything but the initial state. What the loss or the optimizer reads gets a zero (its explicit use in
    the outer loss still counts, by ordinary autograd): first-order methods cannot train meta-networks or step sizes.

    Reference: Finn et al. (2017), "Model-Agnostic Meta-Learning", section 5.2. Derivations, section 3.1.
    """

    if_wrong = "drops terms that matter here"
    traced = True

    def claims(self, steps: int) -> Claims:
        """Biased, and for the initial state only."""
        return Claims("never", frozenset({"init"}), second_derivatives=False)

    def keep(self, steps: int) -> Keep:
        """No step."""
        return Keep(first=steps + 1, evaluates=False)

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        """The final state's adjoint, as it is."""
        return Cotangents(cotangent, {})
