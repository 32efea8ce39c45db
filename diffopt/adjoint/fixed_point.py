"""The derivative of a fixed point of a step, by one linear system."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import final

import torch
from torch import Tensor

from diffopt.adjoint.direct_terms import DirectTerms
from diffopt.adjoint.held_buffers import refuse_held_buffers
from diffopt.adjoint.trajectory import Cotangents, Trajectory
from diffopt.distributed.sharded import spread_like
from diffopt.errors import EstimateWarning, LinearSolveError, RandomnessError
from diffopt.linear_solve import GMRES, ConjugateGradient, LinearSolution, LinearSolver, Matvec, refuse_unsolved
from diffopt.rollout.along import NEVER
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.field import VectorField
from diffopt.rollout.problem import Problem
from diffopt.rollout.ranks import refuse_shards
from diffopt.rollout.refusals import refuse_other_losses
from diffopt.rollout.replay import Replay
from diffopt.rollout.step_graph import Block
from diffopt.tensors import tracing
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.spread import gathered, is_spread
from diffopt.tensors.tasks import Tasks


def chosen_solver(solver: LinearSolver | None, loss: Callable[..., Tensor]) -> LinearSolver:
    """The solver that was given, or the default one of a loss or a field; refused if it is of no use for a field."""
    if not isinstance(loss, VectorField):
        return ConjugateGradient() if solver is None else solver
    if solver is None:
        return GMRES(max_iterations=100)
    if solver.symmetric:
        raise LinearSolveError(
            f"{type(solver).__name__} was given a vector field, whose Jacobian need not be symmetric",
            "a solver for any matrix",
            "take GMRES() (the default for fields), Dense() or Neumann()",
        )
    return solver


def refuse_unfit(problem: Problem, solver: LinearSolver | None, *, whole_state: bool) -> None:
    """Refuse a solver, or an optimizer, that is of no use for the problem."""
    chosen_solver(solver, problem.dynamics.loss)
    if not whole_state:
        refuse_held_buffers(problem.dynamics, ends_known=problem.stop is NEVER)


@final
class LastStep:
    """One more step from the end of a trajectory, which is taken to be its fixed point. Derivations (6.1).

    The unknown of the system is the state, or only its params: the buffers are then held fixed, with no derivative.
    Those that the step returns unchanged count as inputs of the step. One graph of the step serves all products.

    Args:
        trajectory: the one at whose end it is.
        solver: as in :func:`chosen_solver`.
        whole_state: whether the unknown is the state.
        root: the solution is where the step makes its buffers, one for each leaf of the params, zero; their Jacobian
            takes the place of ``I - J``.
        losses_there: those at that end, if they are known.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        solver: LinearSolver | None,
        *,
        whole_state: bool = False,
        root: bool = False,
        losses_there: Tensor | None = None,
    ) -> None:
        """Check what is given and record the step."""
        refuse_shards(trajectory.rollout.shards, "an implicit gradient")
        self._trajectory, self._root = trajectory, root
        self._solver = chosen_solver(solver, trajectory.dynamics.loss)
        if not (whole_state or root):
            refuse_held_buffers(trajectory.dynamics, ends_known=True)
        if trajectory.rollout.draws:
            raise RandomnessError(
                "the inner loss draws random numbers",
                "a step with a fixed point to differentiate",
                "use Reverse() or Truncated()",
            )
        _warn_if_not_reached(trajectory)
        self._dynamics = _with_a_step(trajectory.dynamics)
        self._layout = self._dynamics.layout
        self._block, self._after = self._record(losses_there)
        count, params = self._layout.state_count, self._layout.params_count
        buffers = () if root else range(params, count)
        self._still = [i for i in buffers if _same(self._after[i], trajectory.final[i])]
        self._moving = [i for i in range(count if whole_state else params) if i not in self._still]
        self._residuals = [i + params for i in self._moving] if root else self._moving
        self._pull = self._block.pullback_apart(self._residuals, self._moving, past=not root)

    def _record(self, losses_there: Tensor | None) -> tuple[Block, Leaves]:
        """The graph of the step, and the state after it."""
        trajectory, last = self._trajectory, self._layout.steps
        if self._root and trajectory.rollout.graphs:  # the rollout was this step
            return trajectory.rollout.graphs.pop(), trajectory.final
        rollout = replace(trajectory.rollout, wanted=trajectory.wanted, draws={})
        looks = trajectory.check and tracing.current() is None  # (what else is looked at has been seen before)
        replay = Replay(self._dynamics, trajectory.inputs, rollout, trajectory.record.counts, check=looks)
        shape = (*self._layout.tasks_shape, 1)
        losses = trajectory.losses_to_replay() if trajectory.steps else trajectory.final[0].new_empty(*shape)
        block, after = replay.block(trajectory.final, last, last, losses, apart=True)
        if looks:
            there = losses.clone() if losses_there is None else losses_there
            if losses_there is None:
                there[..., last - 1] = replay.losses(trajectory.final, last)
            refuse_other_losses(there, losses, rollout.autocast)
        return block, after

    def system(self, v: Leaves) -> Leaves:
        """``(I - J') v``, or the Jacobian of the root; ``v - C' v`` first, which is zero for gradient descent."""
        self._trajectory.record.counts.add_products(1)
        past, through = self._pull(v)
        return through if self._root else (v - past) - through

    def solve(self, system: Matvec, cotangent: Leaves, start: Leaves | None = None) -> LinearSolution:
        """Solve ``system(v) = cotangent`` for the unknown, and report how.

        Raises:
            LinearSolveError: it is not solved, and the solver throws.
        """
        known = [i for i in range(self._layout.state_count) if i not in {*self._still, *self._moving}]
        _warn_of_held_buffers(self._trajectory, [cotangent[i] for i in known])
        found = _solved(self._solver, system, Leaves(cotangent[i] for i in self._moving), self._trajectory.tasks, start)
        if not self._root:  # its step goes nowhere, and its record is not kept
            self._report(found)
        if self._solver.throw:
            refuse_unsolved(self._solver, found)
        return found

    def _report(self, found: LinearSolution) -> None:
        trajectory, params = self._trajectory, self._layout.params
        final, norm = params(trajectory.final), trajectory.tasks.norm
        distance, way = (norm(params(x) - final) for x in (self._after, trajectory.initial))
        share = torch.where((distance > 0) & (way > 0), self._layout.steps * distance / way, 0)
        _warn_if_no_fixed_point(trajectory, share, way, norm(final))
        trajectory.record.diagnostics.update(
            residual=found.residual,
            iterations=found.iterations,
            stationarity=distance,
            relative_stationarity=share,
        )

    def cotangents(self, v: Leaves, cotangent: Leaves) -> Cotangents:
        """``B' v``; for buffers that the step returns unchanged, what they get by ``v`` besides their own cotangent."""
        initial, direct = list(cotangent.zeros()), DirectTerms(self._trajectory)
        solution = initial.copy()
        for i, x in zip(self._residuals, v, strict=True):
            solution[i] = -x if self._root else x
        self._trajectory.record.counts.add_products(1)
        terms = self._block.pullback(Leaves(solution), state=self._still)
        for i, term in zip(self._still, terms.state, strict=True):
            initial[i] = cotangent[i] + term
        direct.add_block(terms)
        return Cotangents(Leaves(initial), direct.collect())


