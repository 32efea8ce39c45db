"""The evolution-strategies Jacobian: the response of the solution, by differences along random directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from torch import Tensor

from diffopt.adjoint.claims import Claims
from diffopt.adjoint.estimator import Adjoint
from diffopt.adjoint.perturbation import as_real, at_places, final_states, groups_of, refuse_other_losses_again
from diffopt.adjoint.trajectory import Cotangents, Trajectory
from diffopt.linear_solve import Tasks
from diffopt.rollout.layout import Place
from diffopt.rollout.record import Keep
from diffopt.tensors.arguments import Options
from diffopt.tensors.leaves import Leaves

Sampling = Literal["gaussian", "rademacher", "sphere", "orthonormal"]


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

    ``p`` counts the numbers of all inputs that want their hypergradient, and the error is relative to that of them all:
    the noise of a number with a large derivative (a step size) lands on the others. ``radius`` is absolute as well. So
    give the solve numbers of like size and effect (scaling, or the ``exp`` of a logarithm, belongs in the loss), or
    take ``Q = p``. Inputs that tasks share and inputs of each task's own are perturbed in runs of their own, the latter
    with independent directions per task. Not for: many hyperparameters with few directions.

    Args:
        directions: ``Q``.
        radius: ``beta``; near the third root of the precision if antithetic (the square root if not), relative to
            the size of the numbers.
        sampling: ``"gaussian"``, ``"rademacher"``, ``"sphere"`` or ``"orthonormal"`` (Haar-distributed frames; at most
            ``p`` directions are used).
        antithetic: central differences instead of forward ones.
        generator: where directions are drawn from; ``None``: torch's global generator.

    Raises:
        HyperparameterError: an option is out of range.

    Reference: Sow, Ji and Liang (2022), "On the Convergence Theory for Hessian-Free Bilevel Algorithms". Derivations
    (7.1).
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
        tolerance = min(self.radius + 1e-14 / self.radius, 0.1)
        return Claims(second_derivatives=False, random=True, tolerance=tolerance)

    def keep(self, steps: int) -> Keep:
        """No step: the rollout is run again, perturbed."""
        return Keep(first=steps + 1)

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        """The estimate for every wanted input, one group of inputs after the other."""
        refuse_other_losses_again(trajectory)
        found: dict[Place, Tensor] = {}
        for places in groups_of(trajectory):
            found |= self._estimate(trajectory, cotangent, places)
        return Cotangents.of(found, trajectory)

    def _estimate(self, trajectory: Trajectory, cotangent: Leaves, places: list[Place]) -> dict[Place, Tensor]:
        inputs, own = (
            Leaves(as_real(trajectory.inputs.at(place)) for place in places),
            trajectory.layout.own_axes(places[0]),
        )
        tasks, radius = Tasks(sum(own)), float(self.radius)  # an integer may be more than torch's hold
        z, factor = self._directions(tasks.flatten(inputs.widened()))
        stacked = Leaves(x.expand(len(z), *x.shape) for x in inputs)
        moves = Tasks(1 + tasks.axes).unflatten(radius * z, stacked).cast(inputs)
        slope = final_states(trajectory, at_places(places, stacked + moves, trajectory))
        if self.antithetic:
            slope = (slope - final_states(trajectory, at_places(places, stacked - moves, trajectory))) / (2 * radius)
        else:
            slope = (slope - trajectory.final) / radius
        responses = Tasks(1 + len(own)).dot(slope, slope.map(lambda s, c: c.expand_as(s), cotangent))
        summed = [axis + 1 for axis, mine in enumerate(own) if not mine]  # over the tasks that share the inputs
        responses = responses.sum(dim=summed) if summed else responses
        terms = tasks.unflatten(factor * (responses[..., None] * z).mean(0), inputs).cast(inputs)
        return at_places(places, terms, trajectory)

    def _directions(self, base: Tensor) -> tuple[Tensor, float]:
        """Directions ``[Q, ..., p]`` for vectors ``[..., p]``, and the factor that makes their mean unbiased."""
        size, count = base.shape[-1], self.directions
        device = self.generator.device if self.generator is not None else base.device
        if self.sampling == "orthonormal":
            count = min(count, size)
            normal = torch.randn(*base.shape, count, generator=self.generator, device=device, dtype=base.dtype)
            # the signs of R's diagonal make the frame's distribution uniform
            q, r = torch.linalg.qr(normal)
            frame = q * r.diagonal(dim1=-2, dim2=-1).sgn()[..., None, :]
            return frame.movedim(-1, 0).to(base.device), float(size)
        shape = (count, *base.shape)
        z = torch.randn(shape, generator=self.generator, device=device, dtype=base.dtype).to(base.device)
        if self.sampling == "rademacher":
            return torch.where(z > 0, 1.0, -1.0).to(base.dtype), 1.0
        if self.sampling == "sphere":
            return z / z.norm(dim=-1, keepdim=True), float(size)
        return z, 1.0
