"""What the tests of evolution-strategy Jacobians share: the radius, its error, a regression of three tasks."""

from __future__ import annotations

import torch

STEPS = 3
# Central differences: radius**2 = 1e-8 times third derivatives, which are of order 1 to 100 here, and round-off
# 1e-16 / 1e-4; some derivatives are a thousand times smaller than the largest.
RADIUS, DIFFERENCE = 1e-4, 1e-4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def close(got, expected, tolerance=DIFFERENCE):
    """All meta-parameters as one vector: directions mix them, and so their errors."""
    got, expected = (torch.cat([x.detach().reshape(-1) for x in tensors]) for tensors in (got, expected))
    return float((got - expected).norm()) < tolerance * float(expected.norm())


_DATA = generator(4)
INPUTS = torch.randn(3, 4, 2, generator=_DATA, dtype=torch.float64)
WEIGHTS = torch.randn(2, generator=_DATA, dtype=torch.float64)
