"""Answers that share no code with the library: plain loops over lists of tensors, differentiated by plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def safe_root(x: Tensor) -> Tensor:
    """The root with derivative 0 at 0, as a piecewise definition."""
    return torch.where(x > 0, torch.sqrt(x + (x <= 0).to(x.dtype)), 0.0)


def sgd_step(p, g, b, t, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False):
    """One leaf of torch.optim.SGD: the direction enters the first buffer undampened."""
    d = (-g if maximize else g) + weight_decay * p
    b["v"] = momentum * b.get("v", 0 * p) + (1 if t == 1 else 1 - dampening) * d
    move = d + momentum * b["v"] if nesterov else b["v"]
    return p - lr * move


def adam_step(p, g, b, t, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, decoupled=False):
    """One leaf of torch.optim.Adam and AdamW."""
    if decoupled:
        d, base = g, p - lr * weight_decay * p
    else:
        d, base = g + weight_decay * p, p
    b["m"] = betas[0] * b.get("m", 0 * p) + (1 - betas[0]) * d
    b["s"] = betas[1] * b.get("s", 0 * p) + (1 - betas[1]) * d**2
    top = b["s"]
    if amsgrad:
        before = b.get("top", 0 * p)
        top = b["top"] = torch.where(b["s"] > before, b["s"], before)
    root = safe_root(top) / (1 - betas[1] ** t) ** 0.5 + eps
    return base - lr / (1 - betas[0] ** t) * b["m"] / root


def rmsprop_step(p, g, b, t, lr, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False):
    """One leaf of torch.optim.RMSprop."""
    d = g + weight_decay * p
    b["s"] = alpha * b.get("s", 0 * p) + (1 - alpha) * d**2
    spread = b["s"]
    if centered:
        b["m"] = alpha * b.get("m", 0 * p) + (1 - alpha) * d
        spread = spread - b["m"] ** 2
    b["v"] = momentum * b.get("v", 0 * p) + d / (safe_root(spread) + eps)
    return p - lr * b["v"]


def adagrad_buffers(p, initial_accumulator_value=0.0, **options):
    """Adagrad's buffers at the start."""
    return {"s": 0 * p + initial_accumulator_value}


def adagrad_step(p, g, b, t, lr, lr_decay=0.0, weight_decay=0.0, initial_accumulator_value=0.0, eps=1e-10):
    """One leaf of torch.optim.Adagrad."""
    d = g + weight_decay * p
    b["s"] = b["s"] + d**2
    return p - lr / (1 + (t - 1) * lr_decay) * d / (safe_root(b["s"]) + eps)


def proximal_buffers(p, **options):
    """The center of the proximal term."""
    return {"c": p}


def proximal_step(p, g, b, t, lr, strength):
    """One leaf of gradient descent with a proximal term around the initial parameters."""
    return p - lr * (g + strength * (p - b["c"]))


def preconditioned_step(p, g, b, t, lr, diagonal):
    """One leaf of gradient descent with a scaled gradient."""
    return p - lr * diagonal * g


def unrolled(
    step: Callable[..., Tensor],
    loss: Callable[..., Tensor],
    params: Sequence[Tensor],
    steps: int,
    options: dict[str, Any],
    batch: Callable[[int], tuple[Any, ...]] = lambda t: (),
    detach_until: int = 0,
    curvature: Callable[[int], float] = lambda t: 1.0,
    initial_buffers: Callable[..., dict[str, Tensor]] = lambda p, **options: {},
    window: int = 1,
    losses: list[float] | None = None,
) -> list[Tensor]:
    """``steps`` steps by a plain loop that autograd records; ``loss(list of tensors, *batch(t))``.

    Up to step ``detach_until`` the state, buffers and all, is replaced by a constant plus the identity in the initial
    state: the straight-through form of truncation. ``curvature(t)`` is a factor on every second derivative of step
    ``t``'s loss, values unchanged: the surrogate gradient ``sg(g) + e (g - sg(g))``. One gradient serves ``window``
    steps, of which ``t`` is the first; such a window is then what counts as a step. ``losses`` gets the inner losses.
    """
    start, now = list(params), [p + 0 for p in params]

    def options_at(t: int) -> list[dict[str, Any]]:
        per_leaf = [{k: v[i] if isinstance(v, list) else v for k, v in options.items()} for i in range(len(now))]
        return [{k: v(t) if callable(v) else v for k, v in o.items()} for o in per_leaf]

    first = [initial_buffers(p, **o) for p, o in zip(start, options_at(1), strict=True)]
    buffers = [dict(b) for b in first]
    for number, first_step in enumerate(range(1, steps + 1, window), start=1):
        now = [p if p.requires_grad else p.detach().requires_grad_() for p in now]
        value = loss(now, *batch(first_step))
        grads = torch.autograd.grad(value, now, create_graph=True)
        grads = [g.detach() + curvature(first_step) * (g - g.detach()) for g in grads]
        if losses is not None:
            losses.append(float(value.detach()))
        for t in range(first_step, min(first_step + window, steps + 1)):
            now = [step(p, g, b, t, **o) for p, g, b, o in zip(now, grads, buffers, options_at(t), strict=True)]
        if number <= detach_until:
            now = [p.detach() + (s - s.detach()) for p, s in zip(now, start, strict=True)]
            for b, s in zip(buffers, first, strict=True):
                b.update({k: v.detach() + (s[k] - s[k].detach() if k in s else 0) for k, v in b.items()})
    return now


def taylor(function: Callable[[float], Sequence[Tensor]], degree: int) -> Callable[..., list[Tensor]]:
    """The terms of a polynomial in one number, of so high a degree, up to an order; each times a power of ``scale``.

    From its values at Chebyshev points: of five, the Vandermonde system has a condition number of about 30.
    """
    points = np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))
    coefficients, rows = np.linalg.inv(np.vander(points, increasing=True)), [function(float(e)) for e in points]

    def up_to(order: int, scale: float = 1.0) -> list[Tensor]:
        weights = (coefficients[: order + 1] * scale ** np.arange(degree + 1)[: order + 1, None]).sum(0)
        return [sum(w * x for w, x in zip(weights, column, strict=True)) for column in zip(*rows, strict=True)]

    return up_to


def relative_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference over all tensors, relative to the largest entry of each (or 1e-6 if that is larger)."""
    errors = []
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape, (g.shape, e.shape)
        errors.append((g.detach() - e.detach()).abs().max() / e.detach().abs().max().clamp_min(1e-6))
    worst = torch.stack([error.double() for error in errors]).max()
    assert worst.isfinite(), errors
    return float(worst)
