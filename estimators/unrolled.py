"""Plain unrolling: autograd records the whole rollout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from diffopt.adjoint.claims import Claims
from diffopt.adjoint.estimator import Estimator
from diffopt.rollout.problem import Outcome, Problem
from diffopt.rollout.unroll import unroll


@final
@dataclass(frozen=True)
class Unrolled(Estimator):
    """The exact hypergradient by recording every inner step, differentiable to any order.

    Cost: ``T`` gradients and ``T`` HVPs for a first derivative. Memory: the graph of all ``T`` steps, freed together
    with the outer loss. Depth ``T``. Tensors captured by closure do get their gradient, except under vmap.

    Forward mode, too, as far as torch is right in it: ``jvp`` of a solve, and of its gradient. (Torch's ``grad(jvp)``
    of norm layers is wrong without a word: take ``jvp(grad)``.)

    For: second derivatives of a hypergradient, and an inner solve within the loss of another solve. Not for: anything
    else; :class:`Reverse` gives the same first derivative faster, in less memory.

    Reference: Maclaurin et al. (2015), "Gradient-based Hyperparameter Optimization through Reversible Learning",
    section 2 (as the baseline). Derivations (1.1)-(1.2).
    """

    def claims(self, steps: int) -> Claims:
        """Exact to any order; what autograd computes and stores is not counted."""
        return Claims(twice=True, reports=False)

    def run(self, problem: Problem) -> Outcome:
        """Roll out under autograd."""
        return unroll(problem)  # rollout/unroll.py: the loop of the rollout, recorded
