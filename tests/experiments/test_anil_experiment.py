"""The experiment ``anil``: it trains as a plain loop does, goes on where it stopped, and its answers follow."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from experiment_answers import answers, gone_on
from torch.nn.functional import cross_entropy

from diffopt.experiments import anil, anil_report
from diffopt.experiments.framework import catalogue
from diffopt.experiments.framework.unit_context import Work
from diffopt.tasks import MLP, functional, sample_episodes


@pytest.mark.parametrize("layers", [1, 2])
def test_it_trains_as_a_plain_loop_does(layers):
    settings = replace(catalogue.experiment("anil").quick, iterations=3)
    row = anil.run(settings, layers, 0.7, 2, 0, Work(0))
    images = anil.small_images.load("clusters", Work(0))
    apply, params = functional(MLP((196, 8, 8, 5), torch.tanh, generator=Work(0).generator("start 0")))
    outer = torch.optim.Adam(params.values(), lr=settings.meta_lr)
    adapted = [name for name in params if name.split(".")[1] in "012"[-layers:]]
    generator, losses = Work(0).generator("tasks 0"), []
    for _ in range(3):
        episodes = sample_episodes(images, way=5, shot=5, query=5, tasks=2, generator=generator)
        total = 0.0
        for x, y, query_x, query_y in zip(*episodes, strict=True):
            head = {name: params[name] for name in adapted}
            for _ in range(2):
                penalty = sum(value.square().sum() for value in head.values())
                loss = cross_entropy(apply({**params, **head}, x.flatten(1)), y) + settings.decay / 2 * penalty
                slopes = torch.autograd.grad(loss, list(head.values()), create_graph=True)
                head = {name: v - 0.7 * s for (name, v), s in zip(head.items(), slopes, strict=True)}
            total = total + cross_entropy(apply({**params, **head}, query_x.flatten(1)), query_y) / 2
        outer.zero_grad()
        total.backward()
        outer.step()
        losses.append(total.item())
    assert row["losses"] == pytest.approx(losses, rel=1e-4)  # float32 and three Adam steps


def test_it_stops_and_goes_on_to_the_last_bit(tmp_path):
    settings = replace(catalogue.experiment("anil").quick, iterations=6)
    whole = anil.run(settings, 1, 0.5, 2, 0, Work(0))
    assert gone_on(tmp_path, 5, anil.run, settings, 1, 0.5, 2, 0)["losses"] == whole["losses"]


STEPS = (1, 3, 5, 10)


def said(head, several, starts=3):
    """The answers where every start has these losses by N, one rate, both numbers of layers; 9 iterations each."""
    settings = replace(catalogue.experiment("anil").quick, steps=STEPS, seeds=starts, rates=(1.0,), target=0.5)
    results = {}
    for unit in anil.units(settings):
        losses = head if unit.keys["layers"] == 1 else several
        loss = losses[STEPS.index(unit.keys["N"])]
        run = {"losses": [2.0] * 8 + [loss], "seconds": [float(i) for i in range(9)], "curvature": 0.5}
        results[unit.name] = {"diverged": "DivergenceError"} if math.isinf(loss) else run
    return answers(catalogue.experiment("anil").summarise(settings, results))


def test_answers_follow_the_numbers():
    first, second = "strongly convex: more inner steps converge faster per iteration", "and then it saturates"
    slower = "non-convex: more inner steps converge more slowly per iteration"
    opposite = "so the two geometries have opposite trends, at one inner step size"
    found = said((1.0, 0.8, 0.75, 0.7), (0.7, 0.8, 0.9, 1.0))
    assert [found[text] for text in (first, second, slower, opposite)] == ["yes"] * 4
    found = said((1.0, 1.1, 1.2, 1.3), (1.0, 0.9, 0.8, 0.7))
    assert [found[text] for text in (first, second, slower, opposite)] == ["no"] * 4
    found = said((1.0, 0.8, 0.75, 0.7), (0.7, 0.8, 0.9, 1.0), starts=1)
    assert [found[text] for text in (first, second, slower)] == ["not decided"] * 3


@pytest.mark.parametrize("last", [10.0, 1e6, math.inf])
def test_a_loss_that_diverges_does_not_saturate(last):
    found = said((1.0, 0.8, 0.75, last), (0.7, 0.8, 0.9, last))
    assert found["and then it saturates"] == "no"


def test_saturation():
    assert anil_report.saturation((1, 3, 5), (3.0, 1.0, 0.5)) == 0.25
    assert anil_report.saturation((1, 3, 5), (3.0, 1.0, 1.5)) == 0.25
    assert anil_report.saturation((1, 3, 5), (1.0, 3.0, 2.9)) == math.inf
    assert anil_report.saturation((1, 3), (3.0, 1.0)) is None
