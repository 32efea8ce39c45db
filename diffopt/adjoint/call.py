"""One solve on its way through the transforms around it, and what its estimator is to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Protocol

from diffopt.adjoint.claims import Claims
from diffopt.adjoint.trajectory import Cotangents, Trajectory
from diffopt.rollout.along import NEVER, Stop
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.inputs import Place
from diffopt.rollout.record import Keep, Record, Watch
from diffopt.tensors.leaves import Leaves


class PullsBack(Protocol):
    """What an estimator is to these functions."""

    takes_running_costs: ClassVar[bool]
    """Whether it takes the cotangents of what is handed out along the way."""

    def claims(self, steps: int) -> Claims:
        """What holds of it on so many steps."""
        ...

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        """The adjoint of the initial state and the direct terms, given that of the final state."""
        ...

    def pullbacks(self, trajectory: Trajectory, cotangents: Sequence[Leaves]) -> list[Cotangents] | None:
        """The same for many, of which a step is taken again once only; ``None``: not by this estimator."""
        ...


@dataclass(frozen=True)
class Call:
    """One solve on its way down through the transforms around it.

    Attributes:
        wanted: the inputs, by number, that some transform above, or autograd below, differentiates.
        stop: what may end the rollout early.
        restacked: the axes of the tasks that stand for vmaps which the pullback runs under and the rollout did not.
        running: which of the outputs along the way have a cotangent, by number from the losses on.
    """

    dynamics: Dynamics
    estimator: PullsBack
    keep: Keep
    record: Record
    watch: Watch
    stop: Stop = NEVER
    wanted: frozenset[int] = frozenset()
    restacked: tuple[int, ...] = ()
    running: tuple[int, ...] = ()

    def until_its_end(self) -> Call:
        """The same, of the steps that were made."""
        dynamics = self.dynamics.until(self.record.rollout.steps)
        return self if dynamics is self.dynamics else replace(self, dynamics=dynamics)

    @cached_property
    def state_count(self) -> int:
        """How many inputs are leaves of the state."""
        return self.dynamics.layout.state_count

    @cached_property
    def wanted_places(self) -> tuple[tuple[int, ...], tuple[Place, ...]]:
        """The leaves of the state that are differentiated, by number, and the other inputs that are, by place."""
        count, layout, wanted = self.state_count, self.dynamics.layout, sorted(self.wanted)
        return tuple([i for i in wanted if i < count]), tuple([layout.place(i) for i in wanted if i >= count])
