"""A pullback as one program, over what the program of the rollout has stacked."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from diffopt.errors import EstimatorError
from diffopt.rollout import known_programs
from diffopt.rollout.along import Running
from diffopt.rollout.record import Counts, Record, Rollout
from diffopt.rollout.rollout_program import numbers_of
from diffopt.rollout.store import Store
from diffopt.tensors import tracing, transforms
from diffopt.tensors.leaves import Leaves

if TYPE_CHECKING:
    from diffopt.adjoint.trajectory import Cotangents, Pull, Trajectory
    from diffopt.rollout.inputs import Place


class Found(NamedTuple):
    """What a pullback has found: the fields of ``Cotangents``, and what it has measured."""

    initial: Leaves | None
    direct: Mapping[Place, Tensor]
    measured: Sequence[Tensor] = ()


def sweeps(trajectory: Trajectory, cotangents: Sequence[Leaves], first: int) -> list[Found]:
    """``trajectory.sweep`` for each of some cotangents; the stack is used up.

    Raises:
        EstimatorError: the estimator keeps the steps from another one on.
    """
    rollout, record = trajectory.rollout, trajectory.record
    if first != rollout.first:
        raise EstimatorError(
            f"sweep(first={first}): the estimator keeps steps from {rollout.first} on",
            "the same number",
            f"return Keep(first={first}) from keep()",
        )
    stack = (rollout.stack or Leaves(()))[: trajectory.layout.state_count]
    record.usable, record.rollout = False, replace(rollout, stack=None)

    def pull(trajectory: Trajectory, cotangent: Leaves) -> tuple[Cotangents, Sequence[Tensor]]:
        return trajectory.sweep(cotangent, first), ()

    if first > trajectory.steps:
        return [_plainly(trajectory, stack, cotangent, pull) for cotangent in cotangents]
    return [pulled(trajectory, stack, cotangent, "sweep", pull) for cotangent in cotangents]


def pulled(trajectory: Trajectory, stack: Leaves, cotangent: Leaves, rule: Hashable, pull: Pull) -> Found:
    """``pull(trajectory, cotangent)`` of what a program has stacked, by one that is found again by ``rule``."""
    with trajectory.rollout.replay(None, trajectory.final[0].device):
        return _pulled(trajectory, stack, cotangent, rule, pull)


def _pulled(trajectory: Trajectory, stack: Leaves, cotangent: Leaves, rule: Hashable, pull: Pull) -> Found:
    inputs, counted = trajectory.inputs.detached(), Counts()
    running = [] if trajectory.running is None else _along(trajectory.running)
    given = [x for x in running if x is not None]
    tensors = [numbers_of(trajectory.layout, inputs), *inputs.flat, *stack, *cotangent, *given]
    key = ("pullback", rule, trajectory.rollout.key, trajectory.wanted, tuple([x is None for x in running]))
    whole = _of_all_the_state(trajectory)
    known = known_programs.find(trajectory.dynamics, key, tensors, lambda: _function(whole, len(stack), pull, counted))
    # (what has been written to since the rollout is for the plain way to refuse, which compares the losses)
    moved = any([transforms.version(x) != version for x, version in trajectory.rollout.captured])
    found = None if known is None or moved else known.run(tensors)
    if known is None or found is None:
        return _plainly(trajectory, stack, cotangent, pull)
    known.counts = known.counts or counted
    unchanged = known.unchanged
    if known.is_due() or not unchanged:  # each step is taken again, and says whether its loss is another one
        plain = _plainly(whole, stack, cotangent, pull)
        if not known.agrees(found, _flat(whole, plain)):
            return plain if trajectory.wants_initial else plain._replace(initial=None)
        if not unchanged:
            known.settle(trajectory.dynamics)
    trajectory.record.counts.add(known.counts)
    count, end = len(cotangent), len(cotangent) + len(trajectory.wanted)
    direct = dict(zip(trajectory.wanted, found[count:end], strict=True))
    return Found(Leaves(found[:count]) if trajectory.wants_initial else None, direct, found[end:])


def _plainly(trajectory: Trajectory, stack: Leaves, cotangent: Leaves, pull: Pull) -> Found:
    """Each step by its graph (or compiled, if that is asked for)."""
    found, measured = pull(_unstacked(trajectory, stack), cotangent)
    return Found(found.initial, found.direct, measured)


def _of_all_the_state(trajectory: Trajectory) -> Trajectory:
    """The same uncompiled, asked for the adjoint of every leaf of the state; what it counts is its own."""
    every = tuple(range(trajectory.layout.state_count))
    record = replace(trajectory.record, counts=Counts())
    dynamics = replace(trajectory.dynamics, compile=False)
    return replace(trajectory, dynamics=dynamics, record=record, wanted_state=every)


def _unstacked(trajectory: Trajectory, stack: Leaves) -> Trajectory:
    """The same with what is stacked by step, as whoever goes step by step wants it."""
    states, gradients, block = Store(), dict[int, Leaves](), trajectory.rollout.kept.checkpoint
    count, first = trajectory.layout.state_count, trajectory.rollout.first or 1
    for number, step in enumerate(range(first, trajectory.steps + 1, block if isinstance(block, int) else 1)):
        row = stack.map(lambda leaf, at=number: leaf[at])
        states[step] = row[:count]
        if len(row) > count:
            gradients[step] = row[count:]
    rollout = replace(trajectory.rollout, stack=None, states=states, gradients=gradients)
    return replace(trajectory, record=replace(trajectory.record, rollout=rollout))


def _flat(trajectory: Trajectory, found: Found) -> list[Tensor]:
    zeros = torch.zeros_like
    terms = [found.direct.get(place, zeros(trajectory.inputs.at(place))) for place in trajectory.wanted]
    return [*(found.initial or ()), *terms, *found.measured]


def _along(running: Running) -> list[Tensor | None]:
    return [running.losses, *running.observed]


def _function(trajectory: Trajectory, kept: int, pull: Pull, counts: Counts) -> Callable[..., Sequence[Tensor]]:
    """``(numbers, *inputs, *kept, *cotangent, *cotangents along the way) -> (*adjoint of s_1, *direct terms, ...)``.

    To ``counts`` goes, when it is traced, what the program computes.
    """
    layout, form, traced = trajectory.layout, trajectory.running, trajectory.rollout
    inputs_count, count = len(layout.places), layout.state_count

    def function(numbers: Tensor, *flat: Tensor) -> list[Tensor]:
        rest = iter(flat)
        inputs = layout.inputs([next(rest) for _ in range(inputs_count)])
        stack, cotangent = (Leaves([next(rest) for _ in range(size)]) for size in (kept, count))
        running = None
        if form is not None:
            losses, *observed = [None if x is None else next(rest) for x in _along(form)]
            running = replace(form, losses=losses, observed=tuple(observed))
        again = replace(trajectory, inputs=inputs, running=running, check=False)
        if tracing.current() is None:
            return _flat(again, _plainly(again, stack, cotangent, pull))
        rollout: Rollout = replace(traced, stack=stack, numbers=numbers)
        again = replace(again, record=Record(counts=counts, rollout=rollout))
        found, measured = pull(again, cotangent)
        return _flat(again, Found(found.initial, found.direct, measured))

    return function
