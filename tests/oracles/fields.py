"""A vector field without a loss, its Jacobian far from symmetric, and steps along it by a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

STEPS = 4
DOUBLE = torch.float64
CLOSED = 1e-10
"""Of closed forms: systems are solved to 1e-13 and have condition numbers below 100."""


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def number(x: float) -> Tensor:
    return torch.tensor(x, dtype=DOUBLE, requires_grad=True)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turning(params: dict[str, Any], coupling: Tensor, pull: dict[str, Tensor], batch: Tensor) -> dict[str, Any]:
    """``w`` and ``b`` push each other around, by different laws, and a batch pulls at both."""
    w, b = params["w"], params["in"]["b"]
    along = w @ coupling + pull["w"].exp() * w.sin() + (b[:1] - batch) * w.flip(0)
    across = 0.5 * b - (w * w).sum() * pull["b"] + batch.mean() * b.cos()
    return {"w": along, "in": {"b": across}}


def start() -> dict[str, Any]:
    return {"w": normal(1, 3), "in": {"b": normal(2, 2)}}


def arguments() -> tuple[Tensor, dict[str, Tensor]]:
    return normal(3, 3, 3), {"w": 0.3 * normal(4, 3), "b": normal(5, 2)}


BATCHES = normal(6, STEPS, 3)


def walked(
    step: Callable[..., Tensor],
    field: Callable[..., Any],
    params: dict[str, Any],
    args: Sequence[Any],
    batches: Tensor,
    options: dict[str, Any],
    first: Callable[..., dict[str, Tensor]] = lambda p, **options: {},
) -> dict[str, Any]:
    """One step along ``field`` for each batch, which autograd records; ``first`` makes the buffers of a leaf."""
    buffers = [first(p, **options) for p in (params["w"], params["in"]["b"])]
    now = params
    for t, batch in enumerate(batches, 1):
        moves = field(now, *args, batch)
        pairs = [(now["w"], moves["w"]), (now["in"]["b"], moves["in"]["b"])]
        w, b = (step(p, g, own, t, **options) for (p, g), own in zip(pairs, buffers, strict=True))
        now = {"w": w, "in": {"b": b}}
    return now


def outer(params: dict[str, Any]) -> Tensor:
    weights = torch.linspace(1, 2, 3, dtype=params["w"].dtype)
    return (weights * params["w"].sin()).sum() + params["in"]["b"].square().sum()


def jacobian(field: Callable[..., Tensor], z: Tensor, *args: Any) -> Tensor:
    """``V`` of a field on one vector, row by row."""
    found: Tensor = torch.autograd.functional.jacobian(lambda z: field(z, *args), z)
    return found


def soft(x: Tensor, threshold: Tensor) -> Tensor:
    return x.sign() * (x.abs() - threshold).clamp_min(0)
