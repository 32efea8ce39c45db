"""What an estimator is, and how one is run that moves an adjoint back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from diffopt.adjoint.autograd_function import prepared
from diffopt.adjoint.call import Call
from diffopt.adjoint.claims import Claims
from diffopt.adjoint.trajectory import Cotangents, Trajectory
from diffopt.errors import EstimatorError, InPlaceError
from diffopt.rollout.problem import Outcome, Problem
from diffopt.rollout.record import Keep, Record, Watch
from diffopt.tensors import tracing, transforms
from diffopt.tensors.arguments import check_instance
from diffopt.tensors.leaves import Leaves


class Estimator(ABC):
    """How a solution is differentiated: a small frozen object passed to :func:`diffopt.solve`.

    Almost every estimator is an :class:`Adjoint`; derive from that to write one.

    Attributes:
        traced: whether it can be part of a compiled program (:func:`diffopt.compiled`): it then goes back over the
            rollout by ``trajectory.sweep`` or ``trajectory.by_program`` only, if at all, and looks at no number.
        if_wrong: why it may be far off, said by :func:`diffopt.compare` where it is; empty: no reason is known.
        if_unsolved: what to do about a large ``residual`` in its diagnostics, said likewise.
    """

    traced: ClassVar[bool] = False
    if_wrong: ClassVar[str] = ""
    if_unsolved: ClassVar[str] = ""

    @abstractmethod
    def run(self, problem: Problem) -> Outcome:
        """Roll the inner problem out, differentiable in all its inputs in this estimator's way."""

    def claims(self, steps: int) -> Claims:
        """What holds of this estimator on ``steps`` inner steps; unless overridden, everything."""
        return Claims()

    def if_curved(self, number: float) -> str:
        """What :func:`diffopt.compare` says of it where the curvature over the rollout is ``number`` > 1; or ``""``."""
        return ""


class Adjoint(Estimator):
    r"""An estimator that moves the adjoint back over a stored trajectory: ``Lambda_T -> (Lambda_0, direct terms)``.

    An estimator says what it will revisit (:meth:`keep`) and what it does with it (:meth:`pullback`), and, unless it is
    exact for every input, what it :meth:`claims`. All are written for one problem and are right for a batch of them,
    under every transform, for every optimizer and meta-parameter.

    Attributes:
        takes_running_costs: whether :meth:`pullback` takes the cotangents of ``Solution.losses`` and of what was
            observed, ``trajectory.running``, as ``trajectory.sweep`` does. If not, they are refused.

    Example:
        First-order MAML: the adjoint of the final state is handed to the initial one as it is.

        >>> import torch, diffopt
        >>> from diffopt.estimators import Adjoint, Cotangents, Keep
        >>> class Straight(Adjoint):
        ...     def keep(self, steps):
        ...         return Keep(first=steps + 1)
        ...     def pullback(self, trajectory, cotangent):
        ...         return Cotangents(cotangent, {})
        >>> w = torch.ones(2, requires_grad=True)
        >>> solution = diffopt.solve(
        ...     lambda w: w.square().sum(), w, optimizer=diffopt.SGD(0.1), steps=3, estimator=Straight()
        ... )
        >>> solution.params.sum().backward()
        >>> w.grad
        tensor([1., 1.])
    """

    takes_running_costs: ClassVar[bool] = False

    @abstractmethod
    def keep(self, steps: int) -> Keep:
        """What of a rollout of ``steps`` steps the pullback will revisit."""

    def refuse(self, problem: Problem) -> None:
        """Refuse a problem that this estimator cannot be right for; unless overridden, none is refused."""

    @abstractmethod
    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        """The adjoint of the initial state and the direct terms, given that of the final state."""

    def pullbacks(self, trajectory: Trajectory, cotangents: Sequence[Leaves]) -> list[Cotangents] | None:
        """:meth:`pullback` for many cotangents of one large problem, taking its steps again once for all.

        ``None``: not in this way; the problem is then stacked, with a copy of its state for each cotangent.
        """
        return None

    @final
    def run(self, problem: Problem) -> Outcome:
        """Roll out without a graph and attach this estimator as the derivative."""
        dynamics, inputs, check = problem.dynamics, problem.inputs.flat, problem.check
        self.refuse(problem)
        keep = self.keep(dynamics.layout.steps)
        if dynamics.compile:
            keep = keep.of_compiled(traced=self.traced)
        level = transforms.transform_level() if check else 0
        # (what keeps graphs while they are small looks for state only where they are not)
        recomputed = keep.evaluates and keep.checkpoint not in ("graph", None)
        state = check and (dynamics.compile or recomputed)
        watch = Watch(check, check and torch.is_grad_enabled(), range(1, level + 1), state)
        if tracing.current() is not None:  # what else is looked at has been seen by the call before
            watch = Watch(check)
        record = Record()
        found = prepared(Call(dynamics, self, keep, record, watch, problem.stop), inputs)()
        count = dynamics.layout.state_count
        return Outcome(tuple(found[:count]), tuple(found[count:]), record)


def check_estimator(estimator: Any) -> None:
    """Refuse what is not an estimator."""
    check_instance("estimator", estimator, Estimator, "a diffopt.estimators object", EstimatorError)


def versions(problem: Problem) -> list[int]:
    """How often each tensor that a problem is given has been written to; nothing where checks are off."""
    inputs = problem.inputs
    if not problem.check:
        return []
    given = (*inputs.params, *inputs.read, *inputs.hyperparameters)
    if transforms.current_level() is None and set(map(type, given)) == {Tensor}:
        return [x._version for x in given]  # (none was made in inference mode: of such a copy is read)
    return [transforms.version(x) for x in given]


def refuse_changes(problem: Problem, before: list[int]) -> None:
    """Refuse a loss, or an update, that has changed in place what it was given since ``before``."""
    after = versions(problem)
    if after != before:
        names = problem.dynamics.layout.names()
        called = (*names.params, *names.read, *names.hyperparameters)
        changed = next(name for name, old, new in zip(called, before, after, strict=True) if old != new)
        raise InPlaceError(
            f"the inner loss (or the optimizer) has changed {changed} in place",
            "it to stay as it was",
            "write x = x + y for x += y; of a batch norm's buffers pass clones, or use track_running_stats=False",
        )
