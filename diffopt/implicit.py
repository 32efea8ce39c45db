"""Implicit differentiation: the hypergradient of a fixed point, whatever found it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar, final

import torch
from torch import Tensor

from diffopt.adjoint.estimator import Adjoint, refuse_changes, versions
from diffopt.adjoint.fixed_point import LastStep, chosen_solver
from diffopt.adjoint.implicit_gradients import Call, implicit_gradients_at
from diffopt.adjoint.stationarity import Point, refuse_far_from_stationary, refuse_kink, refuse_long_step
from diffopt.adjoint.trajectory import Cotangents, Trajectory
from diffopt.errors import EstimatorError
from diffopt.inner_problem import checked_problem
from diffopt.linear_solve import LinearSolution, LinearSolver, Tasks, leaves_like, refuse_not_finite
from diffopt.optimizers.base import Buffers, Optimizer
from diffopt.rollout.given import params_leaves
from diffopt.rollout.layout import Slot
from diffopt.rollout.problem import Outcome, Problem
from diffopt.rollout.record import Keep, Watch
from diffopt.tensors import transforms, tree
from diffopt.tensors.arguments import check_flag, check_instance, check_number
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.torch_errors import forward_mode_error

Params = TypeVar("Params")


class ImplicitGradients(NamedTuple):
    """What :func:`implicit_gradients` returns.

    Attributes:
        args: the hypergradient of every argument of the loss, trees like ``args`` (``None`` where it is not a floating,
            dense tensor).
        multiplier: the solution ``v`` of the linear system, a tree like ``params``: the next call's ``start``.
        system: how the linear system was solved.
    """

    args: Any
    multiplier: Any
    system: LinearSolution


@final
@dataclass(frozen=True)
class _Stay(Optimizer):
    """A step that goes nowhere.

    # NOTE [a step that goes nowhere]
    ``implicit`` is a solve of one step that leaves params where they are and puts the gradient into a buffer: so every
    check of ``solve`` is made, under every transform, and the gradient is at hand. That buffer is differentiated. (For
    a step of gradient descent ``I - J`` is the Hessian too, but the identity swallows what is below its round-off.)
    """

    elementwise: ClassVar[bool] = True

    def init(self, params: Leaves) -> Buffers:
        """Zeros in place of the gradient."""
        return {"gradient": params.virtual_zeros()}

    def update(self, params: Leaves, grads: Leaves, buffers: Buffers, step: int) -> tuple[Leaves, Buffers]:
        """The same params, and their gradient."""
        return params, {"gradient": grads}


_STAY = _Stay()


@final
@dataclass(frozen=True)
class _AtSolution(Adjoint):
    """The estimator behind :func:`implicit`."""

    solver: LinearSolver
    stationarity: float | None

    def keep(self, steps: int) -> Keep:
        return Keep(first=1, checkpoint=None)

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        tasks = trajectory.tasks
        at = Point.of(trajectory.dynamics, trajectory.inputs, trajectory.final, trajectory.rollout)
        refuse_far_from_stationary(at, tasks, self.stationarity)

        # the only step went nowhere: the losses there are those of the rollout
        step = LastStep(trajectory, self.solver, root=True, losses_there=trajectory.rollout.losses)
        if self.stationarity is not None:
            refuse_long_step(at, step.system, tasks, self.stationarity)
            refuse_kink(at, tasks)
        found = step.solve(step.system, cotangent)
        return Cotangents(None, step.cotangents(found.value, cotangent).direct)


def implicit(
    loss: Callable[..., Tensor],
    params: Params,
    *args: Any,
    solver: LinearSolver | None = None,
    stationarity: float | None = 1e-2,
    check: bool = True,
) -> Params:
    r"""Attach implicit gradients to a minimiser that was found by any means.

    .. math:: \frac{d\phi^\star}{d\theta} = -\Big(\frac{\partial^2 \ell}{\partial\phi^2}\Big)^{-1}
              \frac{\partial^2\ell}{\partial\phi\,\partial\theta}\quad\text{where}\quad
              \frac{\partial\ell}{\partial\phi}(\phi^\star, \theta) = 0

    Exact if ``params`` is a stationary point and the system is solved. Cost: one gradient now; backward, one HVP per
    iteration of the solver and two more, and where there may be a kink some gradients. Memory: the graph of one
    gradient, from the call on (if it takes more than 1 GiB, it is recorded again in the backward pass).

    Not for: points that are not stationary, minimisers at a kink of the loss (Lasso's zeros), or a singular Hessian
    (add a penalty, or damp the solver).

    Args:
        loss: ``loss(params, *args)``, a floating scalar; or a :class:`diffopt.VectorField`, of which ``params`` are a
            root.
        params: the minimiser, a tree of floating tensors; their own history is cut off.
        args: what the loss reads; the tensors in it get the hypergradient.
        solver: a :mod:`diffopt.linear_solve` object; default :class:`~diffopt.linear_solve.ConjugateGradient`, of a
            vector field :class:`~diffopt.linear_solve.GMRES` of 100 products at most.
        stationarity: refuse ``params`` if the gradient there is larger than this times one plus their norm, whatever
            the units of the loss; and, in the backward pass, if Newton's step is longer than ten times that by the
            curvature along the gradient (one HVP more), which no units change, or if some of ``params`` are zero and
            the loss has a kink there, at which the gradient turns around. ``None``: do not look.
        check: as in :func:`diffopt.solve`.

    Returns:
        A tree like ``params`` with the same values.

    Raises:
        StationarityError: the gradient at ``params`` is not small, the stationary point is far from them, or the loss
            has a kink there.
        LinearSolveError: in the backward pass, if the linear system was not solved.

    Example:
        The minimiser of ``(w - a)**2 + w**2`` is ``a / 2``.

        >>> import torch, diffopt
        >>> a = torch.tensor(3.0, requires_grad=True)
        >>> w = diffopt.implicit(lambda w, a: (w - a) ** 2 + w**2, torch.tensor(1.5), a)
        >>> w.backward()
        >>> a.grad
        tensor(0.5000)

    Reference: Pedregosa (2016), "Hyperparameter Optimization with Approximate Gradient". Derivations (6.1).
    """
    stationarity = check_number("implicit: stationarity", stationarity, 0, also=(None,))
    check_flag("check", check)
    estimator = _AtSolution(_checked_solver(solver, loss), stationarity if check else None)
    problem = checked_problem(loss, _cut_off(params), args, _STAY, 1, None, check)
    outcome = _run(estimator, problem)
    layout = problem.dynamics.layout
    if not transforms.transforms_active():
        detached = Leaves(x.detach() for x in outcome.state)
        at = Point.of(problem.dynamics, problem.inputs, detached, outcome.record.rollout)
        refuse_far_from_stationary(at, Tasks(0), estimator.stationarity)
    result: Params = tree.unflatten(layout.params_structure, layout.params(outcome.state))
    return result


def implicit_gradients(
    loss: Callable[..., Tensor],
    params: Any,
    *args: Any,
    cotangent: Any,
    solver: LinearSolver | None = None,
    start: Any = None,
    check: bool = True,
) -> ImplicitGradients:
    r"""The implicit hypergradient as a plain function, with the linear system's solution in and out.

    .. math:: v = \Big(\frac{\partial^2 \ell}{\partial\phi^2}\Big)^{-1} \frac{\partial F}{\partial\phi},\qquad
              \nabla = -\frac{\partial^2\ell}{\partial\theta\,\partial\phi}\,v

    For outer loops that start the solver where it ended the last time: with a few inner steps and a few solver
    iterations per outer step, warm starts of ``params`` and ``v`` reach a stationary point where cold starts stall
    (derivations, section 6.3). So nothing is required of ``params``, and an unconverged system is an error only if the
    solver throws. Works under ``torch.func.vmap``: then every task has a system of its own (an unconverged one is an
    error all the same). What is returned is to be used as numbers: under ``torch.func.grad`` its derivative is refused.

    Args:
        loss: ``loss(params, *args)``, a floating scalar; or a :class:`diffopt.VectorField`, of which ``params`` are a
            root.
        params: where the inner problem stands.
        args: what the loss reads.
        cotangent: the gradient of the outer loss with respect to ``params``, a tree like it.
        solver: default :class:`~diffopt.linear_solve.ConjugateGradient`, of a vector field
            :class:`~diffopt.linear_solve.GMRES`.
        start: the last call's ``multiplier``; ``None``: zero.
        check: as in :func:`diffopt.solve`.

    Raises:
        LinearSolveError: the system was not solved, if the solver throws; or the solver is of no use for a field.
        SecondDerivativeError: what was returned is being differentiated by a ``torch.func`` transform.
    """
    chosen = _checked_solver(solver, loss)
    problem = checked_problem(loss, _cut_off(params), args, _STAY, 1, None, check)
    layout, inputs = problem.dynamics.layout, problem.inputs
    read = [(place, inputs.at(place)) for place in layout.places if place.part == "read"]
    wanted = tuple(place for place, x in read if x.is_floating_point() and not transforms.is_sparse(x))
    weights = leaves_like(cotangent, "cotangent", "params", inputs.params, layout.params_structure)
    initial = None if start is None else leaves_like(start, "start", "params", inputs.params, layout.params_structure)
    if transforms.has_tangent([*weights, *(initial or ())]):
        raise forward_mode_error("a cotangent, or a start, of implicit_gradients")
    refuse_not_finite(chosen, cotangent=cotangent, start=start)
    before = versions(problem)
    levels = range(1, transforms.transform_level() + 1 if check else 1)
    watch = Watch(check, check and torch.is_grad_enabled(), levels)
    found = implicit_gradients_at(Call(problem.dynamics, chosen, wanted, check, watch), inputs, weights, initial)
    refuse_changes(problem, before)
    by_number = {place.number: term for place, term in found.terms.items()}
    leaves = [by_number.get(x.index) if isinstance(x, Slot) else None for x in layout.args_leaves]
    multiplier = tree.unflatten(layout.params_structure, found.multiplier)
    gradients, _ = tree.unflatten(layout.args_structure, leaves)
    return ImplicitGradients(gradients, multiplier, found.system._replace(value=multiplier))


def _run(estimator: Adjoint, problem: Problem) -> Outcome:
    before = versions(problem)
    outcome = estimator.run(problem)
    refuse_changes(problem, before)
    return outcome


def _cut_off(params: Any) -> Any:
    leaves, structure = params_leaves(params)
    return tree.unflatten(structure, [x.detach() for x in leaves])


def _checked_solver(solver: Any, loss: Any) -> LinearSolver:
    check_instance("solver", solver, LinearSolver, "a diffopt.linear_solve object", EstimatorError, also=(None,))
    return chosen_solver(solver, loss)
