"""What the experiment on MAML itself computes, against plain loops; its answers follow the numbers."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from experiment_answers import gone_on
from torch.nn.functional import cross_entropy

from diffopt.experiments import maml
from diffopt.experiments.framework import catalogue, small_images
from diffopt.experiments.framework.run_folder import json_row
from diffopt.experiments.framework.unit_context import Work
from diffopt.tasks import MLP, sample_episodes

SETTINGS = catalogue.experiment("maml").quick
BASE = maml.Run(0.8, 2, 2, 0)


def plain_training(run):
    """Meta-training written out, task by task; the parameters and the outer losses."""
    work = Work(0)
    images = small_images.load("clusters", work)[: int(0.8 * 60)]
    network = MLP((196, 4, 4, run.way), torch.tanh, generator=work.generator(f"start {run.seed} {run.way}"))
    params = [p.detach().clone().requires_grad_() for p in network.parameters()]
    tasks, drawn = work.generator(f"tasks {run.seed}"), work.generator(f"batches {run.seed}")
    outer, losses = torch.optim.Adam(params, lr=SETTINGS.meta_lr), []

    def scores(p, x):
        return torch.tanh(torch.tanh(x.flatten(1) @ p[0].T + p[1]) @ p[2].T + p[3]) @ p[4].T + p[5]

    for _ in range(SETTINGS.iterations):
        chosen = [torch.arange(2 * run.way)] * SETTINGS.steps
        if run.batch is not None:
            chosen = [torch.randperm(2 * run.way, generator=drawn)[: run.batch] for _ in range(SETTINGS.steps)]
        episodes = sample_episodes(images, way=run.way, shot=2, query=1, tasks=run.tasks, generator=tasks)
        total = torch.zeros(())
        for x, y, queries, wanted in zip(*episodes, strict=True):
            adapted = list(params)
            for part in chosen:
                slopes = torch.autograd.grad(
                    cross_entropy(scores(adapted, x[part]), y[part]),
                    adapted[2 * (3 - run.adapted) :],
                    create_graph=not run.first_order,
                )
                moved = [a - run.rate * g for a, g in zip(adapted[-len(slopes) :], slopes, strict=True)]
                adapted = adapted[: -len(slopes)] + moved
            total = total + cross_entropy(scores(adapted, queries), wanted) / run.tasks
        outer.zero_grad()
        total.backward()
        outer.step()
        losses.append(total.item())
    return losses


@pytest.mark.parametrize(
    "run",
    [
        BASE,
        replace(BASE, adapted=1, rate=0.2),
        replace(BASE, batch=2),
        replace(BASE, first_order=True, way=4),
        replace(BASE, tasks=1, seed=1),
    ],
    ids=maml.Run.name,
)
def test_it_trains_as_a_plain_loop_does(run):
    row = maml.learn(SETTINGS, run, Work(0))
    assert row["losses"] == pytest.approx(plain_training(run), rel=1e-4)  # float32 and three Adam steps
    assert row["slope"] > 0
    assert 0 <= row["accuracy"] <= 100


def test_runs_are_varied_one_thing_at_a_time():
    runs = maml.runs(replace(SETTINGS, seeds=2))
    assert len(set(runs)) == len(runs)
    base = [replace(BASE, seed=seed) for seed in (0, 1)]
    assert set(base) <= set(runs)
    for run in runs:
        start = replace(base[run.seed], adapted=run.adapted, first_order=run.first_order)
        assert sum(a != b for a, b in zip(vars(run).values(), vars(start).values(), strict=True)) <= 1
        sizes = (run.rate, run.tasks, str(run.batch or "all"), run.way, run.seed)
        assert tuple(run.keys().values())[1:] == sizes
    assert {run.keys()["method"] for run in runs} == {"MAML", "ANIL", "FOMAML"}


def test_a_run_that_was_stopped_goes_on_to_the_last_bit(tmp_path):
    run = replace(BASE, batch=2)
    whole = maml.learn(SETTINGS, run, Work(0))
    again = gone_on(tmp_path, 2, maml.learn, SETTINGS, run)
    assert {**again, "seconds": None} == {**whole, "seconds": None}


@pytest.fixture(scope="module")
def rows():
    settings = replace(SETTINGS, iterations=2, judged=1)
    return {unit.name: json_row(unit.name, unit.run(Work(0))) for unit in maml.units(settings)}


def test_answers_follow_the_numbers(rows):
    rows = copy.deepcopy(rows)

    def name(**changes):
        return replace(BASE, **changes).name()

    def answers():
        return [claim.answer for claim in catalogue.experiment("maml").summarise(SETTINGS, rows).claims]

    rates = {0.2: 1.0, 0.8: 0.5, 50.0: 3.0}
    for rate, loss in rates.items():
        rows[name(rate=rate)]["loss"] = rows[name(rate=rate, adapted=1)]["loss"] = loss
    rows[name(tasks=1)] |= {"loss": 0.6, "slope": 2.0}
    rows[name(batch=2)] |= {"loss": 0.6, "slope": 2.0}
    rows[name()] |= {"slope": 1.0, "losses": [1.0, 0.5], "seconds": [1.0, 2.0], "accuracy": 80.0}
    rows[name(adapted=1)] |= {"losses": [0.5, 0.4], "seconds": [0.5, 1.0]}
    rows[name(first_order=True)]["accuracy"] = 79.0
    rows[name(way=4)]["accuracy"], rows[name(way=4, first_order=True)]["accuracy"] = 70.0, 60.0
    assert answers() == ["yes"] * 8
    kept, rows[name(rate=50.0)] = rows[name(rate=50.0)], {"diverged": "DivergenceError"}
    assert answers() == ["yes"] * 8
    rows[name(rate=50.0)] = {**kept, "loss": 0.52}
    rows[name(tasks=1)] |= {"loss": 0.4, "slope": 0.5}
    rows[name(batch=2)] |= {"loss": 0.4, "slope": 0.5}
    rows[name(adapted=1)] |= {"losses": [0.8, 0.7], "seconds": [2.5, 5.0]}
    rows[name(way=4, first_order=True)]["accuracy"] = 69.5
    assert answers() == ["no"] * 8
    del rows[name()]
    assert answers() == ["not measured"] * 8
