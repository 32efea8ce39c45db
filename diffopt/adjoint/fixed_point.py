"""The derivative of a fixed point of a step, by one linear system."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from diffopt.adjoint.held_buffers import refuse_held_buffers
from diffopt.adjoint.trajectory import Cotangents, DirectTerms, Trajectory
from diffopt.distributed.sharded import spread_like
from diffopt.errors import EstimateWarning, LinearSolveError, RandomnessError
from diffopt.linear_solve import GMRES, ConjugateGradient, LinearSolution, LinearSolver, Matvec, refuse_unsolved
from diffopt.rollout.along import NEVER
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.field import VectorField
from diffopt.rollout.problem import Problem
from diffopt.rollout.refusals import refuse_other_losses
from diffopt.rollout.replay import Replay
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


def implicit_pullback(
    trajectory: Trajectory,
    cotangent: Leaves,
    solver: LinearSolver | None,
    *,
    whole_state: bool = False,
    root: bool = False,
    start: Leaves | None = None,
    look: Callable[[Matvec], None] = lambda system: None,
    losses_there: Tensor | None = None,
) -> tuple[Cotangents, LinearSolution]:
    r"""The implicit hypergradient at the end of a trajectory, taken to be a fixed point of its last step.

    .. math:: (I - J^\top)\,v = \frac{\partial F}{\partial s},\qquad \nabla = B^\top v

    The unknown is the state, or only its params: the buffers are then held fixed, with no derivative. Those that the
    step returns unchanged count as inputs of the step. One graph of the step serves all products. Derivations (6.1).
    ``look`` is shown the system before it is solved. ``losses_there``: those at that end, if they are known.
    ``root``: the solution is where the step makes its buffers, one for each leaf of the params, zero; their Jacobian
    takes the place of ``I - J``. ``solver``: as in :func:`chosen_solver`; a system that it does not solve is refused
    if it throws.
    """
    solver = chosen_solver(solver, trajectory.dynamics.loss)
    if not (whole_state or root):
        refuse_held_buffers(trajectory.dynamics, ends_known=True)
    if trajectory.rollout.draws:
        raise RandomnessError(
            "the inner loss draws random numbers",
            "a step with a fixed point to differentiate",
            "use Reverse() or Truncated()",
        )
    _warn_if_not_reached(trajectory)
    dynamics, tasks, counts = _with_a_step(trajectory.dynamics), trajectory.tasks, trajectory.record.counts
    layout = dynamics.layout
    count, last = layout.state_count, layout.steps
    rollout = replace(trajectory.rollout, wanted=trajectory.wanted, draws={})
    replay = Replay(dynamics, trajectory.inputs, rollout, counts, check=trajectory.check)
    losses = (
        trajectory.losses_to_replay() if trajectory.steps else trajectory.final[0].new_empty(*layout.tasks_shape, 1)
    )
    block, after = replay.block(trajectory.final, last, last, losses, apart=True)
    if trajectory.check:
        there = losses.clone() if losses_there is None else losses_there
        if losses_there is None:
            there[..., last - 1] = replay.losses(trajectory.final, last)
        refuse_other_losses(there, losses, rollout.autocast)
    still = [i for i in range(layout.params_count, count) if _same(after[i], trajectory.final[i])]
    moving = [i for i in range(count if whole_state else layout.params_count) if i not in still]
    residuals = [i + layout.params_count for i in moving] if root else moving

    def system(v: Leaves) -> Leaves:
        counts.add_products(1)
        past, through = block.pullback_apart(residuals, v, moving, past=not root)
        return through if root else (v - past) - through

    _warn_of_held_buffers(trajectory, [cotangent[i] for i in range(count) if i not in {*still, *moving}])
    look(system)
    found = _solved(solver, system, Leaves(cotangent[i] for i in moving), tasks, start)
    initial, direct = list(cotangent.zeros()), DirectTerms(trajectory)
    solution = initial.copy()
    for i, x in zip(residuals, found.value, strict=True):
        solution[i] = -x if root else x
    counts.add_products(1)
    terms = block.pullback(Leaves(solution), state=still)
    for i, term in zip(still, terms.state, strict=True):
        initial[i] = cotangent[i] + term
    direct.add_block(terms)
    if not root:  # whose step goes nowhere, and of whose record nobody hears
        final = layout.params(trajectory.final)
        distance, way = (tasks.norm(layout.params(x) - final) for x in (after, trajectory.initial))
        share = torch.where((distance > 0) & (way > 0), layout.steps * distance / way, 0)
        _warn_if_no_fixed_point(trajectory, share, way, tasks.norm(final))
        trajectory.record.diagnostics.update(
            residual=found.residual,
            iterations=found.iterations,
            stationarity=distance,
            relative_stationarity=share,
        )
    if solver.throw:
        refuse_unsolved(solver, found)
    return Cotangents(Leaves(initial), direct.collect()), found


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
    if trajectory.check and any(bool(x.any()) for x in cotangents):
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
    if trajectory.check and trajectory.rollout.enough is None and bool(far.any()):
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
    return a.data_ptr() == b.data_ptr()
