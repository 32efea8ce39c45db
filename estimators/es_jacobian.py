"""The evolution-strategies Jacobian: the response of the solution, by differences along random directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final, get_args

import torch
from torch import Tensor

from diffopt.adjoint.claims import Claims
from diffopt.adjoint.estimator import Adjoint
from diffopt.adjoint.perturbation import (
    Group,
    Sampling,
    directions,
    refuse_a_loss_that_does_not_repeat,
    refuse_other_ranks,
)
from diffopt.adjoint.trajectory import Cotangents, Trajectory
from diffopt.rollout.inputs import Place
from diffopt.rollout.record import Keep
from diffopt.tensors.arguments import Options
from diffopt.tensors.leaves import Leaves


@final
@dataclass(frozen=True)
class ESJacobian(Adjoint):
    r"""The hypergradient with the solution's Jacobian estimated by finite differences along random directions.

    .. math:: \hat\nabla = \frac{c}{Q}\sum_{j=1}^{Q}
              \Big\langle\frac{u(\theta + \beta z_j) - u(\theta - \beta z_j)}{2\beta},
              \frac{\partial F}{\partial u}\Big\rangle\, z_j

    with ``u`` the final state, ``Q = directions``, ``beta = radius`` and ``c`` such that the estimate is unbiased for a
    linear ``u`` (1 for gaussian and rademacher directions, ``p`` for the sphere and for orthonormal ones). Only first
    derivatives of the inner loss are taken, none of the optimizer: it works where second derivatives do not exist, but
    the loss must run under ``vmap``.

    Noisy: for ``p`` numbers the squared relative error is ``(p + 1) / Q`` (gaussian), ``(p - 1) / Q`` (rademacher,
    sphere), ``p / Q - 1`` (orthonormal: with ``Q = p`` only the finite difference's error is left). Bias of order
    ``radius**2``. Cost: ``2 Q`` rollouts (``Q`` if not antithetic), run as two batches (one), and one more that checks
    that the loss repeats itself. Memory: ``2 Q`` states, independent of the number of steps.

    ``p`` counts the numbers of all inputs of a group, and the error is relative to that of them all, as ``radius`` is
    absolute: give the solve numbers of like size and effect (scaling, or the ``exp`` of a logarithm, belongs in the
    loss), or take ``Q = p``. Inputs that tasks share form one group and inputs of each task's own another, with
    independent directions per task; ``p``, ``Q`` and the ``2 Q`` rollouts count for each group.

    Not for: many hyperparameters with few directions.

    Args:
        directions: ``Q``.
        radius: ``beta``. Sphere and orthonormal directions have length 1, gaussian and rademacher ones about
            ``sqrt(p)``. Near ``eps**(1/3)`` times the size of the numbers if antithetic, else ``eps**(1/2)``.
        sampling: ``"gaussian"``, ``"rademacher"``, ``"sphere"`` or ``"orthonormal"`` (Haar-distributed frames; at most
            ``p`` directions are used).
        antithetic: central differences instead of forward ones.
        generator: where directions are drawn from; ``None``: torch's global generator.

    Raises:
        HyperparameterError: an option is out of range.

    Reference: Sow, Ji and Liang (2022), "On the Convergence Theory for Hessian-Free Bilevel Algorithms", whose
    estimator is ``sampling="gaussian", antithetic=False``. Derivations (7.1).
    """

    directions: int
    radius: float
    sampling: Sampling = "orthonormal"
    antithetic: bool = True
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        options = Options(self)
        options.integer("directions", 1)
        options.number("radius", 0, above=True)
        options.choice("sampling", *get_args(Sampling))
        options.flag("antithetic")
        options.instance("generator", torch.Generator, "a torch.Generator", also=(None,))

    def claims(self, steps: int) -> Claims:
        """Right in the mean, up to the bias of the differences and their round-off."""
        round_off = 1e-14 / self.radius  # of a difference: about a hundred roundings of float64
        tolerance = min(self.radius + round_off, 0.1)
        return Claims(second_derivatives=False, random=True, tolerance=tolerance)

    def keep(self, steps: int) -> Keep:
        """No step: the rollout is run again, perturbed."""
        return Keep(first=steps + 1)

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        """The estimate for every wanted input, one group of inputs after the other."""
        refuse_a_loss_that_does_not_repeat(trajectory)
        found: dict[Place, Tensor] = {}
        for group in Group.all_of(trajectory):
            z, factor = directions(group.vector, self.directions, self.sampling, self.generator)
            refuse_other_ranks(trajectory, z)
            if self.antithetic:
                slope = (group.rolled_out(self.radius * z) - group.rolled_out(-self.radius * z)) / (2 * self.radius)
            else:
                slope = (group.rolled_out(self.radius * z) - trajectory.final) / self.radius
            responses = group.responses(slope, cotangent)
            found |= group.by_place(factor * (responses[..., None] * z).mean(0))
        return Cotangents.of(found, trajectory)
