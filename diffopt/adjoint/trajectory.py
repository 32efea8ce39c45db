"""A finished rollout as an adjoint rule sees it, and the exact recursion over it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffopt.adjoint.update_derivatives import Updates
from diffopt.errors import EstimateWarning, EstimatorError
from diffopt.rollout import compiled
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.loop import refuse_other_losses
from diffopt.rollout.record import Record, Watch
from diffopt.rollout.step_graph import Block, BlockTerms
from diffopt.rollout.stepper import Stepper
from diffopt.tensors.leaves import Leaves


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

    @property
    def tasks_shape(self) -> tuple[int, ...]:
        """The sizes of the leading axes of all tensors: one per vmap around the solve, ``()`` if there is none."""
        return self.dynamics.tasks_shape

    @property
    def updates(self) -> Updates:
        """The updates of all steps, if their states and gradients were kept."""
        return Updates(self.dynamics, self.extras, self.record)

    @property
    def wanted_hypers(self) -> list[int]:
        """The wanted extras that belong to the optimizer."""
        return [i for i in self.wanted if i >= self.dynamics.hyperparameters_start]

    def sweep(self, cotangent: Leaves, first: int = 1) -> Cotangents:
        r"""The exact recursion from step ``T`` down to step ``first``, derivations (1.1)-(1.3).

        .. math:: \Lambda_{t-1} = J_t^\top\Lambda_t,\qquad \nabla = \sum_{t \ge first} B_t^\top\Lambda_t

        Returns ``Lambda_{first-1}`` and the direct terms. One HVP per step, one step after the other.

        Raises:
            EstimatorError: the rule keeps the steps from another one on.
        """
        if first != self.record.first:
            raise EstimatorError(
                f"sweep(first={first}): the rule keeps steps from {self.record.first} on, expected the same number; "
                f"return Keep(first={first}) from keep()"
            )
        stored = isinstance(self.record.checkpoint, int)
        done = self._compiled_sweep(cotangent, first) if self.dynamics.compile and stored else None
        return self._sweep_of_blocks(cotangent, first) if done is None else done

    def _sweep_of_blocks(self, cotangent: Leaves, first: int) -> Cotangents:
        adjoint, direct = cotangent, DirectTerms(self)
        for block, start, end in self._blocks_backwards(first):
            passes_on = start > first or self.wants_initial
            terms = block.pullback(adjoint, state=range(self.dynamics.state_count if passes_on else 0))
            direct.add_block(terms)
            self.record.counts.products += end - start + 1
            self.record.counts.depth += end - start + 1
            adjoint = terms.state
        return Cotangents(adjoint if self.wants_initial else None, direct.collect())

    def _compiled_sweep(self, cotangent: Leaves, first: int) -> Cotangents | None:
        """The same from stored states, each step one compiled call; ``None`` if it could not be compiled."""
        pullbacks, direct, adjoint = compiled.Pullbacks(self.dynamics, self.wanted), DirectTerms(self), cotangent
        stepper, again = (
            Stepper(self.dynamics, self.extras, self.record, Watch(captures=self.check)),
            self.losses_to_replay(),
        )
        device, end = self.final[0].device, self.steps
        for start in reversed(self.record.states):
            states = stepper.states(self.record.state(start, device), start, end, again)
            for step in range(end, start - 1, -1):
                with self.record.replay(None, device):
                    terms = pullbacks.pull(states.pop(), self.dynamics.at_step(self.extras, step), step, adjoint)
                if terms is None:
                    return None  # what is stored is still there
                adjoint = terms[0]
                direct.add(step, terms[1])
            end = start - 1
        self.record.counts.products += self.steps - first + 1
        self.record.counts.depth += self.steps - first + 1
        self.record.usable = False
        self.record.states.clear()
        self.refuse_other_losses(again)
        return Cotangents(adjoint if self.wants_initial else None, direct.collect())

    def _blocks_backwards(self, first: int) -> Iterator[tuple[Block, int, int]]:
        """The graphs of steps ``first, ..., T`` in blocks, the last first, retained or recorded again one by one."""
        end, stepper = self.steps, Stepper(self.dynamics, self.extras, self.record, Watch(captures=self.check))
        if end >= first:
            self.record.usable = False
        if self.record.block is not None:
            block, self.record.block = self.record.block, None
            yield block, first, end
            return
        again = self.losses_to_replay()
        while end >= first:
            start = next(reversed(self.record.states))  # stored in the order of the steps; later ones are used up
            state = self.record.take_state(start, self.final[0].device)
            block, _ = stepper.block(state, start, end, again)
            yield block, start, end
            end = start - 1
        self.refuse_other_losses(again)

    def warn_if_bad(self, measured: Tensor, limit: float, what: str) -> None:
        """Warn, where checks are on, of an estimate whose measure ``[...]`` is above ``limit`` for some task."""
        if self.check and bool((measured > limit).any()):
            warnings.warn(
                f"{what} is {float(measured.max()):.2g}, expected at most {limit:g}: the inner problem is outside the "
                "range in which this estimate converges, and the hypergradient may be wrong in size and sign. Use a "
                "higher order, fewer or smaller steps, or Reverse()",
                EstimateWarning,
                stacklevel=2,
            )

    @property
    def wants_initial(self) -> bool:
        """Whether the adjoint of any leaf of ``s_1`` is asked for."""
        return bool(self.wanted_state)

    def losses_to_replay(self) -> Tensor:
        """A copy of the rollout's losses ``[..., T]``, in which a replay writes those that it recomputes.

        (One tensor for all: see ``diffopt.rollout.loop.roll_out`` for what small ones per step do to memory.)
        """
        return self.final[0].new_empty(0) if self.record.losses is None else self.record.losses.clone()

    def refuse_other_losses(self, again: Tensor) -> None:
        """Refuse, where checks are on, recomputed losses that are not those of the rollout."""
        if self.check and self.record.losses is not None:
            refuse_other_losses(again, self.record.losses, self.record.autocast)


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

    def add_block(self, terms: BlockTerms) -> None:
        """Add the terms of a block."""
        self.add(0, terms.shared)
        for (number, step), term in terms.stepped.items():
            self.add(step, {number: term})

    def add_updates(self, adjoints: Leaves) -> None:
        """Add ``D_t' x_t`` of all steps for the stack ``x_1, ..., x_T``."""
        trajectory = self._trajectory
        for step, terms in trajectory.updates.all_terms(trajectory.wanted_hypers, adjoints):
            self.add(step, terms)

    def collect(self) -> dict[int, Tensor]:
        """The sums, by number of the extra."""
        return self._shared | self._stepped
