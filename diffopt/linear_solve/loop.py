"""The loop of an iterative solver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from diffopt.tensors import traced_loops, tracing, transforms
from diffopt.tensors.leaves import Leaves

Carry: TypeAlias = Sequence[Leaves]
"""What goes from one iteration to the next: vectors, and scalars of each task."""


def repeated(step: Callable[..., Carry], carry: Carry, most: int, active: Callable[..., Tensor] | None = None) -> Carry:
    """``carry = step(*carry)`` while any task is ``active(*carry)``, and ``most`` times at most.

    A step must leave the tasks that are not as they are: where it is not known for free that all have stopped, it goes
    on for nothing. In a trace it is one loop of the program's, which stops.
    """
    if tracing.current() is not None:
        return _traced(step, carry, most, active)
    for _ in range(most):
        if active is not None and all_stopped(active(*carry)):
            break
        carry = step(*carry)
    return carry


def all_stopped(active: Tensor) -> bool:
    """Whether an iteration may stop early: asked on the CPU only, where the answer costs nothing."""
    unknown = transforms.transforms_active() or tracing.current() is not None
    return not unknown and active.device.type == "cpu" and not bool(active.any())


def _traced(step: Callable[..., Carry], carry: Carry, most: int, active: Callable[..., Tensor] | None) -> Carry:
    ends = list(accumulate(map(len, carry), initial=1))

    def apart(tensors: Sequence[Tensor]) -> Carry:
        return [Leaves(tensors[a:b]) for a, b in pairwise(ends)]

    def goes_on(*tensors: Tensor) -> Tensor:
        more = tensors[0] < most
        return more if active is None else more & active(*apart(tensors)).any()

    def body(*tensors: Tensor) -> list[Tensor]:
        return [tensors[0] + 1, *[x for part in step(*apart(tensors)) for x in part]]

    first = torch.zeros((), dtype=torch.int64, device=carry[0][0].device)
    return apart(traced_loops.while_loop(goes_on, body, [first, *[x for part in carry for x in part]]))
