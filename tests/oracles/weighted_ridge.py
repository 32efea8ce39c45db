"""Ridge regression with a weight for each sample, whose minimiser is known; in the default precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import diffopt
from diffopt import DatamodelingScore

SAMPLES, FEATURES = 12, 3


class Ridge:
    """Ridge regression with a weight for each sample: trained at once, or by gradient descent."""

    def __init__(self, penalty: float = 10.0) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(SAMPLES, FEATURES, generator=generator)
        self.y = torch.randn(SAMPLES, generator=generator)
        self.queries = torch.randn(4, FEATURES, generator=generator)
        self.penalty, self.calls = penalty, 0

    def minimiser(self, weights: Tensor) -> Tensor:
        self.calls += 1
        curvature = self.x.T @ (weights[:, None] * self.x) + self.penalty * torch.eye(FEATURES)
        return torch.linalg.solve(curvature, self.x.T @ (weights * self.y))

    def trained(self, weights: Tensor) -> Tensor:
        def loss(p: Tensor, weights: Tensor) -> Tensor:
            return (weights * (self.x @ p - self.y).square()).sum() / 2 + self.penalty * p.square().sum() / 2

        return diffopt.solve(loss, torch.zeros(FEATURES), weights, optimizer=diffopt.SGD(0.05), steps=60).params

    def predicted(self, p: Tensor) -> Tensor:
        return self.queries @ p

    def scores(self) -> Tensor:
        return diffopt.attribute(self.minimiser, self.predicted, ONES)


ONES = torch.ones(SAMPLES, dtype=torch.float64)


def same(first: DatamodelingScore, second: DatamodelingScore) -> bool:
    """Whether both have the same bits."""
    names = ("per_metric", "predicted", "measured", "left_out")
    equal = all(torch.equal(getattr(first, name), getattr(second, name)) for name in names)
    return equal and (first.score, first.interval) == (second.score, second.interval)


def drifting(ridge: Ridge, size: float, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """A training that ends elsewhere each time."""
    generator = torch.Generator().manual_seed(seed)
    return lambda w: ridge.minimiser(w) + size * torch.randn(FEATURES, generator=generator)


class Killed(Exception):  # noqa: N818
    """What ends a run from inside."""
