"""One inner problem, ready to run, and the end of its rollout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.inputs import Inputs
from diffopt.rollout.record import Record


@final
@dataclass(frozen=True)
class Problem:
    """An inner problem ready to run: its dynamics, all its tensors, and whether to check values.

    ``popped`` are the levels of transforms that the problem has been taken out of, whose tensors it may not capture.
    """

    dynamics: Dynamics
    inputs: Inputs
    check: bool
    popped: range = range(0)


@final
@dataclass(frozen=True)
class Outcome:
    """The end of a rollout: the final state, the inner losses ``[steps]``, and what was done on the way."""

    state: tuple[Tensor, ...]
    losses: Tensor
    record: Record
