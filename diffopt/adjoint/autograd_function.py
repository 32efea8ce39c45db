"""The two autograd functions that join an adjoint rule to autograd and ``torch.func``.

# NOTE [two functions with vmap rules]
``_Solve`` is the rollout, ``_Pullback`` its hypergradient. Under vmap each re-applies itself to the stacked tensors
(see ``dynamics.py``, NOTE [a batch of tasks is one problem]), so that however transforms are nested, the rollout and
the rule run at the bottom, on plain tensors. A rule therefore never sees a transform.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from diffopt.adjoint.claims import Claims
from diffopt.adjoint.trajectory import Cotangents, Trajectory
from diffopt.errors import InPlaceError, RandomnessError, SecondDerivativeError
from diffopt.rollout.checks import refuse_non_finite, warn_of_precision
from diffopt.rollout.dynamics import Dynamics, Level
from diffopt.rollout.loop import refuse_other_losses, roll_out
from diffopt.rollout.record import Keep, Record, Watch
from diffopt.tensors import autograd_graph, derivatives, transforms
from diffopt.tensors.leaves import Leaves, all_finite
from diffopt.tensors.torch_errors import forward_mode_error, is_in_place, mixed_error


class Rule(Protocol):
    """What an adjoint rule is to these functions."""

    def claims(self, steps: int) -> Claims:
        """What holds of it on so many steps."""
        ...

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        """The adjoint of the initial state and the direct terms, given that of the final state."""
        ...


@dataclass(frozen=True)
class Call:
    """One solve on its way down through the transforms around it."""

    dynamics: Dynamics
    rule: Rule
    keep: Keep
    record: Record
    watch: Watch
    wanted: frozenset[int] = field(default_factory=frozenset)
    """Inputs that some transform above, or autograd below, differentiates."""
    restacked: bool = False
    """Whether the pullback runs under a vmap that the rollout did not run under."""

    @property
    def state_count(self) -> int:
        """How many inputs are leaves of the state."""
        return self.dynamics.state_count

    @property
    def wanted_extras(self) -> tuple[int, ...]:
        """The extras that are differentiated, by number."""
        return tuple(sorted(i - self.state_count for i in self.wanted if i >= self.state_count))


def launch(call: Call, inputs: Sequence[Tensor]) -> Any:
    """The final state and the losses, differentiable by the call's rule."""
    # Under vmap nothing is differentiated; below it, the same tensors say what is.
    # (A vmap that batches no input is passed over without this function being called again below it.)
    under_vmap = transforms.innermost_vmap_size() is not None and transforms.batched_in_innermost(inputs)
    if torch.is_grad_enabled() and not under_vmap:
        call = replace(call, wanted=call.wanted | {i for i, x in enumerate(inputs) if x.requires_grad})
    return transforms.apply(_Solve, call, *inputs)


class _Solve(torch.autograd.Function):
    """``(s_1, extras) -> (s_{T+1}, losses)``."""

    @staticmethod
    def forward(call: Call, *inputs: Tensor) -> tuple[Tensor, ...]:
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
        stacked, dims = transforms.stacked(inputs, in_dims[1:], info.batch_size, own)
        level = Level(dims, info.batch_size, info.randomness)
        outputs = launch(replace(call, dynamics=call.dynamics.batched(level)), stacked)
        return outputs, (0,) * len(outputs)


class _Pullback(torch.autograd.Function):
    """``(s_1, extras, s_{T+1}, Lambda_T) -> `` the hypergradient for the wanted inputs."""

    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
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
            try:
                result = call.rule.pullback(trajectory, Leaves(cotangent))
            except RuntimeError as error:
                mixed = mixed_error(error, type(call.rule).__name__, "use Reverse() or Truncated()")
                if mixed is None:
                    raise
                raise mixed from error
        terms = [_term(result, i, count, inputs[i]) for i in sorted(call.wanted)]
        if call.watch.values and terms and not all_finite(terms):
            refuse_non_finite(cotangent)
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
        stacked, dims = transforms.stacked(tensors, dims, info.batch_size, own)
        level = Level(dims[:inputs], info.batch_size, info.randomness)
        call = replace(call, dynamics=call.dynamics.batched(level), restacked=restacked)
        outputs = transforms.apply(_Pullback, call, *stacked)
        return outputs, (0,) * len(outputs)


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


def _usable_record(call: Call, inputs: Sequence[Tensor]) -> Record:
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
    if again.hidden_state is not None:
        raise again.hidden_state
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


def solves_behind(outer_loss: Tensor) -> list[Any]:
    """The autograd nodes of the solves that a loss depends on; each has ``call`` and ``saved_tensors``."""
    return [node for node in autograd_graph.nodes([outer_loss.grad_fn]) if type(node) is _Solve._backward_cls]
