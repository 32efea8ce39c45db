"""The exact recursion as one program, over the states that the program of the rollout has stacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from diffopt.adjoint.traced_sweep import TracedSweep
from diffopt.errors import EstimatorError
from diffopt.rollout import known_programs
from diffopt.rollout.along import Running
from diffopt.rollout.record import Counts, Record
from diffopt.rollout.rollout_program import numbers_of
from diffopt.rollout.store import Store
from diffopt.tensors import tracing
from diffopt.tensors.leaves import Leaves

if TYPE_CHECKING:
    from diffopt.adjoint.trajectory import Cotangents, Trajectory
    from diffopt.rollout.inputs import Place

Found: TypeAlias = "tuple[Leaves | None, Mapping[Place, Tensor]]"
"""The adjoint of the state before the first of the steps, if it is asked for, and the direct terms."""


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
    record.usable, record.rollout = False, replace(rollout, stack=None)
    with rollout.replay(None, trajectory.final[0].device):
        return [_sweep(trajectory, rollout.stack or Leaves(()), cotangent, first) for cotangent in cotangents]


def _sweep(trajectory: Trajectory, stack: Leaves, cotangent: Leaves, first: int) -> Found:
    if first > trajectory.steps:
        return _parts(_plainly(trajectory, stack, cotangent, first))
    inputs = trajectory.inputs.detached()
    running = [] if trajectory.running is None else _along(trajectory.running)
    given = [x for x in running if x is not None]
    tensors = [numbers_of(trajectory.layout, inputs), *inputs.flat, *stack, *cotangent, *given]
    key = ("sweep", trajectory.rollout.key, trajectory.wanted, tuple([x is None for x in running]))
    known = known_programs.find(
        trajectory.dynamics, key, tensors, lambda: _function(_of_all_the_state(trajectory), first)
    )
    if known is None or known.program is None:
        return _parts(_plainly(trajectory, stack, cotangent, first))
    found, unchanged = known.program(tensors), known.unchanged
    if known.is_due() or not unchanged:  # each step is taken again, and says whether its loss is another one
        whole = _of_all_the_state(trajectory)
        plain = _plainly(whole, stack, cotangent, first)
        if not known.agrees(found, _flat(whole, plain)):
            return plain.initial if trajectory.wants_initial else None, plain.direct
        if not unchanged:
            known.settle(trajectory.dynamics)
    count_in(trajectory, first)
    count = len(cotangent)
    direct = dict(zip(trajectory.wanted, found[count:], strict=True))
    return Leaves(found[:count]) if trajectory.wants_initial else None, direct


def count_in(trajectory: Trajectory, first: int) -> None:
    """Add what a program of the backward pass computes to the counts."""
    counts, steps = trajectory.record.counts, trajectory.steps - first + 1
    again = steps - trajectory.rollout.kept.states  # what lies between the states that are kept
    counts.gradients += again
    counts.products += steps
    counts.depth += steps
    counts.extra_steps += again + steps


def _parts(found: Cotangents) -> Found:
    return found.initial, found.direct


def _of_all_the_state(trajectory: Trajectory) -> Trajectory:
    """The same uncompiled, asked for the adjoint of every leaf of the state; what it counts is its own."""
    every = tuple(range(trajectory.layout.state_count))
    record = replace(trajectory.record, counts=Counts())
    dynamics = replace(trajectory.dynamics, compile=False)
    return replace(trajectory, dynamics=dynamics, record=record, wanted_state=every)


def _plainly(trajectory: Trajectory, stack: Leaves, cotangent: Leaves, first: int) -> Cotangents:
    """Step by step, each by its graph (or compiled, if that is asked for)."""
    states, block = Store(), trajectory.rollout.kept.checkpoint
    for number, step in enumerate(range(first, trajectory.steps + 1, block if isinstance(block, int) else 1)):
        states[step] = stack.map(lambda leaf, at=number: leaf[at])
    rollout = replace(trajectory.rollout, stack=None, states=states)
    return replace(trajectory, record=replace(trajectory.record, rollout=rollout)).sweep(cotangent, first)


def _flat(trajectory: Trajectory, found: Cotangents) -> list[Tensor]:
    zeros = torch.zeros_like
    return [
        *(found.initial or ()),
        *[found.direct.get(place, zeros(trajectory.inputs.at(place))) for place in trajectory.wanted],
    ]


def _along(running: Running) -> list[Tensor | None]:
    return [running.losses, *running.observed]


def _function(trajectory: Trajectory, first: int) -> Callable[..., Sequence[Tensor]]:
    """``(numbers, *inputs, *states, *cotangent, *cotangents along the way) -> (*adjoint of s_1, *direct terms)``."""
    layout, form = trajectory.layout, trajectory.running
    inputs_count, count = len(layout.places), layout.state_count

    def function(numbers: Tensor, *flat: Tensor) -> list[Tensor]:
        rest = iter(flat)
        inputs = layout.inputs([next(rest) for _ in range(inputs_count)])
        stack, cotangent = (Leaves([next(rest) for _ in range(count)]) for _ in range(2))
        running = None
        if form is not None:
            losses, *observed = [None if x is None else next(rest) for x in _along(form)]
            running = replace(form, losses=losses, observed=tuple(observed))
        again = replace(trajectory, inputs=inputs, running=running, check=False)
        if tracing.current() is None:
            return _flat(again, _plainly(again, stack, cotangent, first))
        again = replace(again, record=Record(rollout=replace(trajectory.rollout, stack=stack)))
        initial, direct = TracedSweep(again, first, numbers).pull(cotangent)
        return [*initial, *[direct[place] for place in trajectory.wanted]]

    return function
