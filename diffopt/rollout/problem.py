"""One inner problem, ready to run, and the end of its rollout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from diffopt.rollout.along import NEVER, Stop
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.inputs import Inputs
from diffopt.rollout.record import Record


@final
@dataclass(frozen=True)
class Problem:
    """An inner problem ready to run: its dynamics, all its tensors, and whether to check values.

    ``popped`` are the levels of transforms that the problem has been taken out of, whose tensors it may not capture;
    ``stop`` is what may end it early.
    """

    dynamics: Dynamics
    inputs: Inputs
    check: bool
    popped: range = range(0)
    stop: Stop = NEVER


@final
@dataclass(frozen=True)
class Outcome:
    """The end of a rollout: the final state, what was handed out on the way, and what was done.

    ``along`` are the inner losses ``[steps]``, what was observed and what the loss returned besides.
    """

    state: tuple[Tensor, ...]
    along: tuple[Tensor, ...]
    record: Record