def _solved(solver: LinearSolver, system: Matvec, b: Leaves, tasks: Tasks, start: Leaves | None) -> LinearSolution:
    """Solve; the vectors of a problem that is spread over ranks are gathered, so that all ranks decide the same."""
    if not any(map(is_spread, b)):
        return solver.run(system, b, tasks, start)

    def spread(whole: Leaves) -> Leaves:
        return whole.map(lambda x, like: spread_like(x, like) if is_spread(like) else x, b)

    found = solver.run(
        lambda v: system(spread(v)).map(gathered),
        b.map(gathered),
        tasks,
        None if start is None else start.map(gathered),
    )
    return found._replace(value=spread(found.value))


def _with_a_step(dynamics: Dynamics) -> Dynamics:
    """The problem, with the step whose fixed point its start is if it was stopped before its first one."""
    layout = dynamics.layout
    return dynamics if layout.steps else replace(dynamics, layout=replace(layout, inner_steps=layout.window))


def _warn_if_not_reached(trajectory: Trajectory) -> None:
    """Warn of a solve that was to end at a small gradient and did not: its end is no fixed point."""
    enough = trajectory.rollout.enough
    if trajectory.check and enough is not None and not bool(enough.all()):
        warnings.warn(
            f"tol was not reached within {trajectory.steps} steps, and Implicit differentiates a fixed point: the "
            "hypergradient is that of another point. Take more steps, a larger tol, or Reverse()",
            EstimateWarning,
            stacklevel=2,
        )


def _warn_of_held_buffers(trajectory: Trajectory, cotangents: list[Tensor]) -> None:
    """Warn of an outer loss that depends on buffers that are held fixed."""
    if trajectory.check and not all([tracing.holds(x == 0) for x in cotangents]):
        warnings.warn(
            "the outer loss depends on the optimizer's buffers, which Implicit holds fixed: nothing is differentiated "
            "through them. Take Implicit(GMRES(max_iterations=100), whole_state=True), or detach the state",
            EstimateWarning,
            stacklevel=2,
        )


def _warn_if_no_fixed_point(trajectory: Trajectory, share: Tensor, way: Tensor, size: Tensor) -> None:
    """Warn of a solve that went far, and would go on nearly as fast as it went on average.

    Not of one whose steps are as small as they can be, nor of a warm start, which is near to its fixed point.
    """
    far = (share > _UNFINISHED) & (way > _FAR * size)
    if trajectory.check and trajectory.rollout.enough is None and not tracing.holds(~far):
        warnings.warn(
            f"the end of {trajectory.steps} steps is no fixed point, which Implicit differentiates: the next step is "
            f"{float(share.max()):.2g} of an average one. Take more steps, a step size that converges, or Reverse()",
            EstimateWarning,
            stacklevel=2,
        )


_UNFINISHED = 0.5
"""The next step over the average one, from which a problem is called unfinished (a quarter of the way is left)."""
_FAR = 0.1
"""The way over the params, up to which a start is called warm."""


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether a step has handed this tensor through."""
    if tracing.current() is not None:  # tensors without numbers, of which views are told apart
        return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)
    return a.data_ptr() == b.data_ptr()
