"""Tensors that are spread over ranks by themselves: torch's ``DTensor``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt.tensors import transforms


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``, which knows how it is spread over ranks."""
    return type(transforms.unwrapped(tensor)).__name__ == "DTensor"


def nbytes(tensor: Any) -> int:
    """The bytes of a tensor on this rank."""
    return int((tensor.to_local() if is_spread(tensor) else tensor).nbytes)


def gathered(tensor: Any) -> Tensor:
    """A tensor as all ranks have it, however it is spread: the same numbers on each."""
    whole: Tensor = tensor.full_tensor() if is_spread(tensor) else tensor
    return whole


def largest_modulus(tensor: Any) -> Tensor:
    """The largest modulus of an entry, on all ranks that a tensor is spread over.

    (torch flattens no tensor whose parts are of different sizes, and takes no maximum of a part without entries.)
    """
    if not is_spread(tensor):
        found: Tensor = tensor.abs().amax()
        return found
    if any(x.is_partial() for x in tensor.placements):
        return gathered(tensor).abs().amax()
    own = tensor.to_local().abs()
    largest: Tensor = own.amax() if own.numel() else own.new_zeros(())
    for group in tensor.device_mesh.get_all_groups():
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
    return largest


def placed_alike(tensors: Sequence[Any]) -> list[Tensor]:
    """Tensors that can be stacked: those of one mesh that are spread in different ways are held by all ranks."""
    if not is_spread(tensors[0]) or all([x.placements == tensors[0].placements for x in tensors]):
        return list(tensors)
    from torch.distributed.tensor import Replicate

    return [x.redistribute(x.device_mesh, [Replicate()] * x.device_mesh.ndim) for x in tensors]
