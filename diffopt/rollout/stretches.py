"""Steps in rows of equal ones, and in blocks of these, as loops of a trace take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from diffopt.rollout.inputs import Inputs, Place
from diffopt.rollout.layout import Layout


class Stretch(NamedTuple):
    """Steps ``first, ..., last``, each of so many updates."""

    first: int
    last: int
    updates: int

    @property
    def steps(self) -> range:
        """Their numbers."""
        return range(self.first, self.last + 1)

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


class Blocks(NamedTuple):
    """Blocks in a row, of each of which the state before its first step is kept.

    Attributes:
        number: how many there are.
        stretches: the steps of the first one; several only if it is the only one.
    """

    number: int
    stretches: list[Stretch]

    @property
    def first(self) -> int:
        """The first step of the first one."""
        return self.stretches[0].first

    @property
    def length(self) -> int:
        """How many steps each of them has."""
        return sum([stretch.length for stretch in self.stretches])

    def all_of(self, stretch: Stretch) -> Stretch:
        """The steps of all blocks that are to each what ``stretch`` is to the first."""
        return stretch._replace(last=stretch.first + self.number * stretch.length - 1)

    def cut(self, tensors: Sequence[Tensor], stretch: Stretch) -> list[Tensor]:
        """Tensors with a leading axis for the steps of :meth:`all_of`, cut into blocks."""
        return [x.reshape(self.number, stretch.length, *x.shape[1:]) for x in tensors]

    def by_stretch(self, row: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """What belongs to each stretch of what is given of all, one after the other."""
        size = len(row) // len(self.stretches)
        return [row[i * size : (i + 1) * size] for i in range(len(self.stretches))]


def blocks(layout: Layout, first: int, length: int) -> list[Blocks]:
    """The steps from ``first`` on in blocks of ``length``, of which the last may be short."""
    last = layout.steps
    short = layout.length(last) < layout.window
    count = (last - short - first + 1) // length
    begin = first + count * length
    whole = Stretch(first, first + length - 1, layout.window)
    return [
        *([Blocks(count, [whole])] if count else []),
        *([Blocks(1, stretches(layout, begin))] if begin <= last else []),
    ]


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
        stepped = [self.stacked(place, inputs.at(place), stretch) for place in self.stepped]
        return [self.numbers(inputs, stretch), *stepped]

    def numbers(self, inputs: Inputs, stretch: Stretch) -> Tensor:
        """Those of the steps' first updates."""
        if self._numbers is not None:
            return self._numbers[stretch.first - 1 : stretch.last].double()
        first, window = self._layout.first_update(stretch.first), self._layout.window
        end = first + stretch.length * window
        return torch.arange(first, end, window, dtype=torch.float64, device=inputs.params[0].device)

    def stacked(self, place: Place, tensor: Tensor, stretch: Stretch) -> Tensor:
        """A view of what these steps see of the tensor at a place, steps in front; see ``Layout.slices_at``."""
        return self._layout.slices_at(place, tensor, stretch.steps)

    def joined(self, stepped: Sequence[Tensor], shared: Sequence[Tensor]) -> list[Tensor]:
        """What one step reads, in order."""
        known = dict(zip(self.stepped, stepped, strict=True)) | dict(zip(self.shared, shared, strict=True))
        return [known[place] for place in self._places]
