"""The slope of the decay in L, on errors of known form and on brute-force expansions; what is answered from it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from diffopt.experiments import bounds, bounds_decay
from diffopt.experiments.framework.claims import Finished
from diffopt.experiments.framework.experiment import Unit
from diffopt.experiments.framework.texts import asked
from diffopt.experiments.framework.unit_context import Work

UNITS = [
    Unit("decay K=12 x=0.1", lambda work: {}, keys={"theorem": "decay", "K": 12, "x": 0.1}),
    Unit("convex K=3 x=1", lambda work: {}, keys={"theorem": "convex", "K": 3, "x": 1.0}),
]


@pytest.mark.parametrize("bend", [0.0, -1.0, -1.5, 0.3])
@pytest.mark.parametrize("rate", [0.5, -0.7])
def test_the_slope_is_that_of_the_formula(bend, rate):
    errors = [math.exp(2 + rate * m + bend * m * math.log(m)) for m in range(1, 9)]
    assert bounds_decay.slope(errors) == pytest.approx(bend, abs=1e-9)


def test_round_off_is_left_out_and_too_few_say_nothing():
    errors = [0.5**m for m in range(1, 6)]
    assert bounds_decay.slope([*errors, 1e-16, 2e-16]) == pytest.approx(0, abs=1e-9)
    assert bounds_decay.slope([0.1, 0.01, 0.001, 1e-15, 1e-16]) is None


def test_the_bound_of_the_paper_tends_to_minus_one():
    steps, x = 10**5, 1e-3
    bound = [math.comb(steps, m) * x**m for m in range(1, 60)]  # e * K * x / m to the m, as Stirling has it
    assert bounds_decay.slope(bound) == pytest.approx(-1, abs=0.05)


def test_errors_are_those_of_expansions_written_out():
    """With commuting Hessians, a sum over all subsets of steps with more than L members."""
    x, steps = 0.2, 6
    values = torch.linspace(0.05, x, steps, dtype=torch.float64)
    sequences = (values / bounds.LR)[None, :, None, None] * torch.eye(2, dtype=torch.float64)
    row = bounds_decay.measure(steps, x, lambda generator: sequences, bounds.errors, Work(0))
    assert len(row["binomial"]) == len(row["truncated"]) == len(row["(12c)"]) == 4
    for level in range(4):
        left_out = [
            np.prod([-values[i].item() for i in chosen])
            for size in range(level + 1, steps + 1)
            for chosen in itertools.combinations(range(steps), size)
        ]
        assert row["binomial"][level] == pytest.approx(abs(sum(left_out)), rel=1e-9)
        kept, whole = np.prod(1 - values[steps - level :].numpy()), np.prod(1 - values.numpy())
        assert row["truncated"][level] == pytest.approx(kept - whole, rel=1e-9)
        assert row["(12c)"][level] == pytest.approx(math.comb(steps, level + 1) * x ** (level + 1))


@pytest.mark.parametrize(("level", "expected"), [(0, 1 + 1.5**3), (1, 1 + 1.5**2 * 0.8), (3, 1 + 0.8**3)])
def test_the_reconstructed_bound_is_the_triangle_inequality(level, expected):
    found = bounds.bounds("ending convex", 3, level, 0.5, 0.2)
    assert found["(34a)"] == pytest.approx(expected)
    assert found["(34a)"] > found["(34b)"]


def test_answers_follow_the_numbers():
    bent = [math.exp(-m * math.log(m)) for m in range(1, 8)]
    straight = [0.5**m for m in range(1, 8)]

    def answers(binomial, truncated):
        row = {"binomial": binomial, "truncated": truncated, "(12c)": bent}
        results = {"decay K=12 x=0.1": row, "convex K=3 x=1": {}}
        decays = bounds_decay.decays_of(Finished(UNITS, results))
        ((line,),) = (table.rows for table in bounds_decay.table(decays))
        assert line[:2] == (12, 0.1)
        assert line[5:] == (0, pytest.approx(binomial[0]))
        return [claim.answer for claim in asked("bounds", "decay", decays, bend=bounds_decay.BEND)]

    assert answers(bent, straight) == ["yes", "yes"]
    assert answers(straight, bent) == ["no", "no"]
    few = {"decay K=12 x=0.1": {"binomial": bent[:2], "truncated": bent[:2], "(12c)": bent}}
    unknown = asked("bounds", "decay", bounds_decay.decays_of(Finished(UNITS, few)), bend=bounds_decay.BEND)
    assert [claim.answer for claim in unknown] == ["not measured", "not measured"]
