"""``compare``: several estimators on one problem, side by side: error, cost, depth, time and memory."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from diffopt.adjoint.autograd_function import solves_behind
from diffopt.adjoint.estimator import Estimator
from diffopt.adjoint.reverse import Reverse
from diffopt.comparing.comparison import Comparison, Row, brief, failed_row
from diffopt.comparing.curvature import curvature_number, krylov_residual, stationarity
from diffopt.comparing.notes import notes
from diffopt.comparing.worth import worth
from diffopt.errors import DiffoptError, DisconnectedError, EstimatorError, LossError, RandomnessError
from diffopt.rollout.problem import Outcome, Problem
from diffopt.tensors.arguments import MOST, check_function, check_instance, check_integer
from diffopt.tensors.autograd_graph import leaves_behind
from diffopt.tensors.memory import peak_bytes
from diffopt.tensors.timing import seconds_of
from diffopt.tensors.torch_errors import signature_error
from diffopt.tensors.tree import describe


@runtime_checkable
class Comparable(Protocol):
    """A problem that :func:`compare` can run by itself, such as those of ``diffopt.tasks``."""

    def compare_loss(self, estimator: Estimator) -> Tensor:
        """The outer loss, differentiable in the problem's meta-parameters by ``estimator``."""
        ...


def compare(
    problem: Callable[[Estimator], Tensor] | Comparable,
    estimators: Sequence[Estimator],
    *,
    exact: Estimator | None = None,
    repeats: int = 3,
    directions: int = 0,
) -> Comparison:
    r"""Run every estimator on one problem and set its hypergradient beside the exact one.

    .. math:: \text{error} = \frac{\|\hat\nabla - \nabla\|}{\|\nabla\|},\qquad
              \cos = \frac{\hat\nabla^\top\nabla}{\|\hat\nabla\|\,\|\nabla\|}

    over all leaf tensors that require grad and that the outer loss depends on, together.

    Args:
        problem: ``problem(estimator)`` returns the outer loss, of solves that are given this estimator as it is (or
            within another one); it must be the same problem at every call. Or a problem of ``diffopt.tasks``.
        estimators: what to compare.
        exact: what to compare with; default :class:`diffopt.estimators.Reverse`.
        repeats: runs per estimator, of which the median time counts; a run before them is not timed.
        directions: along how many random directions the exact hypergradient is set beside differences of the outer
            loss, and once beside itself in float64; 0: not at all. ``Comparison.worth`` and the notes then say whether
            any estimator's number is worth something here. For these runs the meta-parameters are given other values,
            and then their own again. Costs two runs of the problem per direction for each of one
            to six step sizes (three directions, a smooth problem: 6 to 18), and one hypergradient in float64.

    Returns:
        A :class:`Comparison`. Time is processor time (on a GPU that between two events of its stream) and includes the
        outer loss; memory is the peak of torch's allocator above the start of the call, tensors of the problem itself
        not counted. An estimator that meets one of
        this library's errors, or a ``RuntimeError`` of torch's (out of memory), costs its own row only: that says
        ``failed``, and a note has the message.

    Raises:
        EstimatorError: ``exact`` or an entry of ``estimators`` is not one, or ``problem`` runs no solve with the one
            that it is given; or every one of them failed.
        LossError: ``problem`` is not a function of an estimator, or does not return a scalar.
        HyperparameterError: ``repeats`` is not an integer >= 1, or ``directions`` not one >= 0.
        RandomnessError: the outer loss is another at the next call with ``exact``, by more than the third root of its
            precision (6e-6 of it in float64, 5e-3 in float32). At later calls, that costs the row.
        DisconnectedError: the outer loss depends on no tensor that requires grad, or its exact gradient is zero.

    Example:
        >>> import torch, diffopt
        >>> from diffopt.estimators import FirstOrder, Truncated
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> def problem(estimator):
        ...     solution = diffopt.solve(
        ...         lambda w: w.square().sum(), w, optimizer=diffopt.SGD(0.1), steps=3, estimator=estimator
        ...     )
        ...     return solution.params.square().sum()
        >>> first_order, truncated = diffopt.compare(problem, [FirstOrder(), Truncated(3)]).rows
        >>> round(first_order.relative_error, 4), round(truncated.relative_error, 4)  # 1 / 0.8**3 - 1
        (0.9531, 0.0)
    """
    run, reference_estimator = _checked(problem, estimators, exact, repeats)
    directions = check_integer("compare: directions", directions, 0, high=MOST + 1, note=f" (and at most {MOST})")
    watched, solves = _watched(reference_estimator)
    loss = _outer_loss(run, watched)
    again = run(reference_estimator)
    # what is made anew in every call is no meta-parameter
    lasting = {id(leaf) for leaf in leaves_behind(again)}
    leaves = [leaf for leaf in leaves_behind(loss) if id(leaf) in lasting]
    if not leaves:
        raise DisconnectedError(
            "the outer loss depends on no tensor that requires grad and outlives a call",
            "one to compare the hypergradients of",
            "make the meta-parameters once, outside the function",
        )
    if not solves:
        raise EstimatorError(
            f"the problem ran no solve with the estimator that it was given ({brief(reference_estimator)})",
            "it to pass the estimator on",
            "write diffopt.solve(..., estimator=estimator)",
        )
    _refuse_change(loss, again)
    del again
    known = [number for number in map(_curvature, solves_behind(loss)) if number is not None]
    curvature = max(known, default=None)
    reference = _flat(torch.autograd.grad(loss, leaves, materialize_grads=True))
    if float(reference.norm()) == 0:
        raise DisconnectedError(
            "the exact hypergradient is zero", "one to compare with", "choose another start or outer loss"
        )
    rows = tuple(_tried(run, estimator, leaves, reference, int(repeats)) for estimator in estimators)
    if rows and all(row.failure for row in rows):
        raise EstimatorError(
            "every estimator failed",
            "one that this problem can be differentiated by",
            f"{rows[0].estimator}: {rows[0].failure}",
        )
    found = worth(run, reference_estimator, leaves, reference, directions, loss.dtype) if directions else None
    return Comparison(rows, curvature, (*notes(rows, curvature), *(found.notes() if found else ())), found)


