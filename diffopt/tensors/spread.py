"""Tensors that are spread over ranks by themselves: torch's ``DTensor``."""

from __future__ import annotations

from typing import Any

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
