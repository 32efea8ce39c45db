"""A finished rollout as an adjoint rule sees it, and the exact recursion over it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffopt import autodiff
from diffopt.dynamics import Dynamics
from diffopt.leaves import Leaves
from diffopt.rollout import Record, Stepper, Watch, refuse_other_losses


@final
@dataclass(frozen=True)
class Cotangents:
    """What a rule returns: the adjoint of the initial state and the direct terms.

    Attributes:
        initial: ``Lambda_0``, one tensor per state leaf; ``None``: zero.
        extras: the direct terms by number of the extra; a missing one is zero.
    """

    initial: Leaves | None
    extras: dict[int, Tensor]


@final
@dataclass(frozen=True)
class Trajectory:
    """A finished rollout, as an adjoint rule sees it. All tensors are stacked over tasks; time runs ``1..T``.

    Attributes:
        dynamics: the inner problem.
        initial: ``s_1``.
        extras: everything else a step reads.
        final: ``s_{T+1}``.
        record: what the rollout kept.
        wanted_state: the leaves of ``s_1`` whose adjoint is asked for.
        wanted: the extras whose direct term is asked for.
        check: whether to check that recomputed steps give the losses they gave before.
    """

    dynamics: Dynamics
    initial: Leaves
    extras: tuple[Tensor, ...]
    final: Leaves
    record: Record
    wanted_state: tuple[int, ...]
    wanted: tuple[int, ...]
    check: bool

    @property
    def steps(self) -> int:
        """``T``."""
        return self.dynamics.steps

    def sweep(self, cotangent: Leaves, first: int = 1) -> Cotangents:
        r"""The exact recursion from step ``T`` down to step ``first``, derivations (1.1)-(1.3).

        .. math:: \Lambda_{t-1} = J_t^\top\Lambda_t,\qquad \nabla = \sum_{t \ge first} B_t^\top\Lambda_t

        Returns ``Lambda_{first-1}`` and the direct terms. One HVP per step, one step after the other.
        """
        count, adjoint = self.dynamics.state_count, cotangent
        direct = DirectTerms(self)
        position = {number: count + i for i, number in enumerate(self.record.wanted)}
        for step, graph in self._graphs_backwards(first):
            states = range(count) if step > first or self.wants_initial else range(0)
            terms = graph.pullback(adjoint, [*states, *(position[number] for number in self.wanted)])
            direct.add(step, dict(zip(self.wanted, terms[len(states) :], strict=True)))
            self.record.counts.add_products(1)
            if states:
                pairs = zip(terms, adjoint, strict=False)
                adjoint = Leaves(torch.zeros_like(old) if new is None else new for new, old in pairs)
        return Cotangents(adjoint if self.wants_initial else None, direct.collect())

    def _graphs_backwards(self, first: int) -> Iterator[tuple[int, autodiff.StepGraph]]:
        """The graphs of steps ``T, ..., first``, retained or recorded again block by block; each is given up after."""
        end, stepper = self.steps, Stepper(self.dynamics, self.extras, self.record, Watch())
        again = self.losses_to_replay()
        while end >= first:
            self.record.usable = False
            if end in self.record.graphs:
                yield end, self.record.graphs.pop(end)
                end -= 1
                continue
            start = max(step for step in self.record.states if step <= end)
            state, graphs = self.record.states.pop(start), []
            for step in range(start, end + 1):
                with self.record.replay(step, state[0].device):
                    graph, state, again[..., step - 1] = stepper.graph(state, step)
                graphs.append(graph)
            for step in range(end, start - 1, -1):
                yield step, graphs.pop()
            end = start - 1
        self.refuse_other_losses(again)

    @property
    def wants_initial(self) -> bool:
        """Whether the adjoint of any leaf of ``s_1`` is asked for."""
        return bool(self.wanted_state)

    def losses_to_replay(self) -> Tensor:
        """A copy of the rollout's losses ``[..., T]``, in which a replay writes those that it recomputes.

        (One tensor for all: see :func:`diffopt.rollout.roll_out` for what small ones per step do to memory.)
        """
        return self.final[0].new_empty(0) if self.record.losses is None else self.record.losses.clone()

    def refuse_other_losses(self, again: Tensor) -> None:
        """Refuse, where checks are on, recomputed losses that are not those of the rollout."""
        if self.check and self.record.losses is not None:
            refuse_other_losses(again, self.record.losses)


class DirectTerms:
    """Sums ``B_t' Lambda_t`` over steps; a term of what runs over steps goes to its own place instead."""

    def __init__(self, trajectory: Trajectory) -> None:
        """Start at zero."""
        self._trajectory = trajectory
        self._shared: dict[int, Tensor] = {}
        self._stepped: dict[int, Tensor] = {}

    def add(self, step: int, terms: Mapping[int, Tensor | None]) -> None:
        """Add step ``step``'s terms, by number of the extra; ``None`` is zero."""
        for number, term in terms.items():
            if term is None:
                continue
            if self._trajectory.dynamics.stepped[number]:
                if number not in self._stepped:
                    self._stepped[number] = torch.zeros_like(self._trajectory.extras[number])
                self._trajectory.dynamics.slice_at(number, self._stepped[number], step).copy_(term)
            else:
                self._shared[number] = self._shared[number] + term if number in self._shared else term

    def collect(self) -> dict[int, Tensor]:
        """The sums, by number of the extra."""
        return self._shared | self._stepped
