"""Random numbers drawn by a loss: noticed in the rollout, drawn again in the backward pass.

The rollout uses torch's global generators as a plain loop would. The generators' state is taken before every step and
kept where the step changed it; a replay puts it back for the length of one step, so that the same numbers are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor

GeneratorStates: TypeAlias = tuple[Tensor, ...]


def snapshot(device: torch.device) -> GeneratorStates:
    """The state of the CPU's generator and, on a GPU, of that device's."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return tuple(states)


def changed(before: GeneratorStates, after: GeneratorStates) -> bool:
    """Whether random numbers were drawn between the two."""
    return not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@contextmanager
def replayed(states: GeneratorStates | None, device: torch.device) -> Iterator[None]:
    """Draw the numbers that followed ``states`` again, and leave the generators as they were; ``None``: do nothing."""
    if states is None:
        yield
        return
    now = snapshot(device)
    restore(states, device)
    try:
        yield
    finally:
        restore(now, device)


def restore(states: GeneratorStates, device: torch.device) -> None:
    """Let the generators stand where they stood."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
