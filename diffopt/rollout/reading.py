"""What the loss reads besides its params, taken apart: the tensors of ``args`` and ``batches``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.rollout.given import check_batches
from diffopt.rollout.layout import Slot, names_of_read
from diffopt.rollout.stream import Stream, check_stream
from diffopt.tensors import tree
from diffopt.tensors.usable import usable_leaves


class Reading(NamedTuple):
    """What the loss reads.

    Attributes:
        leaves: of ``(args, batches)``, with a slot for each tensor.
        structure: of ``(args, batches)``.
        tensors: those among the inputs.
        stepped: which of these run over steps.
        stream: what hands out the batches, if they are a function of the step; its slots stand behind the others.
    """

    leaves: tuple[Any, ...]
    structure: tree.Structure
    tensors: list[Tensor]
    stepped: tuple[bool, ...]
    stream: Stream | None


def what_is_read(args: tuple[Any, ...], batches: Any, start: int, steps: int, device: torch.device) -> Reading:
    """``args`` and ``batches`` of a solve that makes ``steps`` steps after ``start`` others."""
    stream = None
    if callable(batches):
        check_stream(batches, steps)
        stream = Stream(batches, start, steps, device)
        batches = stream.example
    elif batches is not None:
        check_batches(batches, steps)
    leaves, structure = tree.flatten((args, batches))
    leaves = usable_leaves(leaves, lambda: names_of_read(structure))
    first_batch = len(leaves) if batches is None else len(tree.flatten(args)[0])
    tensors: list[Tensor] = []
    stepped: list[bool] = []
    slots = 0
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            leaves[i] = Slot(slots)
            slots += 1
            if stream is None or i < first_batch:
                tensors.append(leaf)
                stepped.append(i >= first_batch)
    return Reading(tuple(leaves), structure, tensors, tuple(stepped), stream)
