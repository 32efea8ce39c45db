"""What an estimate's own measure should be, and the warning where it is more."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from diffopt.errors import EstimateWarning


class Expected(NamedTuple):
    """A measure of an estimate that should be at most ``limit``: what it is, and what to do if it is not."""

    limit: float
    what: str
    fix: str

    def excess(self, measured: Tensor) -> Tensor:
        """The largest of some measures, if it is above the limit; else 0."""
        return torch.where(measured > self.limit, measured, 0).max()

    def warn(self, excess: Tensor) -> None:
        """Say so, if it is not 0."""
        if excess:
            warnings.warn(
                f"{self.what} is {float(excess):.2g}, expected at most {self.limit:g}: the hypergradient may be wrong "
                f"in size and sign. {self.fix}",
                EstimateWarning,
                stacklevel=3,
            )
