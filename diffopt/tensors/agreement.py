"""Whether two ways of computing something agree, seen at other numbers than those it was made with."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def tolerance(expected: Tensor) -> float:
    """How far numbers may be off that were computed in another order: the root of the ``eps`` that they may have."""
    place, kinds = expected.device.type, [expected.dtype]
    if torch.is_autocast_enabled(place):
        kinds.append(torch.get_autocast_dtype(place))
    return math.sqrt(max(torch.finfo(kind).eps for kind in kinds))


def difference(got: Tensor, expected: Tensor) -> float:
    """By how much a tensor is off, if that is more than round-off in its largest number; else 0."""
    if not got.is_floating_point():
        return 0.0 if torch.equal(got, expected) else math.inf
    finite = expected[expected.isfinite()]
    allowed = tolerance(expected) * float(finite.abs().max()) if finite.numel() else 0.0
    if torch.allclose(got, expected, rtol=0.0, atol=allowed, equal_nan=True):
        return 0.0
    return float((got - expected).abs().max())


def moved(x: Tensor, number: int) -> Tensor:
    """A tensor with slightly larger numbers, by a pattern that is its own."""
    if not x.is_floating_point():
        return x.clone()
    pattern = (12.9898 * torch.arange(1, x.numel() + 1, device=x.device) + number).sin().square()
    scale = float(x.abs().double().mean()) if x.numel() else 0.0
    return x + (1e-2 * (scale or 1.0) * pattern).to(x.dtype).reshape(x.shape)
