"""An estimator under test: its hypergradient on the problem, as one draw or as a mean over draws."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple, final

import torch
from torch import Tensor

from diffopt.adjoint.claims import Claims, Kind
from diffopt.adjoint.estimator import Estimator
from diffopt.testing.problem import Point, Setting, differences, distance, flat, gradient, like, outer_loss

DRAWS = 64
"""How many draws of a random estimator make a mean."""


class Sample(NamedTuple):
    """The mean of some hypergradients and the norm of its standard error, zero for an estimator that is not random."""

    mean: Point
    noise: float


@final
@dataclass(frozen=True)
class EstimatorCase:
    """What is tested: an estimator, what is claimed of it, and a problem."""

    estimator: Estimator
    claims: Claims
    setting: Setting
    point: Point

    @cached_property
    def found(self) -> Point:
        """The hypergradient on the problem."""
        return self.gradient()

    @cached_property
    def sampled(self) -> Sample:
        """The same; of a random estimator, the mean over draws."""
        return self.sample(self.setting, self.point) if self.claims.random else Sample(self.found, 0.0)

    def seeded(self) -> Estimator:
        """The estimator, about to draw the same random numbers as after any other call of this method."""
        torch.manual_seed(0)
        return copy.deepcopy(self.estimator) if self.claims.random else self.estimator

    def gradient(
        self, setting: Setting | None = None, point: Point | None = None, kinds: frozenset[Kind] | None = None
    ) -> Point:
        """The hypergradient; unless another problem is given, of this one, for all inputs that are claimed."""
        value = partial((setting or self.setting).value, self.seeded())
        return gradient(value, point or self.point, kinds or self.claims.inputs)

    def sample(self, setting: Setting, point: Point) -> Sample:
        """The hypergradient; of a random estimator, the mean over draws."""
        value = partial(setting.value, self.seeded())
        count = DRAWS if self.claims.random else 1
        return mean(point, [flat(gradient(value, point, self.claims.inputs)) for _ in range(count)])

    def expected(self, setting: Setting, point: Point) -> Point:
        """The exact one: by hand, or for an estimator with steps of its own by differences of its own outer loss."""
        if self.claims.own_steps:
            return differences(partial(setting.value, self.estimator), point)
        return gradient(lambda point: outer_loss(setting.by_hand(point)), point)

    def error(self, found: Sample, expected: Point) -> float:
        """The relative error; of a mean, in the norm over all inputs together, which its noise is measured in."""
        if not self.claims.random:
            return distance(found.mean, expected, self.claims.inputs)
        return self._norm(found.mean, expected) / self._norm(expected)

    def limit(self, found: Sample, expected: Point) -> float:
        """The largest relative error that is none: the claimed tolerance, that of differences, and the noise."""
        tolerance = max(self.claims.tolerance, 1e-6 if self.claims.own_steps else 0.0)
        return tolerance + (2.5 * found.noise / self._norm(expected) if found.noise else 0.0)

    def _norm(self, a: Point, b: Point | None = None) -> float:
        pairs = [(x, y) for kind in self.claims.inputs for x, y in zip(a[kind], (b or a)[kind], strict=True)]
        return float(torch.cat([(x - y if b else x).flatten() for x, y in pairs]).norm())


def mean(shape: Point, rows: Sequence[Sequence[Tensor]]) -> Sample:
    """The mean of hypergradients, each a list of tensors like ``flat(shape)``."""
    columns = [torch.stack(column) for column in zip(*rows, strict=True)]
    centre = like(shape, [column.mean(0) for column in columns])
    if len(rows) == 1:
        return Sample(centre, 0.0)
    spread = sum(float(column.var(0).sum()) for column in columns)
    return Sample(centre, (spread / len(rows)) ** 0.5)
