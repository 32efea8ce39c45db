"""The direct terms of a hypergradient, summed over steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from diffopt.adjoint.traced_updates import TracedBlocks
from diffopt.rollout.inputs import Place
from diffopt.rollout.step_graph import BlockTerms
from diffopt.tensors.leaves import Leaves

if TYPE_CHECKING:
    from diffopt.adjoint.trajectory import Trajectory


@final
class DirectTerms:
    """Sums ``B_t' Lambda_t`` over steps; a term of what runs over steps goes to its own place instead."""

    def __init__(self, trajectory: Trajectory) -> None:
        """Start at zero."""
        self._trajectory, self._layout = trajectory, trajectory.layout
        self._sums: dict[Place, Tensor] = {}

    def add(self, step: int, terms: Mapping[Place, Tensor | None]) -> None:
        """Add step ``step``'s terms, by place; ``None`` is zero."""
        for place, term in terms.items():
            if term is None:
                continue
            if self._layout.runs_over_steps(place):
                if place not in self._sums:
                    self._sums[place] = torch.zeros_like(self._trajectory.inputs.at(place))
                self._layout.slice_at(place, self._sums[place], step).copy_(term)
            else:
                self._sums[place] = self._sums[place] + term if place in self._sums else term

    def add_block(self, terms: BlockTerms) -> None:
        """Add the terms of a block."""
        self.add(0, terms.shared)
        for (place, step), term in terms.stepped.items():
            self.add(step, {place: term})

    def add_updates(self, adjoints: Leaves) -> None:
        """Add ``D_t' x_t`` of all steps for the stack ``x_1, ..., x_T``."""
        trajectory = self._trajectory
        updates, hypers = trajectory.updates, trajectory.wanted_of("hyperparameters")
        if hypers and trajectory.rollout.stack is not None:
            for steps, rows in TracedBlocks(updates).all_terms(hypers, adjoints):
                self.add_rows(steps, rows)
            return
        for step, terms in updates.all_terms(hypers, adjoints):
            self.add(step, terms)

    def add_rows(self, steps: range, terms: Mapping[Place, Tensor | None]) -> None:
        """Add the terms of steps in a row: of what runs over steps with these in front, of all else their sums."""
        for place, term in terms.items():
            if term is None or not self._layout.runs_over_steps(place):
                self.add(steps.start, {place: term})
                continue
            if place not in self._sums:
                self._sums[place] = torch.zeros_like(self._trajectory.inputs.at(place))
            self._layout.slices_at(place, self._sums[place], steps).copy_(term)

    def collect(self) -> dict[Place, Tensor]:
        """The sums, by place."""
        return self._sums
