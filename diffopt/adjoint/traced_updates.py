"""The blocks of many updates that need no curvature, as part of a graph that is being traced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from diffopt.rollout.inputs import Place
from diffopt.rollout.stretches import Reading, Stretch, stretches
from diffopt.tensors import derivatives, traced_loops, transforms
from diffopt.tensors.leaves import Leaves

if TYPE_CHECKING:
    from diffopt.adjoint.update_derivatives import Updates


@final
class TracedBlocks:
    """For any update: ``E_t`` and ``D_t`` of all equal steps by one graph, under ``vmap``; ``C_t`` by a loop.

    Where an update passes the adjoint of the state on as it is, as plain gradient descent does, there is no loop: the
    adjoints of all steps are a cumulative sum.
    """

    def __init__(self, updates: Updates) -> None:
        """Of a rollout whose states and gradients are one stack, from the first step on."""
        self._dynamics, self._inputs = updates.dynamics, updates.inputs.detached()
        self._layout, self._rollout = updates.dynamics.layout, updates.rollout
        self._reading = Reading(self._layout, updates.rollout.numbers)
        self._places = [Place("hyperparameters", i) for i in range(len(updates.inputs.hyperparameters))]
        self._shared = [place for place in self._places if not self._layout.runs_over_steps(place)]
        self._stepped = [place for place in self._places if self._layout.runs_over_steps(place)]

    def to_gradient(self, adjoints: Leaves, first: int) -> Leaves:
        """See ``UpdateBlocks``."""
        count, found = self._layout.state_count, []
        for part in self._parts(first, first + len(adjoints[0]) - 1):
            own = _cut(adjoints, part, first)
            terms = self._graph(part).pullback(own, range(count, count + self._layout.params_count))
            found.append(Leaves(derivatives.or_zeros(terms, self._layout.params(own))))
        return _joined(found)

    def all_terms(
        self, hypers: Sequence[Place], adjoints: Leaves
    ) -> Iterator[tuple[range, dict[Place, Tensor | None]]]:
        """Steps in a row, and their ``D_t' x_t`` for the stack ``x_1, ..., x_T``: sums, or with the steps in front."""
        first = self._layout.state_count + self._layout.params_count
        for part in self._parts(1, self._layout.steps):
            terms = self._graph(part, hypers).pullback(_cut(adjoints, part, 1), range(first, first + len(hypers)))
            yield part.steps, dict(zip(hypers, terms, strict=True))

    def scan(self, last: Leaves, first: int, end: int, pushes: Leaves | None) -> Leaves:
        """See ``UpdateBlocks``."""
        found: list[Leaves] = []
        for part in reversed(self._parts(first, end)):
            own = None if pushes is None else _cut(pushes, part, first)
            found.append(self._sums(last, part, own) if self._is_identity(part) else self._loop(last, part, own))
            last = found[-1].map(lambda leaf: leaf[0])
        return _joined(found[::-1])

    def _parts(self, first: int, end: int) -> list[Stretch]:
        """The steps ``first, ..., end`` in rows of equal ones."""
        parts = [part._replace(last=min(part.last, end)) for part in stretches(self._layout, first)]
        return [part for part in parts if part.length > 0]

    def _rows(self, part: Stretch) -> list[Tensor]:
        """What runs over some steps: numbers of updates, states, gradients, and the hyperparameters that do."""
        begin, end = part.first - 1, part.last
        kept = [x[begin:end] for x in self._rollout.stack or ()]
        stepped = [self._reading.stacked(place, self._inputs.at(place), part) for place in self._stepped]
        return [self._reading.numbers(self._inputs, part), *kept, *stepped]

    def _update(self, row: Sequence[Tensor], hypers: dict[Place, Tensor], updates: int) -> Leaves:
        """The state after one step, whose number, state and gradient are the row."""
        state, grads, _ = self._layout.split_update(row[1:])
        return self._dynamics.updates(state, grads, [hypers[place] for place in self._places], row[0], updates)

    def _graph(self, part: Stretch, wanted: Sequence[Place] = ()) -> derivatives.Graph:
        """From the states, the gradients and the hyperparameters of some steps to the states after them."""
        number, *rows = self._rows(part)
        kept = len(rows) - len(self._stepped)
        values = dict(zip(self._stepped, rows[kept:], strict=True))
        values |= {place: self._inputs.at(place) for place in self._shared}
        dims = (*(0,) * (1 + kept), *(0 if place in self._stepped else None for place in self._places))

        def function(roots: tuple[Tensor, ...]) -> Sequence[Tensor]:
            current = values | dict(zip(wanted, roots[kept:], strict=True))

            def update(*row: Tensor) -> tuple[Tensor, ...]:
                hypers = dict(zip(self._places, row[1 + kept :], strict=True))
                return tuple(self._update(row[: 1 + kept], hypers, part.updates))

            vmapped = transforms.vmap(update, [dims], [part.length], ["error"])
            found: Sequence[Tensor] = vmapped(number, *roots[:kept], *[current[place] for place in self._places])
            return found

        return derivatives.Graph.record(function, [*rows[:kept], *[values[place] for place in wanted]])

    def _is_identity(self, part: Stretch) -> bool:
        """Whether ``C_t' x`` is ``x``, and not only equal to it, for the update of every one of some equal steps."""
        first = [x[0] for x in self._rows(part)]
        before = Leaves(map(torch.empty_like, self._layout.split_update(first[1:])[0]))
        terms = self._to_state(first, part.updates, [self._inputs.at(place) for place in self._shared], before)
        return all([x is y for x, y in zip(terms, before, strict=True)])

    def _to_state(
        self, row: Sequence[Tensor], updates: int, shared: Sequence[Tensor], adjoint: Leaves
    ) -> Sequence[Tensor | None]:
        """``C_t' x`` of one step; ``None`` is zero."""
        first = 1 + self._layout.state_count
        grads, rest = row[first : first + self._layout.params_count], row[first + self._layout.params_count :]
        hypers = dict(zip(self._stepped, rest, strict=True)) | dict(zip(self._shared, shared, strict=True))
        graph = derivatives.Graph.record(
            lambda roots: self._update([row[0], *roots, *grads], hypers, updates), row[1:first]
        )
        return graph.pullback(adjoint, range(first - 1))

    def _sums(self, last: Leaves, part: Stretch, pushes: Leaves | None) -> Leaves:
        """Of an update that passes adjoints on as they are."""
        found = last.map(lambda leaf: leaf.expand(part.length, *leaf.shape))
        if pushes is None:
            return found
        return self._layout.pushed(found, pushes.map(lambda leaf: leaf.flip(0).cumsum(0).flip(0)))

    def _loop(self, last: Leaves, part: Stretch, pushes: Leaves | None) -> Leaves:
        """Step by step."""
        rows = self._rows(part)
        count = len(rows)

        def body(
            carry: Sequence[Tensor], row: Sequence[Tensor], shared: Sequence[Tensor]
        ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
            adjoint = Leaves(carry)
            before = Leaves(derivatives.or_zeros(self._to_state(row[:count], part.updates, shared, adjoint), adjoint))
            now = before if pushes is None else self._layout.pushed(before, Leaves(row[count:]))
            return now, now

        backwards = [x.flip(0) for x in (*rows, *(pushes or ()))]
        _, found = traced_loops.scan(body, last, backwards, [self._inputs.at(place) for place in self._shared])
        return Leaves([x.flip(0) for x in found])


def _cut(stack: Leaves, part: Stretch, first: int) -> Leaves:
    """The rows of some steps, of a stack that begins with step ``first``."""
    return stack.map(lambda leaf: leaf[part.first - first : part.last - first + 1])


def _joined(parts: Sequence[Leaves]) -> Leaves:
    """Stacks one behind the other."""
    return parts[0] if len(parts) == 1 else Leaves(torch.cat(column) for column in zip(*parts, strict=True))
