"""The few-shot experiment against plain loops; its paper values, its answers, its data sets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from diffopt.errors import DiffoptError
from diffopt.experiments import few_shot
from diffopt.experiments.few_shot_papers import printed
from diffopt.experiments.few_shot_report import in_order, summarise
from diffopt.experiments.framework import catalogue, image_sets
from diffopt.experiments.framework.few_shot_problem import EVALUATION_SEED
from diffopt.experiments.framework.unit_context import OutOfTime, Work
from diffopt.tasks import DataError, Omniglot

SETTINGS = catalogue.experiment("few-shot").quick


def adapted(apply, params, inputs, labels, name, steps, names):
    """The inner loop, written out; the window's gradient serves several updates."""
    s, momentum = SETTINGS, name.startswith(("momentum", "multi-step"))
    lr, window = (s.momentum_lr if momentum else s.lr), (2 if name == "multi-step 2" else 1)
    heavy = momentum and name != "momentum: first-order"
    now = dict(params)
    velocity = {key: torch.zeros_like(params[key]) for key in names}
    for step in range(steps):
        if step % window == 0:
            loss = cross_entropy(apply(now, inputs), labels)
            slopes = torch.autograd.grad(loss, [now[key] for key in names], create_graph=True)
            if name in ("FOMAML", "momentum: first-order"):
                slopes = [g.detach() for g in slopes]
        for key, slope in zip(names, slopes, strict=True):
            velocity[key] = (0.9 * velocity[key] + slope + 1e-4 * now[key]) if heavy else slope
        now |= {key: now[key] - lr * velocity[key] for key in names}
    return now


@pytest.mark.parametrize(
    ("name", "anil"),
    [("MAML", False), ("MAML", True), ("FOMAML", False), ("momentum: MAML", False), ("multi-step 2", False)],
)
def test_it_learns_and_is_tested_as_plain_loops_do(name, anil):
    settings = replace(SETTINGS, iterations=3, checkpoints=3, anil=anil, momentum_steps=3, meta_lr=0.05)
    row = few_shot.learn(settings, name, 3, 1, Work(0))
    validated, tested = few_shot.problem(settings, 3, 1, Work(0))
    apply, params = validated.predict, validated.params
    names = [key for key in params if key.startswith("head.") or not anil]
    outer = torch.optim.Adam(params.values(), lr=settings.meta_lr)
    generator, losses = Work(0).generator("episodes 3 1"), []
    steps, test_steps = (3, 3) if "m" in name[0] else (settings.steps, settings.test_steps)

    def accuracy(problem, params, count):
        episodes = problem.evaluation(count, torch.Generator().manual_seed(EVALUATION_SEED))
        found = []
        for x, y, query, wanted in zip(*episodes, strict=True):
            leaves = {key: value.detach().requires_grad_() for key, value in params.items()}
            now = adapted(apply, leaves, x, y, name, test_steps, names)
            found.append((apply(now, query).argmax(1) == wanted).float().mean())
        return 100 * float(torch.stack(found).mean())

    seen = []
    for _ in range(3):
        total = 0.0
        for x, y, query, wanted in zip(*validated.training(settings.tasks, generator), strict=True):
            now = adapted(apply, params, x, y, name, steps, names)
            total = total + cross_entropy(apply(now, query), wanted) / settings.tasks
        outer.zero_grad()
        total.backward()
        outer.step()
        losses.append(total.item())
        seen.append((accuracy(validated, params, settings.validation), accuracy(tested, params, settings.episodes)))
    assert row["losses"] == pytest.approx(losses, rel=1e-3)  # float32, normalised features, three Adam steps
    assert row["validation"] == pytest.approx([first for first, _ in seen])
    assert row["after"] == [1, 2, 3]
    best = max(range(3), key=lambda i: (seen[i][0], -i))  # the first of equals
    assert row["accuracy"] == pytest.approx(seen[best][1])


def test_it_stops_and_goes_on_to_the_last_bit(tmp_path):
    settings = replace(SETTINGS, iterations=4, checkpoints=2)
    whole = few_shot.learn(settings, "binomial 1", 3, 1, Work(0))
    stopped = Work(0, unit="x", store=tmp_path / "x.pt", deadline=0.0)  # out of time after every iteration
    for _ in range(3):
        with pytest.raises(OutOfTime):
            few_shot.learn(settings, "binomial 1", 3, 1, stopped)
    again = few_shot.learn(settings, "binomial 1", 3, 1, stopped)
    kept = ("losses", "validation", "after", "accuracy", "half_width")
    assert [again[key] for key in kept] == [whole[key] for key in kept]


def test_methods_are_the_papers():
    found = few_shot.methods(few_shot.Settings())
    heavy = found["multi-step 4"].optimizer
    assert (heavy.momentum, heavy.weight_decay, found["multi-step 4"].steps) == (0.9, 1e-4, 8)
    assert found["momentum: first-order"].optimizer.momentum == 0
    assert (found["hybrid 1"].estimator.order, found["hybrid 1"].estimator.window) == (1, 4)  # K=5, L=1, C=4
    assert found["iMAML 2"].estimator.solver.max_iterations == 2
    assert {found[name].steps for name in found if not name.startswith(("momentum", "multi"))} == {5}


