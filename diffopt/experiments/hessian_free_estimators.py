r"""HF-MAML, GGS-MAML and ES-MAML as estimators: the exact recursion, its products ``H_t y`` by differences.

The three differ in one method, the product of the inner loss's Hessian with a vector. Each goes through any number of
steps of any optimizer; their authors have one step of gradient descent (HF-MAML), or several (GGS-MAML).
"""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffopt.adjoint.claims import Kind
from diffopt.errors import EstimatorError
from diffopt.estimators import Adjoint, Claims, Cotangents, Keep, StepByStep, Trajectory
from diffopt.rollout.field import VectorField
from diffopt.rollout.problem import Problem
from diffopt.tensors import derivatives
from diffopt.tensors.leaves import Leaves

INPUTS: frozenset[Kind] = frozenset({"init", "hyperparameters"})


@dataclass(frozen=True)
class HessianFree(Adjoint):
    """The exact recursion without a second derivative; what the inner loss reads gets no hypergradient."""

    def claims(self, steps: int) -> Claims:
        """Right in the mean up to the differences' error, of the start and of the optimizer's numbers."""
        return Claims(inputs=INPUTS, second_derivatives=False, random=True, tolerance=0.1)

    def refuse(self, problem: Problem) -> None:
        """Refuse a vector field: differences along a vector give products with its Jacobian, not the transpose."""
        if isinstance(problem.dynamics.loss, VectorField):
            raise EstimatorError(f"{type(self).__name__} was given a vector field", "a loss", "take Reverse()")

    def keep(self, steps: int) -> Keep:
        """Every state, and the gradient there."""
        return Keep(first=1, checkpoint=1, gradients=True)

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        """From step ``T`` down to step 1."""
        steps, adjoint = StepByStep(trajectory), cotangent
        for t in range(trajectory.steps, 0, -1):
            product = self.product(Around(trajectory, t), steps.turn(t, adjoint))
            adjoint = steps.through(t, adjoint, product)
        return steps.cotangents(adjoint)

    @abstractmethod
    def product(self, around: Around, vector: Leaves) -> Leaves:
        """``H_t y``, each task's own."""


@final
class Around:
    """The inner loss of one step around the parameters there."""

    def __init__(self, trajectory: Trajectory, step: int) -> None:
        """Look at nothing yet."""
        self._trajectory, self._step, self.tasks = trajectory, step, trajectory.tasks
        self.params = trajectory.layout.params(trajectory.rollout.states[step])
        self.gradient: Leaves = trajectory.rollout.gradients[step]
        self._read = trajectory.layout.at_step(trajectory.inputs, step)[0]

    def losses(self, moved: Leaves) -> Tensor:
        """The losses at moved parameters, one for each task."""
        with torch.no_grad(), self._replay():
            return self._trajectory.dynamics.losses(self.params + moved, self._read, self._step)

    def gradients(self, moved: Leaves) -> Leaves:
        """The gradients at moved parameters."""
        dynamics = self._trajectory.dynamics
        with torch.enable_grad(), self._replay():
            roots = (self.params + moved).map(lambda x: x.detach().requires_grad_())
            losses = dynamics.losses(roots, self._read, self._step)
            found = dynamics.gradient(losses, roots, self._step, differentiable=False)
        self._trajectory.record.counts.gradients += 1
        return Leaves(derivatives.or_zeros(found, roots))

    def _replay(self) -> AbstractContextManager[None]:
        """With the random numbers that the step drew."""
        return self._trajectory.rollout.replay(self._step, self.params[0].device)

    def direction(self, generator: torch.Generator | None) -> Leaves:
        """Gaussian, each task's own."""
        return self.params.map(lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device))


@final
@dataclass(frozen=True)
class HFMAML(HessianFree):
    r"""HF-MAML: one central difference of gradients along the vector itself, :math:`\|d\| =` ``radius``.

    .. math:: Hy \approx \frac{\|y\|}{2\|d\|}\big(g(\phi + d) - g(\phi - d)\big),\qquad d \parallel y

    Reference: Fallah, Mokhtari and Ozdaglar (2020), "On the Convergence Theory of Gradient-Based Model-Agnostic
    Meta-Learning Algorithms".
    """

    radius: float

    def claims(self, steps: int) -> Claims:
        """Nothing random, nor linear beyond the differences' error."""
        return Claims(inputs=INPUTS, second_derivatives=False, tolerance=min(0.1, max(self.radius, 1e-5)))

    def product(self, around: Around, vector: Leaves) -> Leaves:
        """Two gradients."""
        move = self.radius * around.tasks.unit(vector)
        slope = (around.gradients(move) - around.gradients(-1.0 * move)) / (2 * self.radius)
        return around.tasks.times(around.tasks.norm(vector), slope)


@final
@dataclass(frozen=True)
class GGSMAML(HessianFree):
    r"""GGS-MAML: gradient differences along ``directions`` random directions, the Hessian's Gaussian smoothing.

    .. math:: Hy \approx \frac1Q\sum_j\frac{g(\phi + \mu z_j) - g(\phi)}\mu\,z_j^\top y,\qquad z_j \sim N(0, I)

    Reference: Ji, Yang and Liang (2020), "Multi-Step Model-Agnostic Meta-Learning: Convergence and Improved
    Algorithms", arXiv 2002.07836, its first versions.
    """

    directions: int
    radius: float
    generator: torch.Generator | None = None

    def product(self, around: Around, vector: Leaves) -> Leaves:
        """One gradient a direction."""
        total = vector.zeros()
        for _ in range(self.directions):
            z = around.direction(self.generator)
            slope = (around.gradients(self.radius * z) - around.gradient) / self.radius
            total = around.tasks.plus(total, around.tasks.dot(z, vector) / self.directions, slope)
        return total


@final
@dataclass(frozen=True)
class ESMAML(HessianFree):
    r"""ES-MAML with a Hessian by evolution strategies: differences of the loss alone.

    .. math:: Hy \approx \frac1Q\sum_j\frac{\ell(\phi + \sigma z_j) + \ell(\phi - \sigma z_j) - 2\ell(\phi)}{2\sigma^2}
              (z_jz_j^\top - I)\,y,\qquad z_j \sim N(0, I)

    In both directions and with the loss itself taken off: of the same mean as the paper's
    :math:`\sigma^{-2}\ell(\phi + \sigma z)(zz^\top - I)`, and less noise.

    Reference: Song et al. (2020), "ES-MAML: Simple Hessian-Free Meta Learning".
    """

    directions: int
    radius: float
    generator: torch.Generator | None = None

    def product(self, around: Around, vector: Leaves) -> Leaves:
        """Two losses a direction, and one."""
        total, here = vector.zeros(), around.losses(vector.zeros())
        for _ in range(self.directions):
            z = around.direction(self.generator)
            move = self.radius * z
            bent = (around.losses(move) + around.losses(-1.0 * move) - 2 * here) / (2 * self.radius**2)
            along = around.tasks.times(around.tasks.dot(z, vector), z) - vector
            total = around.tasks.plus(total, bent / self.directions, along)
        return total
