"""The evolution-strategies Jacobian: the response of the solution, by differences along random directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from torch import Tensor

from diffopt.adjoint.claims import Claims
from diffopt.adjoint.estimator import Adjoint
from diffopt.adjoint.trajectory import Cotangents, Trajectory
from diffopt.linear_solve import Tasks
from diffopt.rollout.dynamics import Level
from diffopt.rollout.loop import roll_out
from diffopt.rollout.record import Keep, Record, Watch
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

    ``p`` counts the numbers that the solve is given, of all inputs that want their hypergradient together, and the
    error is relative to the hypergradient of them all. So mixed scales cost far more than the formulas say: the noise
    of a number with a large derivative (a step size) lands on all others, and weighs more still where those were scaled
    up on their way from what is learned. ``radius`` is absolute as well, the same for a step size of 1e-3 and a penalty
    of 10. Give the solve numbers of like size and effect (scaling, or the ``exp`` of a logarithm, belongs in the loss),
    or take ``Q = p``.

    Inputs that tasks share and inputs of each task's own are perturbed in runs of their own, the latter with
    independent directions per task.

    Not for: many hyperparameters with few directions.

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
        if trajectory.check:
            trajectory.refuse_other_losses(_losses_again(trajectory))
        count = trajectory.dynamics.state_count
        wanted = [*trajectory.wanted_state, *(count + i for i in trajectory.wanted)]
        found: dict[int, Tensor] = {}
        for numbers in _groups(trajectory, wanted):
            found |= self._estimate(trajectory, cotangent, numbers)
        nothing = trajectory.initial.zeros()
        initial = Leaves(found[i] if i in found else nothing[i] for i in range(count))
        return Cotangents(
            initial if trajectory.wants_initial else None, {i: found[count + i] for i in trajectory.wanted}
        )

    def _estimate(self, trajectory: Trajectory, cotangent: Leaves, numbers: list[int]) -> dict[int, Tensor]:
        given = [_inputs(trajectory)[i] for i in numbers]
        inputs = Leaves(_as_real(x) for x in given)
        batched = _batched(trajectory, numbers[0])
        tasks = Tasks(sum(batched))
        base = tasks.flatten(inputs.widened())
        z, factor = self._directions(base)
        radius = float(self.radius)  # an integer may be more than torch's hold
        stacked = Leaves(x.expand(len(z), *x.shape) for x in inputs)
        moves = Tasks(1 + tasks.axes).unflatten(radius * z, stacked).cast(inputs)
        high = _final_state(trajectory, _named(numbers, stacked + moves, given))
        if self.antithetic:
            low = _final_state(trajectory, _named(numbers, stacked - moves, given))
            slope = (high - low) / (2 * radius)
        else:
            slope = (high - trajectory.final) / radius
        weights = _responses(slope, cotangent, batched)
        terms = tasks.unflatten(factor * (weights[..., None] * z).mean(0), inputs).cast(inputs)
        return _named(numbers, terms, given)

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


def _inputs(trajectory: Trajectory) -> Sequence[Tensor]:
    return [*trajectory.initial, *trajectory.extras]


def _as_real(x: Tensor) -> Tensor:
    """A complex number is two real ones, each with directions of its own."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _named(numbers: list[int], found: Leaves, given: list[Tensor]) -> dict[int, Tensor]:
    """Real numbers by the numbers of their inputs, complex ones where the input is."""
    pairs = zip(numbers, found, given, strict=True)
    return {i: torch.complex(x[..., 0], x[..., 1]) if like.is_complex() else x for i, x, like in pairs}


def _batched(trajectory: Trajectory, number: int) -> list[bool]:
    """For each leading axis of the state, outermost first, whether input ``number`` has it."""
    return [level.dims[number] is not None for level in reversed(trajectory.dynamics.levels)]


def _groups(trajectory: Trajectory, numbers: Sequence[int]) -> list[list[int]]:
    """The inputs, those together that the same levels batch."""
    groups: dict[tuple[bool, ...], list[int]] = {}
    for number in numbers:
        groups.setdefault(tuple(_batched(trajectory, number)), []).append(number)
    return list(groups.values())


def _final_state(trajectory: Trajectory, moved: dict[int, Tensor]) -> Leaves:
    """The final states of rollouts with some inputs replaced by stacks of them, along a new first axis."""
    dynamics, count, size = trajectory.dynamics, trajectory.dynamics.state_count, len(next(iter(moved.values())))
    inputs = list(_inputs(trajectory))
    for i, x in enumerate(inputs):
        inputs[i] = moved[i] if i in moved else (x.expand(size, *x.shape) if i < count else x)
    dims = tuple(0 if i < count or i in moved else None for i in range(len(inputs)))
    batched = dynamics.batched(Level(dims, size, "same"))
    record = Record(draws=dict(trajectory.record.draws))
    trajectory.record.counts.gradients += size * dynamics.steps
    with trajectory.record.replay(None, inputs[0].device):
        return roll_out(batched, inputs[:count], inputs[count:], None, record, Watch())[0]


def _losses_again(trajectory: Trajectory) -> Tensor:
    """The losses of one more rollout without perturbation: a loss that differs would drown the differences."""
    record = Record(draws=dict(trajectory.record.draws))
    trajectory.record.counts.gradients += trajectory.steps
    with trajectory.record.replay(None, trajectory.initial[0].device):
        return roll_out(trajectory.dynamics, trajectory.initial, trajectory.extras, None, record, Watch())[1]


def _responses(slope: Leaves, cotangent: Leaves, batched: list[bool]) -> Tensor:
    """The cotangent's product with each difference, summed over the tasks that share the inputs: ``[Q, ...]``."""
    total = Tasks(1 + len(batched)).dot(slope, slope.map(lambda s, c: c.expand_as(s), cotangent))
    summed = [axis + 1 for axis, own in enumerate(batched) if not own]
    return total.sum(dim=summed) if summed else total
