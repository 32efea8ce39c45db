"""The two autograd functions that join an adjoint rule to autograd and ``torch.func``.

# NOTE [two functions with vmap rules]
``_Solve`` is the rollout, ``_Pullback`` its hypergradient. Under vmap each runs on the stacked tensors (see
``layout.py``, NOTE [a batch of tasks is one problem]), so that however transforms are nested, the rollout and the rule
run at the bottom, on plain tensors. A rule therefore never sees a transform.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from diffopt.adjoint.claims import Claims
from diffopt.adjoint.trajectory import Cotangents, Trajectory
from diffopt.errors import EstimatorError, InPlaceError, RandomnessError, SecondDerivativeError
from diffopt.rollout.along import NEVER, Running, Stop
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.field import VectorField
from diffopt.rollout.inputs import Inputs, Place
from diffopt.rollout.layout import Layout
from diffopt.rollout.loop import roll_out
from diffopt.rollout.record import Keep, Record, Rollout, Watch
from diffopt.rollout.refusals import is_imprecise, refuse_non_finite, refuse_other_losses, warn_of_precision
from diffopt.tensors import autograd_graph, derivatives, transforms
from diffopt.tensors.leaves import Leaves, all_finite
from diffopt.tensors.torch_errors import forward_mode_error, is_in_place, mixed_error


class Rule(Protocol):
    """What an adjoint rule is to these functions."""

    @property
    def takes_running_costs(self) -> bool:
        """Whether it takes the cotangents of what is handed out along the way."""
        ...

    def claims(self, steps: int) -> Claims:
        """What holds of it on so many steps."""
        ...

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        """The adjoint of the initial state and the direct terms, given that of the final state."""
        ...


@dataclass(frozen=True)
class Call:
    """One solve on its way down through the transforms around it.

    Attributes:
        wanted: the inputs, by number, that some transform above, or autograd below, differentiates.
        stop: what may end the rollout early.
        restacked: whether the pullback runs under a vmap that the rollout did not run under.
        running: which of the outputs along the way have a cotangent, by number from the losses on.
    """

    dynamics: Dynamics
    rule: Rule
    keep: Keep
    record: Record
    watch: Watch
    stop: Stop = NEVER
    wanted: frozenset[int] = frozenset()
    restacked: bool = False
    running: tuple[int, ...] = ()

    @cached_property
    def state_count(self) -> int:
        """How many inputs are leaves of the state."""
        return self.dynamics.layout.state_count

    @cached_property
    def wanted_places(self) -> tuple[tuple[int, ...], tuple[Place, ...]]:
        """The leaves of the state that are differentiated, by number, and the other inputs that are, by place."""
        count, layout, wanted = self.state_count, self.dynamics.layout, sorted(self.wanted)
        return tuple([i for i in wanted if i < count]), tuple([layout.place(i) for i in wanted if i >= count])


def prepared(call: Call, inputs: Sequence[Tensor]) -> Callable[[], Any]:
    """What gives the final state and the losses, differentiable by the call's rule (when called: the way is short)."""
    vmap = transforms.innermost_vmap()
    if vmap is not None:  # where nothing is differentiated; below it, the same tensors say what is
        return partial(transforms.below_vmap, partial(_below, call), vmap, inputs)
    if torch.is_grad_enabled():
        call = replace(call, wanted=call.wanted | {i for i, x in enumerate(inputs) if x.requires_grad})
    return transforms.applying(_Solve, call, *inputs)


def _below(call: Call, vmap: Any, dims: Sequence[int | None], inputs: Sequence[Tensor]) -> Any:
    """The same outside a vmap: stacked, unless its tasks share everything."""
    layout = call.dynamics.layout
    if any([dim is not None for dim in dims]):
        inputs, dims = transforms.stacked(inputs, dims, vmap.batch_size, call.wanted | set(range(layout.state_count)))
        call = replace(call, dynamics=call.dynamics.batched(layout.level(vmap, dims)))
    return prepared(call, inputs)()


