"""A finished rollout as an estimator sees it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from diffopt.adjoint import exact_sweep, sweep_program
from diffopt.adjoint.update_derivatives import Updates
from diffopt.rollout.along import Running
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.inputs import Inputs, Part, Place
from diffopt.rollout.layout import Layout
from diffopt.rollout.record import Record, Rollout
from diffopt.rollout.refusals import refuse_other_losses
from diffopt.rollout.replay import Replay
from diffopt.tensors import tracing
from diffopt.tensors.expected import Expected
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.tasks import Tasks


@final
@dataclass(frozen=True)
class Cotangents:
    """What an estimator returns: the adjoint of the initial state and the direct terms.

    Attributes:
        initial: ``Lambda_0``, one tensor per state leaf; ``None``: zero.
        direct: the direct terms of what the loss reads and of the hyperparameters, by place; a missing one is zero.
    """

    initial: Leaves | None
    direct: Mapping[Place, Tensor]

    @staticmethod
    def of(found: Mapping[Place, Tensor], trajectory: Trajectory) -> Cotangents:
        """Those of all wanted inputs by place; a leaf of the state that is missing among others is zero."""
        direct = {place: term for place, term in found.items() if place.part in ("read", "hyperparameters")}
        if not trajectory.wants_initial:
            return Cotangents(None, direct)
        leaves = zip(trajectory.dynamics.layout.places, trajectory.initial, strict=False)
        return Cotangents(Leaves([found.get(place, torch.zeros_like(x)) for place, x in leaves]), direct)

    @property
    def extras(self) -> Mapping[Place, Tensor]:
        """The direct terms, as 0.1 called them."""
        return self.direct


@final
@dataclass(frozen=True)
class Trajectory:
    """A finished rollout, as an estimator sees it. All tensors are stacked over tasks; time runs ``1..T``.

    Attributes:
        dynamics: the inner problem.
        inputs: all its tensors: ``s_1``, and everything else that a step reads.
        final: ``s_{T+1}``.
        record: what the rollout kept, and where counts and diagnostics go.
        wanted_state: the leaves of ``s_1`` whose adjoint is asked for, by number.
        wanted: the places of the other inputs whose direct term is asked for.
        check: whether to check that recomputed steps give the losses they gave before.
        running: the cotangents of what was handed out along the way; ``None``: all are zero.
    """

    dynamics: Dynamics
    inputs: Inputs
    final: Leaves
    record: Record
    wanted_state: tuple[int, ...]
    wanted: tuple[Place, ...]
    check: bool
    running: Running | None = None

    @property
    def initial(self) -> Leaves:
        """``s_1``."""
        return self.inputs.state

    @property
    def extras(self) -> dict[Place, Tensor]:
        """What a step reads besides its state, by place."""
        places = self.layout.places[self.layout.state_count :]
        return dict(zip(places, (*self.inputs.read, *self.inputs.hyperparameters), strict=True))

    @property
    def layout(self) -> Layout:
        """How the tensors lie."""
        return self.dynamics.layout

    @property
    def steps(self) -> int:
        """``T``."""
        return self.dynamics.layout.steps

    @property
    def tasks_shape(self) -> tuple[int, ...]:
        """The sizes of the leading axes of all tensors: one per vmap around the solve, ``()`` if there is none."""
        return self.dynamics.layout.tasks_shape

    @property
    def tasks(self) -> Tasks:
        """Norms and inner products of each task's own part."""
        return Tasks(len(self.dynamics.layout.levels))

    @property
    def rollout(self) -> Rollout:
        """What the rollout kept."""
        return self.record.rollout

    @property
    def updates(self) -> Updates:
        """The updates of all steps, if their states and gradients were kept."""
        return Updates(self.dynamics, self.inputs, self.rollout)

    @property
    def wanted_places(self) -> list[Place]:
        """The places of all wanted inputs, those of the state among them."""
        return [*(self.dynamics.layout.places[i] for i in self.wanted_state), *self.wanted]

    def wanted_of(self, part: Part) -> list[Place]:
        """The wanted inputs of one part, such as ``"hyperparameters"``."""
        return [place for place in self.wanted if place.part == part]

    def sweep(self, cotangent: Leaves, first: int = 1) -> Cotangents:
        r"""The exact recursion from step ``T`` down to step ``first``, derivations (1.1)-(1.3).

        .. math:: \Lambda_{t-1} = J_t^\top\Lambda_t,\qquad \nabla = \sum_{t \ge first} B_t^\top\Lambda_t

        What was handed out along the way enters where its step is pulled back (13.1).

        Returns ``Lambda_{first-1}`` and the direct terms. One HVP per step, one step after the other.

        Raises:
            EstimatorError: the estimator keeps the steps from another one on.
        """
        return Cotangents(*exact_sweep.sweep(self, cotangent, first))

    def sweeps(self, cotangents: Sequence[Leaves], first: int = 1) -> list[Cotangents]:
        """:meth:`sweep` for each of many cotangents; what is recorded again is recorded once."""
        return [Cotangents(*found) for found in exact_sweep.sweeps(self, cotangents, first)]

    def by_program(
        self, cotangent: Leaves, rule: Hashable, pull: Pull, name: str, limit: float, what: str, fix: str
    ) -> Cotangents:
        """``pull(self, cotangent)``, made one program where the rollout was one, which is found again by ``rule``.

        It looks at no number, warns of nothing, and takes what is kept from :meth:`params_at`, :attr:`updates` and
        :class:`ParallelCurvature` only. What it has measured of its estimate is reported as by :meth:`report`.
        """
        if self.rollout.stack is None or tracing.current() is not None:
            found, measured = pull(self, cotangent)
        else:
            initial, direct, measured = sweep_program.pulled(self, self.rollout.stack, cotangent, rule, pull)
            found = Cotangents(initial, direct)
        if measured:
            self.report(name, measured[0], measured[1], limit, what, fix)
        return found

    def params_at(self, steps: range) -> Leaves:
        """The params before steps in a row, stacked."""
        stack, layout, first = self.rollout.stack, self.layout, self.rollout.first or 1
        if stack is not None:
            return layout.params(stack).map(lambda leaf: leaf[steps.start - first : steps.stop - first])
        states = [layout.params(self.rollout.states[t]) for t in steps]
        return Leaves(torch.stack(column) for column in zip(*states, strict=True))

    def replay(self) -> Replay:
        """Steps of the rollout, taken again."""
        return Replay(self.dynamics, self.inputs, self.rollout, self.record.counts, check=self.check)

    def report(self, name: str, part: Tensor, whole: Tensor, limit: float, what: str, fix: str) -> None:
        """Leave ``part / whole`` of each task in the diagnostics, and warn as :meth:`warn_if_bad` does of it."""
        relative = self.record.diagnostics[name] = torch.where(whole > 0, part / whole, 0)
        self.warn_if_bad(relative, limit, what, fix)

    def warn_if_bad(self, measured: Tensor, limit: float, what: str, fix: str = "Use Reverse()") -> None:
        """Warn, where checks are on, of an estimate whose measure ``[...]`` is above ``limit`` for some task.

        ``what`` names the measure, ``fix`` says what to do.
        """
        expected, trace = Expected(limit, what, fix), tracing.current()
        if self.check and trace is not None:
            trace.expect(expected, measured)
        elif self.check:
            expected.warn(expected.excess(measured))

    @property
    def wants_initial(self) -> bool:
        """Whether the adjoint of any leaf of ``s_1`` is asked for."""
        return bool(self.wanted_state)

    @property
    def compares_losses(self) -> bool:
        """Whether recomputed losses are compared with those of the rollout (not by what a program computes)."""
        return self.check and self.rollout.losses is not None and tracing.current() is None

    def losses_to_replay(self) -> Tensor:
        """A copy of the rollout's losses ``[..., T]``, in which a replay writes those that it recomputes.

        (One tensor for all: see ``diffopt.rollout.loop.roll_out`` for what small ones per step do to memory.)
        """
        return self.final[0].new_empty(0) if self.rollout.losses is None else self.rollout.losses.clone()

    def refuse_other_losses(self, again: Tensor) -> None:
        """Refuse, where checks are on, recomputed losses that are not those of the rollout."""
        if self.compares_losses:
            assert self.rollout.losses is not None
            refuse_other_losses(again, self.rollout.losses, self.rollout.autocast)


Pulled: TypeAlias = "tuple[Cotangents, Sequence[Tensor]]"
"""A hypergradient, and what is measured of it: a part and a whole, or nothing."""

Pull: TypeAlias = "Callable[[Trajectory, Leaves], Pulled]"
"""From a trajectory and the adjoint of its end to the hypergradient."""
