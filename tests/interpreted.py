"""A program of which inductor is not asked: the graph, run as it was traced, so that a test takes no compiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt.rollout import program
from diffopt.rollout.program import Program
from diffopt.tensors import random_state, tracing


class Interpreted:
    """Stands in the place of :class:`Program`; ``made`` counts those that were made."""

    made = 0
    check, compare, fits, captured = Program.check, Program.compare, Program.fits, Program.captured
    warn, _without_excesses = Program.warn, Program._without_excesses

    def __init__(self, function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor]) -> None:
        with random_state.preserved(tensors[0].device):
            noted = tracing.Trace()
            self.graph, self._captured = tracing.trace(function, tensors, noted)
        self._expected, self._excesses = noted.expected, list[Tensor]()
        self._kinds: list[Any] = list(map(program._kind, self._captured))
        Interpreted.made += 1

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return self._without_excesses(list(self.graph(*map(program._ready, (*tensors, *self._captured)))))
