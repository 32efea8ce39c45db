"""Spearman's rank correlation, of samples that are counted several times, and the interval that such samples give."""

from __future__ import annotations

import torch
from torch import Tensor

DRAWS = 2_000
"""Samples that are drawn anew for an interval."""


def rank_correlations(first: Tensor, second: Tensor, counts: Tensor) -> Tensor:
    """Spearman's correlation of the columns of ``first`` and ``second``, every row counted so many times.

    Rows that are counted several times are ties, whose ranks are averaged: so this is the correlation of the table in
    which each row stands as often.

    Args:
        first: ``[rows, columns]``.
        second: the same shape.
        counts: ``[samples, rows]``, integers in double precision; one row of ones is the sample itself.

    Returns:
        ``[samples, columns]``; NaN where a column of a sample is constant.
    """
    pairs = zip(first.unbind(1), second.unbind(1), strict=True)
    return torch.stack([_correlation(_ranks(x, counts), _ranks(y, counts), counts) for x, y in pairs], dim=1)


def interval(first: Tensor, second: Tensor, confidence: float, seed: int) -> tuple[float, float]:
    """The percentile interval of the mean correlation over columns, from samples of the rows drawn with replacement.

    A column that is constant in a sample is left out of its mean.
    """
    rows = len(first)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(rows, (DRAWS, rows), generator=generator)
    ones = torch.ones(DRAWS, rows, dtype=torch.float64)
    counts = torch.zeros_like(ones).scatter_add_(1, drawn, ones)
    means = rank_correlations(first, second, counts).nanmean(1)
    ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.nanquantile(means, ends).tolist()
    return low, high


def _ranks(x: Tensor, counts: Tensor) -> Tensor:
    """Average ranks less one half, ``[samples, rows]``: what is below counts whole, what is equal counts half."""
    below, equal = x[:, None] > x[None, :], x[:, None] == x[None, :]
    return counts @ (below + 0.5 * equal.double()).T


def _correlation(x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    total = counts.sum(1, keepdim=True)
    x, y = (z - (counts * z).sum(1, keepdim=True) / total for z in (x, y))
    return (counts * x * y).sum(1) / ((counts * x * x).sum(1) * (counts * y * y).sum(1)).sqrt()