def _checked(
    problem: Any, estimators: Any, exact: Any, repeats: Any
) -> tuple[Callable[[Estimator], Tensor], Estimator]:
    """The problem as a function and the estimator to compare with, once all arguments are found right."""
    if not isinstance(estimators, list | tuple):
        raise EstimatorError(f"estimators is {describe(estimators)}", "a list of them", "put it in [ ]")
    for i, estimator in enumerate(estimators):
        check_instance(f"estimators[{i}]", estimator, Estimator, "a diffopt.estimators object", EstimatorError)
    check_instance("exact", exact, Estimator, "a diffopt.estimators object", EstimatorError, also=(None,))
    check_integer("compare: repeats", repeats, 1, high=MOST + 1, note=f" (and at most {MOST})")
    if isinstance(problem, Comparable):
        return problem.compare_loss, exact or Reverse()
    check_function("problem", problem, "a function of an estimator", LossError, "see the example")
    return cast("Callable[[Estimator], Tensor]", problem), exact or Reverse()


def _outer_loss(run: Callable[[Estimator], Tensor], estimator: Estimator) -> Tensor:
    """What a problem returns, once it is found to be a scalar."""
    try:
        loss = run(estimator)
    except TypeError as error:
        wrong = signature_error(error, "the problem", run, 1, "one argument, the estimator")
        if wrong is None:
            raise
        raise wrong from error
    if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
        raise LossError(f"the problem returned {describe(loss)}", "one floating scalar tensor", "reduce it")
    return loss


