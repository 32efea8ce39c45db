r"""Attention and its derivatives as sums over chunks of queries, in the letters of derivations, section 13.1.

Of one query, ``E`` is the mean over the keys with the weights ``P = softmax(A)``, and ``F = <g, O> = E[H]``, where

    A = scale * q k' + mask            H = M * (g v')            M: dropout, 0 or 1 / (1 - p)

``A`` and ``H`` are bilinear in the point ``z = (q, k, v, g)``, so along a direction ``X`` they move by ``A[z, X]`` and
``H[z, X]``, and in two directions by constants. A derivative of a cumulant of ``P`` along ``X`` is the next cumulant.

# NOTE [linear memory]
A chunk has all keys of some queries. What is computed of it, some matrices [queries, keys], is dropped before the next
one, and a chunk is computed anew by every derivative: nothing of the size [L, S] is kept, and no chunk needs another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

_ENTRIES = 2**20
"""Entries of a matrix [..., queries, keys] of one chunk, unless that would be fewer than some queries."""
_QUERIES = 16


class Options(NamedTuple):
    """What attention is told besides tensors."""

    scale: float
    causal: bool
    dropout: float


class Point(NamedTuple):
    """A point, or a direction: ``q, g`` ``[..., L, *]``, ``k, v`` ``[..., S, *]``; ``mask`` broadcasts to [..., L, S].

    ``mask`` is a tensor of booleans (``True``: takes part) only of a point, where it has no direction.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    mask: Tensor | None = None

    def wide(self) -> Point:
        """In single precision, if it is in half."""
        q, k, v, g = map(_wide, self.tensors())
        return Point(q, k, v, g, None if self.mask is None else _wide(self.mask))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All but the mask."""
        return self.q, self.k, self.v, self.g


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like, memory_format=torch.contiguous_format)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


@final
@dataclass(frozen=True)
class Chunk:
    """Queries ``first, ..., last - 1`` beside the keys before ``keys``; the others are masked."""

    first: int
    last: int
    keys: int
    options: Options
    noise: Tensor | None

    def of(self, point: Point) -> Point:
        """What this chunk has of a point or direction."""
        rows, mask = slice(self.first, self.last), point.mask
        if mask is not None:
            mask = mask[..., rows, :] if mask.shape[-2] > 1 else mask
            mask = mask[..., : self.keys] if mask.shape[-1] > 1 else mask
        keys, values = point.k[..., : self.keys, :], point.v[..., : self.keys, :]
        return Point(point.q[..., rows, :], keys, values, point.g[..., rows, :], mask)

    def weights(self, z: Point) -> Tensor:
        """``P``; zero everywhere for a query that may see no key, as torch has it."""
        scores = self.options.scale * (z.q @ z.k.mT)
        if z.mask is not None:
            allowed = z.mask.dtype == torch.bool
            scores = scores.masked_fill(~z.mask, -torch.inf) if allowed else scores + z.mask
        if self.options.causal:
            query = torch.arange(self.first, self.last, device=scores.device)[:, None]
            scores = scores.masked_fill(torch.arange(self.keys, device=scores.device) > query, -torch.inf)
        weights = scores.softmax(-1)
        if z.mask is None and not self.options.causal:
            return weights
        return weights.masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)

    def dropped(self, x: Tensor) -> Tensor:
        """``M * x``."""
        if self.noise is None:
            return x
        if self.options.dropout == 1:
            return 0 * x
        return x * self._kept(self.noise) / (1 - self.options.dropout)

    def _kept(self, noise: Tensor) -> Tensor:
        """Which entries dropout keeps: SplitMix64 of each entry's number, so that it matters not who asks when."""
        query = torch.arange(self.first, self.last, device=noise.device)[:, None]
        key = torch.arange(self.keys, device=noise.device)
        # how many keys there are does not enter, for a causal chunk sees a part of them: 2^32 numbers for each query
        return _shifted(mixed(noise, query * 2**32 + key), 11).double() * 2**-53 >= self.options.dropout

    def score_rates(self, a: Point, b: Point) -> Tensor:
        """``A[a, b]``, without the mask's part."""
        return self.options.scale * (a.q @ b.k.mT + b.q @ a.k.mT)

    def value_rates(self, a: Point, b: Point) -> Tensor:
        """``H[a, b]``."""
        return self.dropped(a.g @ b.v.mT + b.g @ a.v.mT)

    def values(self, z: Point) -> Tensor:
        """``H`` itself."""
        return self.dropped(z.g @ z.v.mT)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


_GAMMA, _MIX_1, _MIX_2 = _signed(0x9E3779B97F4A7C15), _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def mixed(seed: Tensor, number: Tensor) -> Tensor:
    """What SplitMix64 gives as this number of its sequence (from 0), of which ``seed`` is where it starts; int64."""
    x = seed + _GAMMA * (number + 1)
    x = (x ^ _shifted(x, 30)) * _MIX_1
    x = (x ^ _shifted(x, 27)) * _MIX_2
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def chunks(z: Point, options: Options, noise: Tensor | None) -> Iterator[Chunk]:
    """The queries in chunks, each with the keys that it may see."""
    queries, keys = z.q.shape[-2], z.k.shape[-2]
    others = max(1, z.q[..., 0, 0].numel() if queries and z.q.shape[-1] else 1)
    size = max(_QUERIES, _ENTRIES // max(1, others * keys))
    for first in range(0, queries, size):
        last = min(first + size, queries)
        yield Chunk(first, last, min(last, keys) if options.causal else keys, options, noise)


@final
class Gradient:
    """The gradient in ``z`` of a sum over queries, from its derivatives by ``A[z, .]`` and ``H[z, .]``."""

    def __init__(self, z: Point, *, mask: bool) -> None:
        """Zero; ``mask``: with that of the mask, too."""
        q, k, v, g = map(_zeros, z.tensors())
        self.sums = Point(q, k, v, g, _zeros(z.mask) if mask and z.mask is not None else None)

    def add(self, chunk: Chunk, by_scores: Tensor, by_values: Tensor, partner: Point) -> None:
        """Add the part of ``A[z, partner]`` and ``H[z, partner]``; ``A`` and ``H`` are half of those with ``z``."""
        mine, scores, values = chunk.of(self.sums), chunk.options.scale * by_scores, chunk.dropped(by_values)
        mine.q.add_(scores @ partner.k)
        mine.k.add_(scores.mT @ partner.q)
        mine.v.add_(values.mT @ partner.g)
        mine.g.add_(values @ partner.v)

    def add_to_mask(self, chunk: Chunk, by_scores: Tensor) -> None:
        """Add what moves with the mask: the scores as they are."""
        mine = chunk.of(self.sums).mask
        if mine is not None:
            mine.add_(by_scores.sum_to_size(mine.shape))

    def like(self, z: Point) -> tuple[Tensor, ...]:
        """The sums, in the dtypes of ``z``; that of the mask comes last, if there is one."""
        found = tuple([x.to(of.dtype) for x, of in zip(self.sums.tensors(), z.tensors(), strict=True)])
        if self.sums.mask is None or z.mask is None:
            return found
        return *found, self.sums.mask.to(z.mask.dtype)
