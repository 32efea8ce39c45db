"""Copies of tensors between devices, beside what is computed meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from diffopt.tensors.leaves import Leaves

CPU = torch.device("cpu")


def copied(leaves: Leaves, devices: Sequence[torch.device]) -> tuple[Leaves, list[Any]]:
    """The leaves on other devices, and the CUDA events after which they may be read; what is there already is itself.

    # NOTE [a stream of its own]
    On CUDA the copies run on a stream of their own, from and to pinned memory, after what has been computed so far. The
    memory of what they read or write must not be given to others before they are done: ``record_stream`` sees to that
    on the GPU, and torch's allocator of pinned memory on the CPU. Copies of one stream keep their order.
    """
    found, events = [], []
    for leaf, device in zip(leaves, devices, strict=True):
        on_gpu = leaf.device if leaf.is_cuda else device
        if leaf.device == device or on_gpu.type != "cuda" or type(leaf) is not Tensor:
            found.append(leaf.to(device))
            continue
        copy = torch.empty_like(leaf, device=device, pin_memory=device == CPU)
        stream = _stream(on_gpu)
        stream.wait_stream(torch.cuda.current_stream(on_gpu))
        with torch.cuda.stream(stream):
            copy.copy_(leaf, non_blocking=True)
        (leaf if leaf.is_cuda else copy).record_stream(stream)
        found.append(copy)
        events.append(stream.record_event())
    return Leaves(found), events


def brought(leaves: Leaves, devices: Sequence[torch.device]) -> Callable[[], Leaves]:
    """Begin to copy the leaves; what is returned hands them out, for what is computed from then on."""
    found, events = copied(leaves, devices)

    def wait() -> Leaves:
        for event in events:
            torch.cuda.current_stream(event.device).wait_event(event)
        return found

    return wait


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