def test_the_papers_values():
    assert printed("omniglot", 5, 1, "multi-step 4") == "98.97+-1.02"
    assert printed("omniglot", 20, 1, "multi-step 8") == "94.24+-0.95"
    assert printed("mini-imagenet", 5, 5, "binomial 1") == "62.36+-0.48"
    assert printed("mini-imagenet", 5, 5, "multi-step 8") == "60.84+-0.71"
    assert printed("tiered-imagenet", 5, 1, "truncated 1") == "43.67+-0.96"
    assert printed("tiered-imagenet", 5, 5, "MAML") == "65.12+-0.50"
    assert printed("caltech101", 5, 1, "MAML") is None
    assert printed("omniglot", 5, 1, "krylov 1") is None


def test_order():
    assert in_order({})[0] == "not measured"
    assert in_order({"a - b": (2.0, 1.0), "b - c": (-0.5, 1.0)})[0] == "yes"
    assert in_order({"a - b": (0.5, 1.0)})[0] == "partly"
    assert in_order({"a - b": (2.0, 1.0), "b - c": (-2.0, 1.0)})[0] == "partly"
    assert in_order({"b - c": (-2.0, 1.0)})[0] == "no"


def test_answers_follow_the_numbers():
    settings = replace(SETTINGS, ways=(5,), levels=(1,), windows=(2, 4, 8))

    def run(accuracy, seconds=1.0):
        return {"accuracy": accuracy, "half_width": 0.5, "seconds": [seconds], "losses": [1.0]}

    figures = {"MAML": 90.0, "binomial 1": 89.5, "truncated 1": 88.0, "krylov 1": 89.0, "iMAML 1": 85.0, "FOMAML": 86.0}
    rows = {f"5-way 1-shot, {name}": run(value) for name, value in figures.items()}
    rows["5-way 1-shot, momentum: MAML"] = run(95.0, 2.0)
    rows["5-way 1-shot, multi-step 4"] = run(94.95)
    rows["5-way 1-shot, multi-step 8"] = {"diverged": "DivergenceError"}
    order, above, speed, loses = (
        "the order is MAML >= binomial, Krylov >= truncated >= first order",
        "binomial is above truncated at equal L (beyond the interval)",
        "multi-step(4) is twice as fast as MAML at a loss of 0.1 points",
        "multi-step(8) loses at most 2.59 points",
    )

    def answers():
        found = {claim.text: claim.answer for claim in summarise(settings, rows).claims}
        return [found[text] for text in (order, above, speed, loses)]

    assert answers() == ["yes", "yes", "yes", "no"]
    rows["5-way 1-shot, truncated 1"] = run(89.2)
    rows["5-way 1-shot, FOMAML"] = run(92.0)
    rows["5-way 1-shot, multi-step 4"] = run(94.0)
    rows["5-way 1-shot, multi-step 8"] = run(93.0)
    assert answers() == ["partly", "no", "partly", "yes"]


@pytest.mark.parametrize("name", sorted(image_sets.SETS))
def test_every_set_says_what_it_lacks(name, tmp_path):
    if name == "clusters":
        splits = [image_sets.load(name, split, None) for split in ("train", "validation", "test")]
        assert not torch.equal(splits[0], splits[1])
        assert not torch.equal(splits[1], splits[2])
        return
    with pytest.raises(DataError, match="--data-dir"):
        image_sets.load(name, "validation", str(tmp_path))


def test_omniglot_is_validated_on_alphabets_of_its_own(monkeypatch):
    alphabets = tuple(name for name in "badcfeih" for _ in range(2))  # two characters each; h is the eighth by name
    images = torch.arange(16, dtype=torch.uint8).reshape(16, 1, 1, 1).expand(16, 20, 28, 28)
    loaded = Omniglot(images, alphabets, tuple(map(str, range(16))), ("file",))
    monkeypatch.setattr(Omniglot, "load", lambda folder, *, split, rotations=False: loaded)
    found = {split: image_sets.load("omniglot", split, None)[:, 0, 0, 0].tolist() for split in ("validation", "test")}
    assert found["validation"] == [2, 3, 10, 11]  # a and e, the first and the fifth
    assert sorted(found["validation"] + found["test"]) == list(range(16))


def test_the_data_set_is_an_option(tmp_path, capsys):
    from diffopt.cli import main

    out = ["--out", str(tmp_path / "run")]
    assert main(["reproduce", "few-shot", "--quick", "--data-dir", str(tmp_path), "--dataset", "fc100", *out]) == 2
    assert "FC100" in capsys.readouterr().err
    assert main(["reproduce", "few-shot", "--quick", "--dataset", "nonsense", *out]) == 2
    assert "expected one of omniglot, caltech101" in capsys.readouterr().err
    assert main(["reproduce", "bounds", "--quick", "--dataset", "omniglot", *out]) == 2
    assert "--set dataset=omniglot, expected SETTING=VALUE" in capsys.readouterr().err
    assert issubclass(DataError, DiffoptError)
