"""A rollout as part of a graph that is being traced: all steps are one ``scan``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from diffopt.rollout.along import NEVER, Stop
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.inputs import Inputs, Place
from diffopt.rollout.products import Noting
from diffopt.rollout.record import Counts, Keep, Kept, Rollout, Watch
from diffopt.rollout.stretches import Blocks, Reading, Stretch, blocks, stretches
from diffopt.tensors import derivatives, traced_loops, tracing
from diffopt.tensors.leaves import Leaves


def roll_out(
    dynamics: Dynamics,
    inputs: Inputs,
    *,
    counts: Counts,
    keep: Keep | None = None,
    wanted: Collection[Place] = (),
    watch: Watch,
    stop: Stop = NEVER,
    numbers: Tensor | None = None,
) -> tuple[Leaves, Rollout]:
    """As ``loop.roll_out``, into the trace that is being made; what is kept are states, stacked.

    ``numbers`` are those of the steps' first updates, if they are not constants of the trace: then the way back, which
    may recall the products that the losses compute, is part of another one.
    """
    _refuse_what_cannot_be(dynamics, keep, stop)
    layout, inputs = dynamics.layout, inputs.detached()
    first = layout.steps + 1 if keep is None else keep.first
    block = 1 if keep is None else keep.block(layout.steps)
    steps = Steps(dynamics, inputs, Reading(layout, numbers))
    autocast = derivatives.Autocast(inputs.params[0].device)
    with torch.no_grad():
        state = inputs.state.map(Tensor.clone)
        gradients = keep is not None and keep.gradients
        if block > 1:
            found = steps.in_blocks(state, first, block)
        else:
            noting = Noting() if numbers is None and not gradients else None
            found = steps.one_by_one(state, first, gradients=gradients, noting=noting)
        along = [x.movedim(0, len(layout.levels)) for x in found.along]
        losses = along[0] if along else inputs.params[0].new_empty(*layout.tasks_shape, 0)
        if watch.values:
            note_finite([losses, *found.state])
    counts.gradients += layout.steps
    return found.state, Rollout(
        wanted=tuple(wanted),
        first=None if keep is None else keep.first,
        steps=layout.steps,
        updates=layout.inner_steps,
        kept=Kept() if keep is None else kept_of(found.stack[: layout.state_count], block),
        stack=found.stack,
        products=found.products,
        numbers=numbers,
        losses=losses,
        handed_out=tuple(along[1:]),
        autocast=autocast,
    )


def kept_of(stack: Leaves, block: int) -> Kept:
    """How much is kept in a stack of the states before every ``block``-th step."""
    return Kept(block, len(stack[0]) if stack else 0, sum([x.nbytes for x in stack]))


def note_finite(tensors: Sequence[Tensor]) -> None:
    """Let whoever runs the program learn whether these are finite."""
    trace = tracing.current()
    assert trace is not None
    trace.expect_finite(tensors)


def _refuse_what_cannot_be(dynamics: Dynamics, keep: Keep | None, stop: Stop) -> None:
    if stop is not NEVER:
        tracing.refuse("a solve with tol or on_step, which may end early")
    if dynamics.micro_batches is not None:
        tracing.refuse("a solve with micro_batches")
    if dynamics.layout.stream is not None:
        tracing.refuse("batches that are a function of the step")
    if keep is not None and keep.first <= dynamics.layout.steps and keep.checkpoint == "log":
        tracing.refuse("an estimator with " + ("memory" if keep.memory else "checkpoint='log'"))
    if keep is not None and keep.gradients and keep.block(dynamics.layout.steps) > 1:
        tracing.refuse("an estimator that keeps the inner gradients of some steps")


class Rolled(NamedTuple):
    """Where steps have led, what they have handed out, steps in front, and the states and gradients that are kept.

    ``products`` are those that the losses of the same steps have computed and that are kept, too.
    """

    state: Leaves
    along: list[Tensor]
    stack: Leaves
    products: tuple[Tensor, ...] = ()


@final
class Steps:
    """The steps of one rollout, in loops of equal ones."""

    def __init__(self, dynamics: Dynamics, inputs: Inputs, reading: Reading) -> None:
        """Of a problem with these inputs."""
        self._dynamics, self._inputs, self._reading = dynamics, inputs, reading
        self._shared = [inputs.at(place) for place in reading.shared]

    def one_by_one(self, state: Leaves, first: int, *, gradients: bool = False, noting: Noting | None = None) -> Rolled:
        """All steps; every state, and gradient, from that before step ``first`` on is kept, and what is noted."""
        layout, parts, every = self._dynamics.layout, [], stretches(self._dynamics.layout)
        keeps = first <= layout.steps
        if len(every) > 1 or not keeps:
            noting = None
        for stretch in every:
            rows = self._reading.rows(self._inputs, stretch)
            state, made = self.loop(
                state, rows, self._shared, stretch.updates, keeps=keeps, gradients=gradients, noting=noting
            )
            parts.append(made)
        columns = _joined(parts)
        begin = len(columns) - (0 if noting is None else len(noting.kept(state)))
        end = begin - (layout.state_count + gradients * layout.params_count if keeps else 0)
        stack, products = ([x[first - 1 :] for x in part] for part in (columns[end:begin], columns[begin:]))
        return Rolled(state, columns[:end], Leaves(stack), tuple(products))

    def in_blocks(self, state: Leaves, first: int, length: int) -> Rolled:
        """All steps, of which every ``length``-th state from that before step ``first`` on is kept."""
        layout, along, kept = self._dynamics.layout, [], []
        for stretch in [Stretch(1, first - 1, layout.window)] if first > 1 else []:
            rows = self._reading.rows(self._inputs, stretch)
            state, made = self.loop(state, rows, self._shared, stretch.updates)
            along.append(made)
        for part in blocks(layout, first, length):
            rows = [x for s in part.stretches for x in part.cut(self._reading.rows(self._inputs, part.all_of(s)), s)]
            carry, found = traced_loops.scan(self._block(part), list(state), rows, self._shared)
            state, end = Leaves(carry), len(found) - layout.state_count
            along.append([x.flatten(0, 1) for x in found[:end]])
            kept.append(found[end:])
        return Rolled(state, _joined(along), Leaves(_joined(kept)))

    def _block(self, part: Blocks) -> traced_loops.Body:
        """One block; its row has what its steps hand out, and the state before them."""

        def body(
            carry: Sequence[Tensor], row: Sequence[Tensor], shared: Sequence[Tensor]
        ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
            state, along = Leaves(carry), []
            for stretch, rows in zip(part.stretches, part.by_stretch(row), strict=True):
                state, made = self.loop(state, rows, shared, stretch.updates, nested=True)
                along.append(made)
            return tuple(state), [*_joined(along), *carry]

        return body

    def loop(
        self,
        state: Leaves,
        rows: Sequence[Tensor],
        shared: Sequence[Tensor],
        updates: int,
        *,
        hands_out: bool = True,
        keeps: bool = False,
        gradients: bool = False,
        noting: Noting | None = None,
        nested: bool = False,
    ) -> tuple[Leaves, list[Tensor]]:
        """Steps of so many updates each; returns the state after them, and what all have handed out.

        Behind that, if they are to be kept, the state before each, its gradient, and what is noted.
        """

        def body(
            carry: Sequence[Tensor], row: Sequence[Tensor], shared: Sequence[Tensor]
        ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
            flat = [*carry, *self._reading.joined(row[1:], shared)]
            now = self._dynamics.layout.inputs(flat, of_step=True)
            along, grads, after = _step(self._dynamics, now, row[0], updates, hands_out=hands_out, noting=noting)
            kept = (*carry, *(grads if gradients else ())) if keeps else ()
            noted = [] if noting is None else noting.kept(after)
            return tuple(after), [*along, *kept, *noted]

        carry, made = traced_loops.scan(body, list(state), rows, shared, nested=nested)
        return Leaves(carry), made


def _joined(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The rows of all steps, from those of parts of them."""
    columns = map(list, zip(*parts, strict=True))
    return [torch.cat(column) if len(column) > 1 else column[0] for column in columns]


def _step(
    dynamics: Dynamics, now: Inputs, first: Any, updates: int, *, hands_out: bool, noting: Noting | None
) -> tuple[list[Tensor], Sequence[Tensor], Leaves]:
    """What a step hands out, its gradient, and the state after it; as ``loop.take_step``, without a graph."""
    aux: list[Tensor] = []
    with torch.enable_grad():
        params = [x.detach().requires_grad_() for x in now.params]
        with noting or nullcontext():
            losses = dynamics.losses(params, now.read, aux=aux)
        grads = derivatives.or_zeros(derivatives.gradient(losses, params, differentiable=False), params)
    with torch.no_grad():
        after = dynamics.updates(now.state, grads, now.hyperparameters, first, updates)
    if not hands_out:
        return [], grads, after
    observed: Sequence[Tensor] = ()
    if dynamics.observer is not None:
        with torch.enable_grad():
            observed = dynamics.observed([x.detach().requires_grad_() for x in dynamics.layout.params(after)], now.read)
    return [losses.detach(), *[x.detach() for x in observed], *aux], grads, after