class _Solve(torch.autograd.Function):
    """``(s_1, what is read, hyperparameters) -> (s_{T+1}, losses, what is observed, what a loss returns besides)``."""

    @staticmethod
    def forward(call: Call, *inputs: Tensor) -> tuple[Tensor, ...]:
        record, layout = call.record, call.dynamics.layout
        low = bool(call.wanted) and call.watch.values and is_imprecise(call.dynamics, inputs)
        if low and call.rule.claims(layout.inner_steps).second_derivatives:
            warn_of_precision(call.dynamics, inputs)
        final, record.rollout = roll_out(
            call.dynamics,
            layout.inputs(inputs),
            counts=record.counts,
            keep=call.keep if call.wanted else None,
            wanted=call.wanted_places[1],
            watch=call.watch,
            stop=call.stop,
        )
        record.usable, record.kept = bool(call.wanted), record.rollout.kept
        losses = record.rollout.losses
        assert losses is not None
        if not (call.dynamics.own_update and layout.steps and not layout.buffers_layout):  # else all tensors are new
            taken = {transforms.storage(x) for x in inputs}
            final = Leaves([x.clone() if transforms.storage(x) in taken else x for x in final])
        return (*final, losses.clone(), *record.rollout.handed_out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call = inputs[0]
        count, observed = ctx.call.state_count, ctx.call.dynamics.observed_count
        along = enumerate(output[count:])
        constant = 0 if isinstance(ctx.call.dynamics.loss, VectorField) else -1  # a field's norm is only reported
        fixed = [x for i, x in along if i == constant or i > observed or not x.is_floating_point()]
        ctx.mark_non_differentiable(*fixed)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:], *output[:count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        needed = [i for i, need in enumerate(ctx.needs_input_grad[1:]) if need]
        call, saved = ctx.call, _saved_tensors(ctx)
        if call.wanted != set(needed):
            call = replace(call, wanted=frozenset(needed))
        final = saved[-call.state_count :]
        given = [x.new_zeros(()).expand_as(x) if c is None else c for c, x in zip(cotangents, final, strict=False)]
        along = {i: c for i, c in enumerate(cotangents[call.state_count :]) if c is not None}
        if along:
            _refuse_running_costs(call.rule)
            call, given = replace(call, running=tuple(along)), [*given, *along.values()]
        # in inference mode no gradient is taken, and what was made in it cannot be recorded
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            ordinary = [c.clone() if c.is_inference() else c for c in given]
            level = transforms.grads_batched()
            plainly = not (level or torch.is_grad_enabled() or transforms.transforms_active())
            function: Any = _pull_back if plainly else partial(transforms.apply, _Pullback)
            pullback = partial(function, call, *saved)
            terms = transforms.over_batched_grads(pullback, ordinary, level) if level else pullback(*ordinary)
        results = dict(zip(needed, terms, strict=True))
        return (None, *[results.get(i) for i in range(len(ctx.needs_input_grad) - 1)])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise forward_mode_error()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        outputs = _below(args[0], info, in_dims[1:], args[1:])
        return outputs, (0,) * len(outputs)


class _Pullback(torch.autograd.Function):
    """``(s_1, what is read, hyperparameters, s_{T+1}, Lambda_T) -> `` the hypergradient for the wanted inputs."""

    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _pull_back(call, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        raise SecondDerivativeError(
            "a hypergradient is being differentiated again",
            "once",
            "this estimator gives first derivatives only; use estimator=diffopt.estimators.Unrolled(), which can "
            "be differentiated to any order",
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        call, *tensors = args
        count, dims, layout = call.state_count, in_dims[1:], call.dynamics.layout
        inputs = len(tensors) - 2 * count - len(call.running)
        own = call.wanted | set(range(count)) | set(range(inputs, len(tensors)))
        restacked = call.restacked or all(dim is None for dim in dims[:inputs])
        stacked, dims = transforms.stacked(tensors, dims, info.batch_size, own)
        dynamics = call.dynamics.batched(layout.level(info, dims[:inputs]))
        outputs = transforms.apply(_Pullback, replace(call, dynamics=dynamics, restacked=restacked), *stacked)
        return outputs, (0,) * len(outputs)


def _pull_back(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
    """What :class:`_Pullback` computes."""
    call = replace(call, dynamics=call.dynamics.until(call.record.rollout.steps))
    count, layout = call.state_count, call.dynamics.layout
    end = len(tensors) - len(call.running)
    flat, final, cotangent = (
        tensors[: end - 2 * count],
        Leaves(tensors[end - 2 * count : end - count]),
        tensors[end - count :],
    )
    inputs = layout.inputs(flat)
    with torch.no_grad(), derivatives.named_in_place_changes():
        record, running = _usable(call, inputs), _running(call, tensors[end:])
        trajectory = Trajectory(call.dynamics, inputs, final, record, *call.wanted_places, call.watch.values, running)
        try:
            result = call.rule.pullback(trajectory, Leaves(cotangent[:count]))
        except RuntimeError as error:
            mixed = mixed_error(error, type(call.rule).__name__, "use Reverse() or Truncated()")
            if mixed is None:
                raise
            raise mixed from error
        if not all([type(place) is Place for place in result.direct]):
            raise EstimatorError(
                f"{type(call.rule).__name__}.pullback returned direct terms of {[*result.direct][:3]}",
                "their places, as in trajectory.wanted",
                "return Cotangents(initial, {place: term for place in trajectory.wanted})",
            )
        terms = [_term(result, i, layout, flat[i]) for i in sorted(call.wanted)]
        if call.watch.values and terms and not all_finite(terms):
            refuse_non_finite(cotangent)
    return tuple(terms)


def _refuse_running_costs(rule: Rule) -> None:
    """Refuse an outer loss that depends on what happens along the way, where the estimator would drop that."""
    if not rule.takes_running_costs:
        raise EstimatorError(
            f"the outer loss depends on Solution.losses or Solution.observed, by {type(rule).__name__}()",
            "an estimator that differentiates what happens along the way: Reverse, Unrolled, ForwardMode, MultiStep",
            "use one of them; numbers without a derivative are solution.losses.detach()",
        )


def _running(call: Call, cotangents: Sequence[Tensor]) -> Running | None:
    """The cotangents of what was handed out along the way, as they came."""
    if not call.running:
        return None
    found = dict(zip(call.running, cotangents, strict=True))
    observed = tuple([found.get(i) for i in range(1, call.dynamics.observed_count + 1)])
    return Running(found.get(0), observed, len(call.dynamics.layout.levels))


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
            "a tensor that was given to solve, or that it returned, has been changed in place before the backward "
            "pass that needs it",
            "it to stay as it was until then",
            "the usual cause is an outer optimizer's step() before backward(): take the hypergradient first, or "
            "pass a clone()",
        ) from error


def _usable(call: Call, inputs: Inputs) -> Record:
    """The solve's record; that of another rollout if what it kept has been used up or does not fit this pullback."""
    record, old, wanted = call.record, call.record.rollout, call.wanted_places[1]
    if record.usable and not call.restacked and set(wanted) <= set(old.wanted):
        return record
    if old.draws and call.restacked:
        raise RandomnessError(
            "the inner loss draws random numbers, and its hypergradient is taken under a vmap that the solve did "
            "not run under (jacrev?)",
            "the same one",
            "the numbers cannot be drawn again; loop instead of vmap",
        )
    again = _rolled_out_again(call, inputs, wanted)
    if again.hidden_state is not None:
        raise again.hidden_state
    if call.watch.values and old.losses is not None and not call.restacked:
        assert again.losses is not None
        refuse_other_losses(again.losses, old.losses, old.autocast)
    return Record(counts=record.counts, diagnostics=record.diagnostics, rollout=again, usable=True)


def _rolled_out_again(call: Call, inputs: Inputs, wanted: Sequence[Place]) -> Rollout:
    old = call.record.rollout
    with old.replay(None, inputs.params[0].device):
        return roll_out(
            call.dynamics,
            inputs,
            counts=call.record.counts,
            keep=call.keep if old.first is None else replace(call.keep, first=old.first),
            wanted=wanted,
            watch=Watch(state=call.watch.values),
            draws=old.draws,
        )[1]


def _term(result: Cotangents, number: int, layout: Layout, like: Tensor) -> Tensor:
    if number >= layout.state_count:
        term = result.direct.get(layout.place(number))
    else:
        term = None if result.initial is None else result.initial[number]
    return torch.zeros_like(like) if term is None else term.contiguous()  # a zero of one number becomes an ordinary one


def solves_behind(outer_loss: Tensor) -> list[Any]:
    """The autograd nodes of the solves that a loss depends on; each has ``call`` and ``saved_tensors``."""
    return [node for node in autograd_graph.nodes([outer_loss.grad_fn]) if type(node) is _Solve._backward_cls]
