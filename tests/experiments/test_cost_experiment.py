"""The experiment ``cost``: what it counts is what the paper counts, and its answers follow the numbers."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from experiment_answers import answers, rows

from diffopt.experiments import cost
from diffopt.experiments.framework import catalogue


@pytest.mark.slow
def test_counts_are_the_papers():
    settings = replace(catalogue.experiment("cost").quick, levels_steps=4, steps=(), filters=1, seeds=1)
    (row,) = rows("cost", settings).values()
    measured = row["rules"]
    for level in range(5):
        truncated, binomial = measured[f"truncated {level}"], measured[f"binomial {level}"]
        assert (truncated["products"], truncated["depth"]) == (level, level)
        assert (binomial["products"], binomial["depth"]) == (level * (4 - level + 1) if level < 4 else 4, level)
    assert measured["MAML"]["products"] == measured["MAML"]["depth"] == 4
    assert measured["binomial, one by one 2"]["depth"] == 6


def test_answers_follow_the_numbers():
    settings = replace(catalogue.experiment("cost").quick, seeds=3)
    texts = (
        "binomial's time is only slightly above truncated's at equal L (up to 1.25)",
        "binomial takes markedly less memory than MAML (below 0.8)",
        "multi-step(4) is twice as fast as 8-step MAML (up to 0.55)",
        "time and memory fall as the window grows (K=8)",
        "iMAML takes more time than MAML at fewer than eight inner steps (5 conjugate-gradient products)",
        "memory by implicit differentiation does not grow with K (up to 5 %)",
    )

    def said(**seconds):
        results = {}
        for unit in cost.units(settings):
            noise, over = 1 + 0.01 * unit.keys["seed"], unit.keys["over"] == "levels"
            estimators = cost.level_estimators(2) if over else cost.step_estimators(unit.keys["K"])
            of = {name: seconds.get(re.sub(r"\W", "_", name), 1.0) * noise for name in estimators}
            size = {name: 1.0 if name in ("MAML", "first-order") else 0.5 * value for name, value in of.items()}
            counts = {"gradients": 1, "products": 1, "depth": 1}
            both = {name: {**counts, "seconds": of[name], "megabytes": size[name] / noise} for name in estimators}
            results[unit.name] = {"rules": both}
        found = answers(catalogue.experiment("cost").summarise(settings, results))
        return [found[text] for text in texts]

    falls = {"multi_step_2": 0.9, "multi_step_4": 0.5, "multi_step_8": 0.3}
    assert said(binomial_1=1.2, implicit__5_CG=1.5, **falls) == ["yes"] * 6
    slow = {"multi_step_2": 1.1, "multi_step_4": 1.7, "multi_step_8": 2.3}
    assert said(binomial_1=2.0, binomial_2=2.0, implicit__5_CG=0.5, **slow)[:5] == [*["no"] * 3, "partly", "no"]


def test_windows_are_counted():
    assert [estimator for estimator in cost.step_estimators(4) if estimator.startswith("multi")] == [
        "multi-step 2",
        "multi-step 4",
    ]