def _watched(estimator: Estimator) -> tuple[Estimator, list[int]]:
    """A copy of an estimator, and the list in which it notes how many steps each solve has that is run with it.

    # NOTE [a copy, not a wrapper]
    A problem may look at what it is given: at its class, at its fields. So this is an object of the same class, whose
    own ``run`` stands before that of the class; the solve is then run with the estimator itself.
    """
    watched, steps = copy.copy(estimator), list[int]()

    def run(problem: Problem) -> Outcome:
        steps.append(problem.dynamics.layout.steps)
        return estimator.run(problem)

    object.__setattr__(watched, "run", run)
    return watched, steps


def _refuse_change(before: Tensor, after: Tensor) -> None:
    """Refuse a problem whose outer loss, by one estimator, differs from call to call by more than round-off."""
    first, second = before.item(), after.item()
    both_nan = math.isnan(first) and math.isnan(second)  # which the backward pass tells better
    if not both_nan and not math.isclose(first, second, rel_tol=torch.finfo(before.dtype).eps ** (1 / 3)):
        raise RandomnessError(
            f"the problem's outer loss was {first:.6g}, and {second - first:+.1e} from there at the next call with the "
            "same estimator",
            "the same problem at every call",
            "draw random numbers once, outside, or begin it with torch.manual_seed(0); keep no state in it",
        )


def _curvature(node: Any) -> float | None:
    """The curvature number of one solve; ``None`` where its loss cannot be evaluated for many steps at once."""
    call, saved = node.call, node.saved_tensors
    try:
        return curvature_number(call.dynamics, saved[: len(saved) - call.state_count])
    except RuntimeError:  # random numbers, or what vmap cannot run
        return None


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def _tried(
    run: Callable[[Estimator], Tensor], estimator: Estimator, leaves: list[Tensor], reference: Tensor, repeats: int
) -> Row:
    """An estimator's row, whatever becomes of it: those of the others have taken their time."""
    try:
        return _row(run, estimator, leaves, reference, repeats)
    except (DiffoptError, RuntimeError) as error:
        return failed_row(estimator, error)


def _row(
    run: Callable[[Estimator], Tensor], estimator: Estimator, leaves: list[Tensor], reference: Tensor, repeats: int
) -> Row:
    watched, solves = _watched(estimator)
    loss = run(watched)
    nodes = solves_behind(loss)
    found = _flat(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
    records = [node.call.record for node in nodes]
    loss = loss.detach()
    del nodes
    times = [_timed(run, estimator, leaves, loss) for _ in range(repeats)]

    def total(name: str) -> int | None:
        return sum(getattr(record.counts, name) for record in records) if records else None

    norms = found.norm() * reference.norm()
    peak = peak_bytes(lambda: torch.autograd.grad(run(estimator), leaves, allow_unused=True))
    return Row(
        estimator=brief(estimator),
        relative_error=float((found - reference).norm() / reference.norm()),
        cosine=float(found @ reference / norms) if float(norms) > 0 else 0.0,
        gradients=total("gradients"),
        products=total("products"),
        depth=total("depth"),
        states=sum(record.kept.states for record in records) if records else None,
        seconds=statistics.median(times),
        megabytes=None if peak is None else peak / 1e6,
        stationarity=stationarity(records),
        residual=krylov_residual(records),
        random=estimator.claims(max(solves, default=1)).random,
        used=bool(solves),
        rule=estimator,
    )


def _timed(run: Callable[[Estimator], Tensor], estimator: Estimator, leaves: list[Tensor], expected: Tensor) -> float:
    """Seconds of one hypergradient, whose outer loss must be the expected one."""
    losses: list[Tensor] = []

    def work() -> None:
        losses.append(run(estimator))
        torch.autograd.grad(losses[0], leaves, allow_unused=True)

    seconds = seconds_of(work, expected.device)
    _refuse_change(expected, losses[0])
    return seconds


__all__ = ["Comparable", "Comparison", "Row", "compare"]
