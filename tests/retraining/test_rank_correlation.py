"""Spearman's correlation and its interval, beside scipy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from diffopt.retraining import rank_correlation
from diffopt.retraining.rank_correlation import rank_correlations, score_and_interval


def table(rows: int, ties: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    y = x + torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    return (x.round(), y.round()) if ties else (x, y)


def spearman(x: torch.Tensor, y: torch.Tensor) -> list[float]:
    with np.errstate(invalid="ignore"):
        return [stats.spearmanr(a, b).statistic for a, b in zip(x.T.numpy(), y.T.numpy(), strict=True)]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rows", [3, 10, 61])
def test_it_is_that_of_scipy(rows, ties):
    x, y = table(rows, ties)
    found = rank_correlations(x, y, torch.ones(1, rows, dtype=torch.float64))
    np.testing.assert_allclose(found[0], spearman(x, y), rtol=1e-12, atol=1e-12)


def test_rows_that_are_counted_several_times_stand_in_the_table_as_often():
    x, y = table(6, ties=True)
    counts = torch.tensor([[1, 2, 0, 3, 1, 0], [0, 1, 1, 1, 1, 2]])
    found = rank_correlations(x, y, counts.double())
    for row, times in zip(found, counts, strict=True):
        chosen = torch.repeat_interleave(torch.arange(6), times)
        np.testing.assert_allclose(row, spearman(x[chosen], y[chosen]), rtol=1e-12, atol=1e-12)


def test_only_the_order_matters():
    x, y = table(20, ties=False)
    ones = torch.ones(1, 20, dtype=torch.float64)
    torch.testing.assert_close(
        rank_correlations(x.exp(), y.pow(3), ones), rank_correlations(x, y, ones), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(rank_correlations(x, -(x.exp()), ones), -torch.ones(1, 3).double(), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:An input array is constant")
@pytest.mark.parametrize(("rows", "ties"), [(3, False), (8, True), (30, False)])
def test_the_interval_is_that_of_a_loop_over_tables(monkeypatch, rows, ties):
    monkeypatch.setattr(rank_correlation, "DRAWS", 60)
    x, y = table(rows, ties)
    drawn = torch.randint(rows, (60, rows), generator=torch.Generator().manual_seed(5))
    every = np.array([spearman(x[chosen], y[chosen]) for chosen in drawn])
    means = [np.mean(row[~np.isnan(row)]) for row in every if not np.isnan(row).all()]
    each, score, found = score_and_interval(x, y, 0.9, seed=5)
    np.testing.assert_allclose(each, spearman(x, y), rtol=1e-12)
    assert score == pytest.approx(np.mean(spearman(x, y)))
    low, middle, high = np.quantile(means, [0.05, 0.5, 0.95])
    np.testing.assert_allclose(found, [max(-1, score + low - middle), min(1, score + high - middle)], atol=1e-9)


@pytest.mark.parametrize("noise", [0.01, 0.1, 1.0, 10.0])
def test_the_score_lies_in_its_interval(noise):
    x, y = table(40, ties=False)
    for seed in range(5):
        _, score, (low, high) = score_and_interval(x, x + noise * (y - x), 0.5, seed)
        assert -1 <= low < score < high <= 1


def test_the_interval_is_about_that_of_scipy_and_grows_with_the_confidence():
    x, y = table(80, ties=False)

    def mean(*columns, axis=-1):
        half = len(columns) // 2
        return np.mean([stats.spearmanr(a, b).statistic for a, b in zip(columns[:half], columns[half:], strict=True)])

    data = [*x.T.numpy(), *y.T.numpy()]
    of_scipy = stats.bootstrap(
        data, mean, paired=True, vectorized=False, n_resamples=400, method="percentile", random_state=0
    ).confidence_interval
    _, score, found = score_and_interval(x, y, 0.95, seed=0)
    # two random samples of tables; and ours lies around the score
    np.testing.assert_allclose(np.diff(found), np.diff(of_scipy), rtol=0.15)
    np.testing.assert_allclose(found, of_scipy, atol=0.03)
    wider = score_and_interval(x, y, 0.99, seed=0)[2]
    assert wider[0] < found[0] < score < found[1] < wider[1]
