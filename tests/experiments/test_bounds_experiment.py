"""The experiment ``bounds``: its errors beside explicit products of matrices, its bounds by hand, its answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from experiment_answers import rows

from diffopt.experiments import bounds
from diffopt.experiments.framework import catalogue
from diffopt.experiments.framework.unit_context import Work


def product(factors):
    return np.linalg.multi_dot([np.eye(2), *factors, np.eye(2)])


@pytest.mark.parametrize("level", range(4))
def test_errors_are_those_of_explicit_products(level):
    settings = bounds.Settings(dimension=2, draws=3)
    lows = torch.full((3,), -0.7, dtype=torch.float64)
    sequences = bounds.random_hessians(settings, lows, 0.7, torch.Generator().manual_seed(0))
    found = bounds.errors(sequences, level)
    for i, sequence in enumerate(sequences):
        steps = [np.eye(2) - bounds.LR * h.numpy() for h in sequence]
        curved = [-bounds.LR * h.numpy() for h in sequence]
        exact = product(steps)
        subsets = [[c if s >> k & 1 else np.eye(2) for k, c in enumerate(curved)] for s in range(8)]
        expansion = sum(product(s) for k, s in enumerate(subsets) if k.bit_count() <= level)
        expected = {
            "first-order": np.eye(2) - exact,
            "truncated": product(steps[3 - level :] or [np.eye(2)]) - exact,
            "binomial": expansion - exact,
        }
        for name, matrix in expected.items():
            # products of three matrices of norm below 2
            assert found[name][i] == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-12, abs=1e-14)


def test_random_curvature_stays_within_its_bounds_and_reaches_them():
    lows = torch.tensor([-0.5, 0.1], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    sequences = bounds.random_hessians(bounds.Settings(draws=40), lows, 0.5, generator)
    values = torch.linalg.eigvalsh(sequences) * bounds.LR
    assert values.amax().item() == pytest.approx(0.5)
    assert values[:, 0].amin().item() == pytest.approx(-0.5)
    assert values[:, 1].amin().item() == pytest.approx(0.1)


def test_the_counterexample():
    row = bounds.turn(bounds.Settings(turning_curvatures=2), 4, Work(0))
    assert row["curvatures"] == [0.5, 1.0]
    # four projections turned by a sixth of a circle each: 1 + cos(60 degrees)**3, if no other angle is worse
    assert row["error"][1] >= 1 + math.cos(math.pi / 3) ** 3 - 1e-12
    assert row["claimed (12a)"] == pytest.approx([1 - 0.5**4, 1])
    assert row["error"][1] <= row["proposition 4.1"][1] == pytest.approx(8 / 5)


def test_bounds_by_hand():
    found = bounds.bounds("bounded", 3, 1, 0.5, 0.0)
    assert found == pytest.approx({"(11a)": 2.375, "(11b)": 1.25 * 1.5, "(11c)": 3 * 0.25 + 0.125})
    found = bounds.bounds("convex", 4, 1, 0.5, 0.0)
    assert found["(12a)"] == 1 - 0.0625
    assert found["(12b)"] == 1 - 0.125
    assert found["(12c)"] == 6 * 0.25
    assert found["4.1, first order"] == pytest.approx(4 / 3.5)
    assert found["4.1, truncated"] == pytest.approx(3 / 3)
    found = bounds.bounds("ending convex", 3, 1, 0.5, 0.2)
    assert found == pytest.approx({"(34a)": 1 + 2.25 * 0.8, "(34b)": 1.25 * 0.8, "(34c)": 0.8 * 0.25 + 0.25 * 2})


@pytest.mark.slow
def test_answers_follow_the_numbers():
    settings = catalogue.experiment("bounds").quick
    found = rows("bounds", settings)

    def said():
        claims = catalogue.experiment("bounds").summarise(settings, found).claims
        return {claim.text.replace(", as reconstructed,", ""): claim.answer for claim in claims}

    assert said()["bounded curvature: (11a), (11b), (11c) hold"] == "yes"
    assert said()["they are attained at H_k = -H I"] == "yes"
    assert said()["convex losses: (12a) bounds first order"] == "no"
    assert said()["proposition 4.1 holds in their place"] == "yes"
    assert said()["binomial's bound <= truncated's <= first order's"] == "yes"
    for level in found["seed=0 bounded K=3 x=1"]["levels"]:
        level["random"]["binomial"] *= 2
    assert said()["bounded curvature: (11a), (11b), (11c) hold"] == "partly"
    found["seed=1 bounded K=3 x=0.3"]["levels"][1]["bound"]["(11c)"] *= 9
    assert said()["binomial's bound <= truncated's <= first order's"] == "partly"
