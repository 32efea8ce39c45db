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


def score_and_interval(
    first: Tensor, second: Tensor, confidence: float, seed: int
) -> tuple[Tensor, float, tuple[float, float]]:
    """The correlation of every column, their mean, and its interval from samples of the rows drawn with replacement.

    # NOTE [why the interval is moved]
    A sample has fewer different rows than the table, and Spearman's correlation is the lower the fewer there are. So
    the percentiles lie too low, where the correlation is high even below the score itself. The interval has their
    width, and the score in the place of their median; it ends at 1.

    A column that is constant in a sample is left out of its mean.
    """
    rows = len(first)
    each = rank_correlations(first, second, torch.ones(1, rows, dtype=torch.float64))[0]
    drawn = torch.randint(rows, (DRAWS, rows), generator=torch.Generator().manual_seed(seed))
    ones = torch.ones(DRAWS, rows, dtype=torch.float64)
    counts = torch.zeros_like(ones).scatter_add_(1, drawn, ones)
    means = rank_correlations(first, second, counts).nanmean(1)
    shares = torch.tensor([(1 - confidence) / 2, 0.5, (1 + confidence) / 2], dtype=torch.float64)
    low, middle, high = torch.nanquantile(means, shares).tolist()
    score = float(each.mean())
    return each, score, (max(-1.0, score + low - middle), min(1.0, score + high - middle))


def _ranks(x: Tensor, counts: Tensor) -> Tensor:
    """Average ranks less one half, ``[samples, rows]``: what is below counts whole, what is equal counts half."""
    below, equal = x[:, None] > x[None, :], x[:, None] == x[None, :]
    return counts @ (below + 0.5 * equal.double()).T


def _correlation(x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    total = counts.sum(1, keepdim=True)
    x, y = (z - (counts * z).sum(1, keepdim=True) / total for z in (x, y))
    return (counts * x * y).sum(1) / ((counts * x * x).sum(1) * (counts * y * y).sum(1)).sqrt()
