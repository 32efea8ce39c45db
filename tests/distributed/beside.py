"""What the checks of ranks share: numbers that every rank can draw, and a comparison with those of one process."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(got: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
