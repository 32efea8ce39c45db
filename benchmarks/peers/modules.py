"""The params of a problem as a module, for the libraries that want one; its call costs no more than a function's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from benchmarks.problem import Params


class Holder(nn.Module):
    """Calls the function it is given with its own parameters."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.names = list(params)
        for name, value in params.items():
            self.register_parameter(name, nn.Parameter(value.detach()))

    def forward(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """``function(params, *args)``."""
        return function({name: getattr(self, name) for name in self.names}, *args)
