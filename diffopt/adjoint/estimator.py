"""What an estimator is, and the two autograd functions that join an adjoint rule to autograd and ``torch.func``.

# NOTE [two functions with vmap rules]
``_Solve`` is the rollout, ``_Pullback`` its hypergradient. Under vmap each re-applies itself to the stacked tensors
(see ``dynamics.py``, NOTE [a batch of tasks is one problem]), so that however transforms are nested, the rollout and
the rule run at the bottom, on plain tensors. A rule therefore never sees a transform.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from diffopt.adjoint.claims import Claims
from diffopt.adjoint.trajectory import Cotangents, Trajectory
from diffopt.errors import InPlaceError, NonFiniteGradientError, RandomnessError, SecondDerivativeError
from diffopt.rollout.checks import warn_of_precision
from diffopt.rollout.dynamics import Dynamics, Level
from diffopt.rollout.hidden_state import hidden_state_error
from diffopt.rollout.loop import refuse_other_losses, roll_out, roll_out_recorded
from diffopt.rollout.record import Keep, Record, Watch
from diffopt.tensors import derivatives, transforms
from diffopt.tensors.leaves import Leaves, all_finite
from diffopt.tensors.torch_errors import forward_mode_error, is_in_place


@final
@dataclass(frozen=True)
class Problem:
    """An inner problem ready to run: its dynamics, its initial state, its extras, and whether to check values.

    ``popped`` are the levels of transforms that the problem has been taken out of, whose tensors it may not capture.
    """

    dynamics: Dynamics
    state: tuple[Tensor, ...]
    extras: tuple[Tensor, ...]
    check: bool
    popped: range = range(0)


@final
@dataclass(frozen=True)
class Outcome:
    """The end of a rollout: the final state, the inner losses ``[steps]``, and what was kept for the backward pass."""

    state: tuple[Tensor, ...]
    losses: Tensor
    record: Record


class Estimator(ABC):
    """How a solution is differentiated: a small frozen object passed to :func:`diffopt.solve`.

    Almost every estimator is an :class:`Adjoint`; derive from that to write one.
    """

    @abstractmethod
    def run(self, problem: Problem) -> Outcome:
        """Roll the inner problem out, differentiable in its state and extras in this estimator's way."""

    def claims(self, steps: int) -> Claims:
        """What holds of this estimator on ``steps`` inner steps; unless overridden, everything."""
        return Claims()


class Adjoint(Estimator):
    r"""A rule that moves the adjoint back over a stored trajectory: ``Lambda_T -> (Lambda_0, direct terms)``.

    A rule says what it will revisit (:meth:`keep`) and what it does with it (:meth:`pullback`), and, unless it is exact
    for every input, what it :meth:`claims`. All are written for one problem and are right for a batch of them, under
    every transform, for every optimizer and meta-parameter.

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

    @abstractmethod
    def keep(self, steps: int) -> Keep:
        """What of a rollout of ``steps`` steps the pullback will revisit."""

    @abstractmethod
    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        """The adjoint of the initial state and the direct terms, given that of the final state."""

    @final
    def run(self, problem: Problem) -> Outcome:
        """Roll out without a graph and attach this rule as the derivative."""
        keep = self.keep(problem.dynamics.steps)
        if problem.dynamics.compile and keep.checkpoint in (None, "graph", 1):
            keep = replace(keep, checkpoint=1)
        levels = range(1, transforms.transform_level() + 1) if problem.check else range(0)
        captures, state = problem.check and torch.is_grad_enabled(), problem.check and keep.checkpoint != "graph"
        watch = Watch(problem.check, captures, levels, state)
        call = _Call(problem.dynamics, self, keep, Record(), watch)
        *state, losses = _launch(call, (*problem.state, *problem.extras))
        return Outcome(tuple(state), losses, call.record)


def unroll(problem: Problem) -> Outcome:
    """Run all steps as plain differentiable code, under whatever records or transforms the caller.

    Under vmap the steps run below it on stacked tensors, as those of an :class:`Adjoint` do; under another transform
    the inner gradient is ``torch.func``'s, else plain autograd's.
    """
    tensors = (*problem.state, *problem.extras)
    size = transforms.innermost_vmap_size()
    if size is not None:
        lower = partial(_unroll_below, problem, transforms.transform_level())
        *state, losses = transforms.below_vmap(lower, tensors, size)
        return Outcome(tuple(state), losses, Record())
    watch = Watch(values=problem.check, levels=problem.popped)
    if problem.check and not transforms.transforms_active():
        tensors = tuple(_refusing_non_finite(x) for x in tensors)
    count = problem.dynamics.state_count
    if problem.check and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        warn_of_precision(problem.dynamics, tensors)
    final, losses = roll_out_recorded(problem.dynamics, tensors[:count], tensors[count:], watch)
    # without a step, what comes out is still not the caller's own tensor
    return Outcome(final.tensors if problem.dynamics.steps else tuple(x.clone() for x in final), losses, Record())


def _unroll_below(
    problem: Problem, level: int, info: Any, dims: tuple[int | None, ...], tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Unroll outside the innermost vmap, the transform number ``level``: stacked, unless its tasks share everything."""
    count, dynamics = problem.dynamics.state_count, problem.dynamics
    if any(dim is not None for dim in dims):
        tensors, dims = _stack(tensors, dims, info.batch_size, set(range(count)))
        dynamics = dynamics.batched(Level(dims, info.batch_size, info.randomness))
    popped = range(level, problem.popped.stop or level + 1) if problem.check else range(0)
    outcome = unroll(Problem(dynamics, tuple(tensors[:count]), tuple(tensors[count:]), problem.check, popped))
    return (*outcome.state, outcome.losses)


