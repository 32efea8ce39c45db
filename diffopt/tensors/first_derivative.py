"""A number whose gradient is known already, as part of a graph that can be differentiated once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt.errors import SecondDerivativeError
from diffopt.tensors import transforms


def with_gradients(value: Tensor, gradients: Sequence[Tensor], leaves: Sequence[Tensor]) -> Tensor:
    """``value``, a scalar, with these gradients by ``leaves``."""
    if not leaves:
        return value
    found: Tensor = transforms.apply(_Known, len(leaves), value, *gradients, *leaves)
    return found


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, value: Tensor, *tensors: Tensor) -> Tensor:
        ctx.count = count
        ctx.save_for_backward(*tensors)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        terms = transforms.apply(_Products, cotangents[0], *ctx.saved_tensors)
        return (None, None, *(None,) * ctx.count, *terms)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cotangent: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        # the second half, what the gradients are of, is there so that a second derivative comes by here
        return tuple([cotangent * gradient for gradient in tensors[: len(tensors) // 2]])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        raise SecondDerivativeError(
            "the gradient of a compiled outer loss is being differentiated again",
            "once",
            "call the outer loss itself, with estimator=Unrolled(), for second derivatives",
        )
