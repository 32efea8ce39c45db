"""The hypergradient of one solve, once it has come down to plain tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffopt.adjoint.call import Call
from diffopt.adjoint.trajectory import Cotangents, Trajectory
from diffopt.errors import EstimatorError, RandomnessError
from diffopt.rollout.along import Running
from diffopt.rollout.inputs import Inputs, Place
from diffopt.rollout.layout import Layout
from diffopt.rollout.loop import roll_out
from diffopt.rollout.ranks import refuse_other_cotangents
from diffopt.rollout.record import Record, Rollout, Watch
from diffopt.rollout.refusals import refuse_non_finite, refuse_other_losses
from diffopt.rollout.traced import note_finite
from diffopt.tensors import derivatives, tracing
from diffopt.tensors.leaves import Leaves, all_finite
from diffopt.tensors.torch_errors import mixed_error


def pull_back(call: Call, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The hypergradient for the wanted inputs, in their order.

    ``tensors`` are the inputs, the final state, its cotangent and those of what was handed out along the way.
    """
    call = call.until_its_end()
    end = len(tensors) - len(call.running)
    given, cotangent, along = tensors[: end - call.state_count], tensors[end - call.state_count : end], tensors[end:]
    with torch.no_grad(), derivatives.named_in_place_changes():
        trajectory = _trajectory(call, given, along)
        if call.record.rollout.copied_to:
            refuse_other_cotangents(call.record.rollout.copied_to, (*cotangent, *along))
        try:
            result = call.estimator.pullback(trajectory, Leaves(cotangent))
        except RuntimeError as error:
            mixed = mixed_error(error, type(call.estimator).__name__, "use Reverse() or Truncated()")
            if mixed is None:
                raise
            raise mixed from error
        return _terms(call, result, given, (*cotangent, *along))


def pull_back_together(
    call: Call, given: Sequence[Tensor], rows: Sequence[Sequence[Tensor]]
) -> list[tuple[Tensor, ...]] | None:
    """The same for many cotangents of one final state, whose problem is large; ``None``: not in this way.

    # NOTE [many cotangents]
    They could be one stacked problem, each with a copy of the state: that is fastest where a step is too small to keep
    the machine busy. Where it is not, the steps are taken again once for all, and pulled back cotangent by cotangent.
    """
    if sum([x.numel() for x in given[-call.state_count :]]) < _LARGE or call.running:
        return None
    call = call.until_its_end()
    with torch.no_grad(), derivatives.named_in_place_changes():
        for row in rows:
            refuse_other_cotangents(call.record.rollout.copied_to, row)
        results = call.estimator.pullbacks(_trajectory(call, given, ()), [Leaves(row) for row in rows])
        if results is None:
            return None
        return [_terms(call, result, given, row) for result, row in zip(results, rows, strict=True)]


_LARGE = 2**15
"""Numbers in a state from which on the steps of one problem are enough for the machine."""


def _trajectory(call: Call, given: Sequence[Tensor], along: Sequence[Tensor]) -> Trajectory:
    """The rollout as the estimator sees it."""
    count = call.state_count
    inputs, final = call.dynamics.layout.inputs(given[:-count]), Leaves(given[-count:])
    record, running = _usable(call, inputs), _running(call, along)
    return Trajectory(call.dynamics, inputs, final, record, *call.wanted_places, call.watch.values, running)


def _terms(call: Call, result: Cotangents, given: Sequence[Tensor], cotangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What an estimator has found, for the wanted inputs."""
    if not all([type(place) is Place for place in result.direct]):
        raise EstimatorError(
            f"{type(call.estimator).__name__}.pullback returned direct terms of {[*result.direct][:3]}",
            "their places, as in trajectory.wanted",
            "return Cotangents(initial, {place: term for place in trajectory.wanted})",
        )
    terms = [_term(result, i, call.dynamics.layout, given[i]) for i in sorted(call.wanted)]
    if call.watch.values and terms and tracing.current() is not None:
        note_finite(terms)
    elif call.watch.values and terms and not all_finite(terms):
        refuse_non_finite(cotangents)
    return tuple(terms)


def _running(call: Call, cotangents: Sequence[Tensor]) -> Running | None:
    """The cotangents of what was handed out along the way, as they came."""
    if not call.running:
        return None
    found = dict(zip(call.running, cotangents, strict=True))
    observed = tuple([found.get(i) for i in range(1, call.dynamics.observed_count + 1)])
    return Running(found.get(0), observed, len(call.dynamics.layout.levels))


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
    if call.watch.values and old.losses is not None and tracing.current() is None:
        assert again.losses is not None
        refuse_other_losses(*_comparable(call, again.losses, old.losses), old.autocast)
    return Record(counts=record.counts, diagnostics=record.diagnostics, rollout=again, usable=True)


def _comparable(call: Call, again: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """What a second rollout's losses are compared in with the first one's.

    Of one under more vmaps the first step's only: other kernels round otherwise, which later steps may magnify.
    """
    if not call.restacked:
        return again, losses
    for axis in call.restacked:
        losses = losses.unsqueeze(axis)
    return again[..., :1], losses.expand_as(again)[..., :1]


def _rolled_out_again(call: Call, inputs: Inputs, wanted: Sequence[Place]) -> Rollout:
    old = call.record.rollout
    call.record.counts.extra_steps += old.steps
    with old.replay(None, inputs.params[0].device):
        again = roll_out(
            call.dynamics,
            inputs,
            counts=call.record.counts,
            keep=call.keep if old.first is None else replace(call.keep, first=old.first),
            wanted=wanted,
            watch=Watch(state=call.watch.values),
            draws=old.draws,
        )[1]
    return replace(again, copied_to=old.copied_to, shards=old.shards)


def _term(result: Cotangents, number: int, layout: Layout, like: Tensor) -> Tensor:
    if number >= layout.state_count:
        term = result.direct.get(layout.place(number))
    else:
        term = None if result.initial is None else result.initial[number]
    return torch.zeros_like(like) if term is None else term.contiguous()  # a zero of one number becomes an ordinary one