@dataclass(frozen=True)
class _Call:
    """One solve on its way down through the transforms around it."""

    dynamics: Dynamics
    rule: Adjoint
    keep: Keep
    record: Record
    watch: Watch
    wanted: frozenset[int] = field(default_factory=frozenset)
    """Inputs that some transform above, or autograd below, differentiates."""
    restacked: bool = False
    """Whether the pullback runs under a vmap that the rollout did not run under."""

    @property
    def state_count(self) -> int:
        return self.dynamics.state_count

    @property
    def wanted_extras(self) -> tuple[int, ...]:
        return tuple(sorted(i - self.state_count for i in self.wanted if i >= self.state_count))


def _launch(call: _Call, inputs: Sequence[Tensor]) -> Any:
    # Under vmap nothing is differentiated; below it, the same tensors say what is.
    # (A vmap that batches no input is passed over without this function being called again below it.)
    under_vmap = transforms.innermost_vmap_size() is not None and transforms.batched_in_innermost(inputs)
    if torch.is_grad_enabled() and not under_vmap:
        call = replace(call, wanted=call.wanted | {i for i, x in enumerate(inputs) if x.requires_grad})
    return transforms.apply(_Solve, call, *inputs)


class _Solve(torch.autograd.Function):
    """``(s_1, extras) -> (s_{T+1}, losses)``."""

    @staticmethod
    def forward(call: _Call, *inputs: Tensor) -> tuple[Tensor, ...]:
        count, keep = call.state_count, call.keep if call.wanted else None
        call.record.wanted = call.wanted_extras
        if call.wanted and call.watch.values and call.rule.claims(call.dynamics.inner_steps).second_derivatives:
            warn_of_precision(call.dynamics, inputs)
        final, losses = roll_out(call.dynamics, inputs[:count], inputs[count:], keep, call.record, call.watch)
        taken = {transforms.storage(x) for x in inputs}
        return (*(x.clone() if transforms.storage(x) in taken else x for x in final), losses.clone())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call = inputs[0]
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:], *output[:-1])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        needed = [i for i, need in enumerate(ctx.needs_input_grad[1:]) if need]
        call, saved = replace(ctx.call, wanted=frozenset(needed)), _saved_tensors(ctx)
        zeros = Leaves(saved[-call.state_count :]).virtual_zeros()
        given = (zero if c is None else c for c, zero in zip(cotangents[:-1], zeros, strict=True))
        # in inference mode no gradient is taken, and what was made in it cannot be recorded
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            ordinary = [c.clone() if c.is_inference() else c for c in given]
            pullback, level = partial(transforms.apply, _Pullback, call, *saved), transforms.grads_batched()
            terms = transforms.over_batched_grads(pullback, ordinary, level) if level else pullback(*ordinary)
        results = dict(zip(needed, terms, strict=True))
        return (None, *(results.get(i) for i in range(len(ctx.needs_input_grad) - 1)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise forward_mode_error()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        call, *inputs = args
        own = call.wanted | set(range(call.state_count))
        stacked, dims = _stack(inputs, in_dims[1:], info.batch_size, own)
        level = Level(dims, info.batch_size, info.randomness)
        outputs = _launch(replace(call, dynamics=call.dynamics.batched(level)), stacked)
        return outputs, (0,) * len(outputs)


class _Pullback(torch.autograd.Function):
    """``(s_1, extras, s_{T+1}, Lambda_T) -> `` the hypergradient for the wanted inputs."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = call.state_count
        inputs, final, cotangent = tensors[: -2 * count], Leaves(tensors[-2 * count : -count]), tensors[-count:]
        trajectory = Trajectory(
            call.dynamics,
            Leaves(inputs[:count]),
            inputs[count:],
            final,
            _usable_record(call, inputs),
            tuple(sorted(i for i in call.wanted if i < count)),
            call.wanted_extras,
            call.watch.values,
        )
        with torch.no_grad(), derivatives.named_in_place_changes():
            result = call.rule.pullback(trajectory, Leaves(cotangent))
        terms = [_term(result, i, count, inputs[i]) for i in sorted(call.wanted)]
        if call.watch.values and terms and not all_finite(terms):
            _refuse_non_finite(cotangent)
        return tuple(terms)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        raise SecondDerivativeError(
            "a hypergradient is being differentiated again, expected once: this estimator gives first derivatives "
            "only; use estimator=diffopt.estimators.Unrolled(), which can be differentiated to any order"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        call, *tensors = args
        count, dims = call.state_count, in_dims[1:]
        inputs = len(tensors) - 2 * count
        own = call.wanted | set(range(count)) | set(range(inputs, len(tensors)))
        restacked = call.restacked or all(dim is None for dim in dims[:inputs])
        stacked, dims = _stack(tensors, dims, info.batch_size, own)
        level = Level(dims[:inputs], info.batch_size, info.randomness)
        call = replace(call, dynamics=call.dynamics.batched(level), restacked=restacked)
        outputs = transforms.apply(_Pullback, call, *stacked)
        return outputs, (0,) * len(outputs)


def _stack(
    tensors: Sequence[Tensor], dims: Sequence[int | None], size: int, own: frozenset[int] | set[int]
) -> tuple[list[Tensor], tuple[int | None, ...]]:
    """Batch axes to the front; the tensors numbered in ``own`` get one even if the tasks share them."""
    stacked, new_dims = list(tensors), [None if dim is None else 0 for dim in dims]
    for i, (tensor, dim) in enumerate(zip(tensors, dims, strict=True)):
        if dim is not None:
            stacked[i] = tensor.movedim(dim, 0)
        elif i in own:
            stacked[i], new_dims[i] = tensor.expand(size, *tensor.shape), 0
    return stacked, tuple(new_dims)


def _saved_tensors(ctx: Any) -> tuple[Tensor, ...]:
    """What a solve saved for its backward pass; read once, for hooks may hand it out once only (checkpoint's do).

    Raises:
        InPlaceError: something has been written to since.
    """
    try:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        return saved
    except RuntimeError as error:
        if not is_in_place(error):
            raise
        raise InPlaceError(
            "a tensor that was given to solve, or that it returned, has been changed in place before the backward pass "
            "that needs it, expected it to stay as it was until then. The usual cause is an outer optimizer's step() "
            "before backward(): take the hypergradient first, or pass a clone()"
        ) from error


def _usable_record(call: _Call, inputs: Sequence[Tensor]) -> Record:
    """What the rollout kept; or, if it has been used up or does not fit this pullback, what another rollout keeps."""
    old = call.record
    if old.usable and not call.restacked and set(call.wanted_extras) <= set(old.wanted):
        return old
    if old.draws and call.restacked:
        raise RandomnessError(
            "the inner loss draws random numbers, and its hypergradient is taken under a vmap that the solve did not "
            "run under (jacrev?), expected the same one: the numbers cannot be drawn again; loop instead of vmap"
        )
    count, draws = call.state_count, dict(old.draws)
    again = Record(wanted=call.wanted_extras, draws=draws, counts=old.counts, diagnostics=old.diagnostics)
    with old.replay(None, inputs[0].device):
        roll_out(call.dynamics, inputs[:count], inputs[count:], call.keep, again, Watch(state=call.watch.values))
    again.draws.update(old.draws)  # if another thread drew meanwhile, the generator's state is no longer that of a step
    if again.hidden_state:
        raise hidden_state_error(again.hidden_state)
    if call.watch.values and old.losses is not None and not call.restacked:
        assert again.losses is not None
        refuse_other_losses(again.losses, old.losses, old.autocast)
    return again


def _term(result: Cotangents, number: int, count: int, like: Tensor) -> Tensor:
    if number >= count:
        term = result.extras.get(number - count)
    else:
        term = None if result.initial is None else result.initial[number]
    return torch.zeros_like(like) if term is None else term.contiguous()  # a zero of one number becomes an ordinary one


def _refusing_non_finite(tensor: Tensor) -> Tensor:
    """An alias whose gradient is refused if it is not finite, as an adjoint rule's result is."""
    if not (torch.is_grad_enabled() and tensor.requires_grad):
        return tensor
    alias = tensor.view_as(tensor)
    alias.register_hook(_refuse_non_finite_gradient)  # type: ignore[no-untyped-call]
    return alias


def _refuse_non_finite_gradient(gradient: Tensor) -> None:
    if not (transforms.transforms_active() or transforms.grads_batched()) and not all_finite([gradient]):
        _refuse_non_finite(())


def _refuse_non_finite(cotangent: Sequence[Tensor]) -> None:
    outer = ""
    if cotangent:
        finite = "is finite" if all_finite(cotangent) else "is not finite itself: check that loss"
        outer = f"The gradient of the outer loss at the solution {finite}. "
    raise NonFiniteGradientError(
        f"the hypergradient is NaN or infinite, expected finite numbers. {outer}Check for roots, norms or logarithms "
        "at zero in the inner loss, or take fewer or smaller steps"
    )
