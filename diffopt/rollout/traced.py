"""A rollout as part of a graph that is being traced: all steps are one ``scan``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from diffopt.rollout.along import NEVER, Stop
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.inputs import Inputs, Place
from diffopt.rollout.layout import Layout
from diffopt.rollout.record import Counts, Keep, Kept, Rollout, Watch
from diffopt.tensors import derivatives, tracing
from diffopt.tensors.leaves import Leaves


class Stretch(NamedTuple):
    """Steps ``first, ..., last``, each of so many updates."""

    first: int
    last: int
    updates: int

    @property
    def length(self) -> int:
        """How many steps these are."""
        return self.last - self.first + 1


def stretches(layout: Layout, first: int = 1) -> list[Stretch]:
    """The steps from ``first`` on, in rows of equal ones: the last window may be short."""
    last = layout.steps
    if first > last:
        return []
    short = layout.length(last) < layout.window
    whole = Stretch(first, last - short, layout.window)
    return [*([whole] if whole.length else []), *([Stretch(last, last, layout.length(last))] if short else [])]


@final
class Reading:
    """What steps read besides their state: what runs over steps, and what they share."""

    def __init__(self, layout: Layout, numbers: Tensor | None = None) -> None:
        """Of a problem whose tensors lie like this; ``numbers`` are those of the steps' first updates, if given."""
        self._layout, self._numbers = layout, numbers
        self._places = layout.places[layout.state_count :]
        self.stepped = [place for place in self._places if layout.runs_over_steps(place)]
        self.shared = [place for place in self._places if not layout.runs_over_steps(place)]

    def rows(self, inputs: Inputs, stretch: Stretch) -> list[Tensor]:
        """The numbers of the steps' first updates, and what runs over steps, each with a leading axis for these."""
        if self._numbers is None:
            first, window = self._layout.first_update(stretch.first), self._layout.window
            end = first + stretch.length * window
            numbers = torch.arange(first, end, window, dtype=torch.float64, device=inputs.params[0].device)
        else:
            numbers = self._numbers[stretch.first - 1 : stretch.last].double()
        return [numbers, *[self.stacked(place, inputs.at(place), stretch) for place in self.stepped]]

    def stacked(self, place: Place, tensor: Tensor, stretch: Stretch) -> Tensor:
        """A view of what these steps see of the tensor at a place, steps in front; see ``Layout.slice_at``."""
        layout, count = self._layout, stretch.length
        axis, first = layout.step_axis(place), (stretch.first - 1) * layout.window
        if place.part == "read":
            return tensor.movedim(axis, 0)[first : first + (count - 1) * layout.window + 1 : layout.window]
        part = tensor.narrow(axis, layout.start + first, count * stretch.updates)
        if layout.window > 1:
            part = part.view(*part.shape[:axis], count, stretch.updates, *part.shape[axis + 1 :])
        return part.movedim(axis, 0)

    def joined(self, stepped: Sequence[Tensor], shared: Sequence[Tensor]) -> list[Tensor]:
        """What one step reads, in order."""
        known = dict(zip(self.stepped, stepped, strict=True)) | dict(zip(self.shared, shared, strict=True))
        return [known[place] for place in self._places]


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

    ``numbers`` are those of the steps' first updates, if they are not constants of the trace.
    """
    _refuse_what_cannot_be(dynamics, keep, stop)
    layout, inputs = dynamics.layout, inputs.detached()
    first = layout.steps + 1 if keep is None else keep.first
    state, reading, parts = inputs.state.map(Tensor.clone), Reading(layout, numbers), []
    autocast = derivatives.Autocast(inputs.params[0].device)
    body = _body(dynamics, reading, keeps=first <= layout.steps)
    with torch.no_grad():
        for stretch in stretches(layout):
            rows, shared = reading.rows(inputs, stretch), [inputs.at(place) for place in reading.shared]
            carry, made = tracing.scan(body(stretch.updates), list(state), rows, shared)
            state = Leaves(carry)
            parts.append(made)
        columns = map(list, zip(*parts, strict=True))
        stacks = [torch.cat(column) if len(column) > 1 else column[0] for column in columns]
        kept = layout.state_count if first <= layout.steps else 0
        along = [x.movedim(0, len(layout.levels)) for x in stacks[: len(stacks) - kept]]
        stack = Leaves([x[first - 1 :] for x in stacks[len(stacks) - kept :]])
        losses = along[0] if along else inputs.params[0].new_empty(*layout.tasks_shape, 0)
        if watch.values:
            note_finite([losses, *state])
    counts.gradients += layout.steps
    size = sum([x.nbytes for x in stack])
    return state, Rollout(
        wanted=tuple(wanted),
        first=None if keep is None else keep.first,
        steps=layout.steps,
        updates=layout.inner_steps,
        kept=Kept(1, max(0, layout.steps - first + 1), size) if keep is not None else Kept(),
        stack=stack,
        losses=losses,
        handed_out=tuple(along[1:]),
        autocast=autocast,
    )


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
    if keep is not None and keep.first <= dynamics.layout.steps and keep.checkpoint not in (None, "graph", 1):
        tracing.refuse(f"an estimator with checkpoint={keep.checkpoint!r}")
    if keep is not None and keep.gradients:
        tracing.refuse("an estimator that keeps inner gradients")


def _body(dynamics: Dynamics, reading: Reading, *, keeps: bool) -> Callable[[int], tracing.Body]:
    """A step of so many updates; its row has the losses, what is handed out, and the state before it if asked for."""

    def of(updates: int) -> tracing.Body:
        def body(
            carry: Sequence[Tensor], row: Sequence[Tensor], shared: Sequence[Tensor]
        ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
            flat = [*carry, *reading.joined(row[1:], shared)]
            along, after = _step(dynamics, dynamics.layout.inputs(flat, of_step=True), row[0], updates)
            return tuple(after), [*along, *(carry if keeps else ())]

        return body

    return of


def _step(dynamics: Dynamics, now: Inputs, first: Any, updates: int) -> tuple[list[Tensor], Leaves]:
    """What a step hands out, and the state after it; as ``loop.take_step``, without a graph."""
    aux: list[Tensor] = []
    with torch.enable_grad():
        params = [x.detach().requires_grad_() for x in now.params]
        losses = dynamics.losses(params, now.read, aux=aux)
        grads = derivatives.or_zeros(derivatives.gradient(losses, params, differentiable=False), params)
    with torch.no_grad():
        after = dynamics.updates(now.state, grads, now.hyperparameters, first, updates)
    observed: Sequence[Tensor] = ()
    if dynamics.observer is not None:
        with torch.enable_grad():
            observed = dynamics.observed([x.detach().requires_grad_() for x in dynamics.layout.params(after)], now.read)
    return [losses.detach(), *[x.detach() for x in observed], *aux], after
