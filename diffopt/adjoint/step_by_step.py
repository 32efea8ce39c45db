"""The derivatives of single steps, for estimators that go from one to the next."""

from __future__ import annotations

from typing import final

from torch import Tensor

from diffopt.adjoint.direct_terms import DirectTerms
from diffopt.adjoint.trajectory import Cotangents, Trajectory
from diffopt.adjoint.update_derivatives import UpdateGraph
from diffopt.errors import EstimatorError
from diffopt.tensors import derivatives
from diffopt.tensors.leaves import Leaves


@final
class StepByStep:
    r"""The blocks ``C_t, E_t, D_t, H_t, M_t`` of each step of a rollout, as products with their transposes.

    An estimator moves an adjoint from step ``T`` down to step 1 with them (derivations, section 0); what goes to the
    meta-parameters is gathered on the way. The exact recursion (1.1)-(1.3) reads:

    >>> def pullback(self, trajectory, cotangent):
    ...     steps, adjoint = StepByStep(trajectory), cotangent
    ...     for t in range(trajectory.steps, 0, -1):
    ...         push = steps.curvature(t, steps.turn(t, adjoint))
    ...         adjoint = steps.through(t, adjoint, push)
    ...     return steps.cotangents(adjoint)

    Its ``keep`` returns ``Keep(first=1, checkpoint=1, gradients=True)``. All tensors are stacked over tasks.

    Raises:
        EstimatorError: states or gradients were not kept.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        """Look at ``trajectory``; nothing is computed yet."""
        kept = trajectory.rollout
        if trajectory.steps and not len(kept.states) == len(kept.gradients) == trajectory.steps:
            raise EstimatorError(
                f"StepByStep: {len(kept.states)} states and {len(kept.gradients)} gradients were kept",
                f"{trajectory.steps} of each",
                "return Keep(first=1, checkpoint=1, gradients=True) from keep()",
            )
        self._trajectory, self._direct = trajectory, DirectTerms(trajectory)
        self._losses = trajectory.losses_to_replay()
        self._update: tuple[int, UpdateGraph] | None = None

    def turn(self, step: int, adjoint: Leaves) -> Leaves:
        r""":math:`E_t^\top\Lambda`: the adjoint of the gradient, like the params."""
        return self._graph(step).to_gradient(adjoint)

    def through(self, step: int, adjoint: Leaves, push: Leaves | None = None) -> Leaves:
        r""":math:`C_t^\top\Lambda + P^\top y`, like the state, for ``push`` ``y``; gathers :math:`D_t^\top\Lambda`."""
        update = self._graph(step)
        self._direct.add(step, update.to_hyperparameters(adjoint))
        before = update.to_state(adjoint)
        return before if push is None else self._trajectory.layout.pushed(before, push)

    def curvature(self, step: int, vector: Leaves) -> Leaves:
        r""":math:`H_t u`, like the params; gathers :math:`M_t^\top u`. One joint product."""
        trajectory, dynamics, read = self._trajectory, self._trajectory.dynamics, self._trajectory.wanted_of("read")
        params = dynamics.layout.params(trajectory.rollout.states[step])
        current = list(dynamics.layout.at_step(trajectory.inputs, step)[0])

        def gradients(roots: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            own, others = roots[: len(params)], roots[len(params) :]
            for place, root in zip(read, others, strict=True):
                current[place.number] = root
            losses = dynamics.losses(own, current)
            self._losses[..., step - 1] = losses.detach()
            return derivatives.filled(derivatives.gradient(losses, own, differentiable=True), own)

        inputs = [*params, *(current[place.number] for place in read)]
        with trajectory.rollout.replay(step, inputs[0].device):
            graph = derivatives.Graph.record(gradients, inputs, check=True)
            terms = graph.pullback(vector, range(len(inputs)))
        self._direct.add(step, dict(zip(read, terms[len(params) :], strict=True)))
        trajectory.record.counts.add_products(1)
        return Leaves(derivatives.or_zeros(terms[: len(params)], vector))

    def weighted(self, weights: Tensor, vector: Leaves) -> Leaves:
        """``vector`` with each task's part multiplied by its own number; ``weights`` has ``trajectory.tasks_shape``."""
        return self._trajectory.tasks.times(weights, vector)

    def cotangents(self, initial: Leaves) -> Cotangents:
        """What the estimator returns: the adjoint of the initial state, and what was gathered."""
        self._trajectory.refuse_other_losses(self._losses)
        return Cotangents(initial, self._direct.collect())

    def _graph(self, step: int) -> UpdateGraph:
        if self._update is None or self._update[0] != step:
            hypers = self._trajectory.wanted_of("hyperparameters")
            self._update = step, self._trajectory.updates.graph(step, hypers)
        return self._update[1]
