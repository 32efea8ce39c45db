r"""The derivatives of ``F = <g, O>``, of which attention is the part by ``g``: derivations (13.3) to (13.5).

Each is a plain function of tensors, without a graph: what autograd sees is in ``attention_functions.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffopt.nn.attention_sums import Gradient, Options, Point, chunks


def output(z: Point, options: Options, noise: Tensor | None) -> Tensor:
    """``O``; ``z.g`` tells its shape and dtype only."""
    wide, found = z.wide(), torch.empty_like(z.g, memory_format=torch.contiguous_format)
    for chunk in chunks(wide, options, noise):
        part = chunk.of(wide)
        found[..., chunk.first : chunk.last, :] = chunk.dropped(chunk.weights(part)) @ part.v
    return found


def first(z: Point, options: Options, noise: Tensor | None, *, mask: bool) -> tuple[Tensor, ...]:
    """The gradient of ``F`` in ``q, k, v, g`` and, if wanted, in the mask: derivations (13.3)."""
    wide = z.wide()
    total = Gradient(wide, mask=mask)
    for chunk in chunks(wide, options, noise):
        part = chunk.of(wide)
        p = chunk.weights(part)
        by_scores = p * _centred(p, chunk.values(part))
        total.add(chunk, by_scores, p, part)
        total.add_to_mask(chunk, by_scores)
    return total.like(z)


def second(z: Point, x: Point, options: Options, noise: Tensor | None, *, mask: bool) -> tuple[Tensor, ...]:
    """The gradient in ``z`` of ``F``'s derivative along ``x``, the Hessian times ``x``: derivations (13.4)."""
    wide, wide_x = z.wide(), x.wide()
    total = Gradient(wide, mask=mask)
    for chunk in chunks(wide, options, noise):
        part, along_x = chunk.of(wide), chunk.of(wide_x)
        p = chunk.weights(part)
        h = _centred(p, chunk.values(part))
        y = _centred(p, _moving(chunk.score_rates(part, along_x), along_x))
        w = chunk.value_rates(part, along_x)
        by_scores = p * _centred(p, h * y + w)
        total.add(chunk, by_scores, p * y, part)
        total.add(chunk, p * h, p, along_x)
        total.add_to_mask(chunk, by_scores)
    return total.like(z)


def third(z: Point, x: Point, u: Point, options: Options, noise: Tensor | None, *, mask: bool) -> tuple[Tensor, ...]:
    """The gradient in ``z`` of ``F``'s second derivative along ``x`` and ``u``: derivations (13.5)."""
    wide, wide_x, wide_u = z.wide(), x.wide(), u.wide()
    total = Gradient(wide, mask=mask)
    for chunk in chunks(wide, options, noise):
        part, along_x, along_u = chunk.of(wide), chunk.of(wide_x), chunk.of(wide_u)
        p = chunk.weights(part)
        h = _centred(p, chunk.values(part))
        y = _centred(p, _moving(chunk.score_rates(part, along_x), along_x))
        t = _centred(p, _moving(chunk.score_rates(part, along_u), along_u))
        w, r = _centred(p, chunk.value_rates(part, along_x)), _centred(p, chunk.value_rates(part, along_u))
        c = _centred(p, chunk.score_rates(along_x, along_u))
        both = chunk.value_rates(along_x, along_u)
        products = h * y * t + r * y + h * c + w * t + both
        pairs = _mean(p, h * y) * t + _mean(p, h * t) * y + _mean(p, y * t) * h
        by_scores = p * (_centred(p, products) - pairs)
        total.add(chunk, by_scores, p * (_centred(p, y * t) + c), part)
        total.add(chunk, p * (_centred(p, h * t) + r), p * t, along_x)
        total.add(chunk, p * (_centred(p, h * y) + w), p * y, along_u)
        total.add_to_mask(chunk, by_scores)
    # what is left moves with z in one factor of A[x, u] and H[x, u] only, that is, not at all
    return total.like(z)


def _mean(p: Tensor, x: Tensor) -> Tensor:
    """``E[x]``, of each query."""
    return (p * x).sum(-1, keepdim=True)


def _centred(p: Tensor, x: Tensor) -> Tensor:
    """``x - E[x]``."""
    return x - _mean(p, x)


def _moving(rates: Tensor, x: Point) -> Tensor:
    """How the scores move along ``x``: as queries and keys say, and as the mask does."""
    return rates if x.mask is None else rates + x.mask
