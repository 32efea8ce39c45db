"""The exact recursion as part of a graph that is being traced: one ``scan``, from the last step to the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.inputs import Inputs, Place
from diffopt.rollout.products import Recalling
from diffopt.rollout.stretches import Blocks, Reading, Stretch, blocks, stretches
from diffopt.rollout.traced import Steps
from diffopt.tensors import derivatives, traced_loops
from diffopt.tensors.leaves import Leaves

if TYPE_CHECKING:
    from diffopt.adjoint.trajectory import Trajectory


class TracedSweep:
    """Pulls an adjoint back over the states that a traced rollout has stacked, derivations (1.1)-(1.3) and (13.1)."""

    def __init__(self, trajectory: Trajectory, first: int) -> None:
        """Over the steps from ``first`` on."""
        self._trajectory, self._first = trajectory, first
        self._reading, self._running = Reading(trajectory.layout, trajectory.rollout.numbers), _running_rows(trajectory)
        self._kept = (trajectory.rollout.stack or Leaves(()))[: trajectory.layout.state_count]
        wanted = trajectory.wanted
        self._shared = [place for place in wanted if not trajectory.layout.runs_over_steps(place)]
        self._stepped = [place for place in wanted if trajectory.layout.runs_over_steps(place)]

    def pull(self, cotangent: Leaves) -> tuple[Leaves, dict[Place, Tensor]]:
        """The adjoint of the state before the first of the steps, and the direct terms by place."""
        trajectory, inputs = self._trajectory, self._trajectory.inputs.detached()
        count, block = trajectory.layout.state_count, trajectory.rollout.kept.checkpoint
        carry = [*cotangent, *[torch.zeros_like(inputs.at(place)) for place in self._shared]]
        found = {place: torch.zeros_like(inputs.at(place)) for place in self._stepped}
        with trajectory.rollout.replay(None, cotangent[0].device):
            if isinstance(block, int) and block > 1:
                carry = self._pull_blocks(carry, inputs, blocks(trajectory.layout, self._first, block), found)
            else:
                carry = self._pull_steps(carry, inputs, found)
        found |= dict(zip(self._shared, carry[count:], strict=True))
        return Leaves(carry[:count]), found

    def _pull_steps(self, carry: list[Tensor], inputs: Inputs, found: dict[Place, Tensor]) -> list[Tensor]:
        """From the states before all steps."""
        shared = [inputs.at(place) for place in self._reading.shared]
        for stretch in reversed(stretches(self._trajectory.layout, self._first)):
            begin, end = stretch.first - self._first, stretch.last - self._first + 1
            states = [x[begin:end] for x in self._kept]
            rows = [*self._rows(inputs, stretch), *[x[begin:end] for x in self._trajectory.rollout.products]]
            carry, terms = self._loop(carry, rows, states, shared, stretch.updates)
            self._write(found, terms, stretch)
        return carry

    def _pull_blocks(
        self, carry: list[Tensor], inputs: Inputs, parts: list[Blocks], found: dict[Place, Tensor]
    ) -> list[Tensor]:
        """From the states before blocks of steps, each of which is taken again."""
        shared = [inputs.at(place) for place in self._reading.shared]
        for part in reversed(parts):
            begin = (part.first - self._first) // parts[0].length  # (whole blocks come before a short one)
            states = [x[begin : begin + part.number] for x in self._kept]
            rows = [x for s in part.stretches for x in part.cut(self._rows(inputs, part.all_of(s)), s)]
            carry, terms = traced_loops.scan_back(self._block(part, len(states)), carry, [*states, *rows], shared)
            for stretch, own in zip(part.stretches, part.by_stretch(terms), strict=True):
                self._write(found, [x.flatten(0, 1) for x in own], part.all_of(stretch))
        return carry

    def _block(self, part: Blocks, count: int) -> traced_loops.Body:
        """One block: its steps taken again, but for the last one, and pulled back."""
        steps = Steps(self._trajectory.dynamics, self._trajectory.inputs.detached(), self._reading)
        read = 1 + len(self._reading.stepped)

        def body(
            carry: Sequence[Tensor], row: Sequence[Tensor], shared: Sequence[Tensor]
        ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
            rows = part.by_stretch(row[count:])
            states = self._states(steps, part, Leaves(row[:count]), [own[:read] for own in rows], shared)
            after, terms = list(carry), list[Tensor]()
            for stretch, own, before in reversed(list(zip(part.stretches, rows, states, strict=True))):
                after, found = self._loop(after, own, before, shared, stretch.updates, nested=True)
                terms = [*found, *terms]
            return after, terms

        return body

    def _states(
        self, steps: Steps, part: Blocks, state: Leaves, rows: Sequence[Sequence[Tensor]], shared: Sequence[Tensor]
    ) -> list[list[Tensor]]:
        """The states before all steps of a block, stacked for each of its stretches."""
        options: dict[str, Any] = {"hands_out": False, "keeps": True, "nested": True}
        found = []
        for stretch, own in zip(part.stretches[:-1], rows[:-1], strict=True):
            state, made = steps.loop(state, own, shared, stretch.updates, **options)
            found.append(made)
        last, made = part.stretches[-1], [x[None] for x in state]
        if last.length > 1:  # (where the very last step leads is not asked for)
            after, before = steps.loop(state, [x[:-1] for x in rows[-1]], shared, last.updates, **options)
            made = [torch.cat([x, y[None]]) for x, y in zip(before, after, strict=True)]
        return [*found, made]

    def _loop(
        self,
        carry: Sequence[Tensor],
        rows: Sequence[Tensor],
        states: Sequence[Tensor],
        shared: Sequence[Tensor],
        updates: int,
        *,
        nested: bool = False,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Some equal steps pulled back, from the last to the first; the terms of what runs over steps, steps in front.

        ``rows`` and ``states`` are in the order of steps.
        """
        read = 1 + len(self._reading.stepped)
        given = [*rows[:read], *states, *rows[read:]]
        return traced_loops.scan_back(self._body(updates), carry, given, shared, nested=nested)

    def _write(self, found: dict[Place, Tensor], terms: Sequence[Tensor], stretch: Stretch) -> None:
        """Put the direct terms of what runs over these steps into their places."""
        for place, term in zip(self._stepped, terms, strict=True):
            self._reading.stacked(place, found[place], stretch).copy_(term)

    def _rows(self, inputs: Inputs, stretch: Stretch) -> list[Tensor]:
        """What runs over these steps: numbers and what is read, cotangents of what was handed out."""
        running = [x[stretch.first - 1 : stretch.last] for x in self._running if x is not None]
        return [*self._reading.rows(inputs, stretch), *running]

    def _body(self, updates: int) -> traced_loops.Body:
        layout, reading = self._trajectory.layout, self._reading
        count, read = layout.state_count, 1 + len(reading.stepped)

        def body(
            carry: Sequence[Tensor], row: Sequence[Tensor], shared: Sequence[Tensor]
        ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
            flat = [*row[read : read + count], *reading.joined(row[1:read], shared)]
            given = iter(row[read + count :])
            running = [None if x is None else next(given) for x in self._running]
            outputs, sources = self._recorded(flat, row[0], updates, Recalling(list(given)), observes=len(running) > 1)
            cotangents = [*carry[:count], *running]
            pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=False) if c is not None]
            terms = derivatives.pullback([o for o, _ in pairs], sources, [c for _, c in pairs])
            direct = dict(zip((*self._shared, *self._stepped), terms[count:], strict=True))
            sums = [x + direct[place] for x, place in zip(carry[count:], self._shared, strict=True)]
            return [*terms[:count], *sums], [direct[place] for place in self._stepped]

        return body

    def _recorded(
        self, flat: Sequence[Tensor], first: Any, updates: int, recalling: Recalling, *, observes: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """One step with its graph: the state after it and what it hands out, and what these are differentiated by."""
        dynamics: Dynamics = self._trajectory.dynamics
        layout, wanted = dynamics.layout, (*self._shared, *self._stepped)
        now = layout.inputs(flat, of_step=True)
        with torch.enable_grad():
            now = now.put({place: now.at(place).detach().requires_grad_() for place in wanted})
            roots = [x.detach().requires_grad_() for x in now.state]
            params = [x.view_as(x) for x in layout.params(roots)]
            with recalling:
                losses = dynamics.losses(params, now.read)
            if not recalling.as_noted:
                losses = dynamics.losses(params, now.read)
            grads = derivatives.filled(derivatives.gradient(losses.sum(), params, differentiable=True), params)
            after = dynamics.updates(roots, grads, now.hyperparameters, first, updates)
            observed = dynamics.observed(list(layout.params(after)), now.read) if observes else ()
        return [*after, losses, *observed], [*roots, *map(now.at, wanted)]


def _running_rows(trajectory: Trajectory) -> list[Tensor | None]:
    """The cotangents of the losses and of what was observed, steps in front; ``None``: zero, and nothing if all are."""
    running = trajectory.running
    if running is None:
        return []
    given = (running.losses, *running.observed)
    if all([x is None for x in running.observed]):
        given = given[:1]
    return [None if x is None else x.movedim(running.axis, 0) for x in given]
