"""The few-shot experiment against plain loops; its paper values, its answers, its data sets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from experiment_answers import gone_on
from torch.nn.functional import cross_entropy

from diffopt.errors import DiffoptError
from diffopt.experiments import few_shot
from diffopt.experiments.few_shot_papers import printed
from diffopt.experiments.framework import catalogue, image_sets
from diffopt.experiments.framework.few_shot_problem import EVALUATION_SEED, evaluate_adapted
from diffopt.experiments.framework.unit_context import Work
from diffopt.tasks import DataError, Episodes, Omniglot, RaggedImages

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
    ("name", "anil", "decay"),
    [
        ("MAML", False, False),
        ("MAML", True, True),
        ("FOMAML", False, True),
        ("momentum: MAML", False, True),
        ("multi-step 2", False, False),
    ],
)
def test_it_learns_and_is_tested_as_plain_loops_do(name, anil, decay):
    settings = replace(SETTINGS, iterations=3, checkpoints=3, anil=anil, momentum_steps=3, meta_lr=0.05, decay=decay)
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
    for rate in (0.05, 0.05 * 0.75, 0.05 * 0.25) if decay else (0.05,) * 3:  # (1 + cos(60, 120 degrees)) / 2
        outer.param_groups[0]["lr"], total = rate, 0.0
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
    assert len(row["each"]) == settings.episodes
    assert sum(row["each"]) / settings.episodes == pytest.approx(seen[best][1], abs=1e-3)


@pytest.mark.parametrize(("steps", "size", "tasks"), [(3, 2, 2), (2, 6, 3), (4, 5, 2)])
def test_reptile_goes_towards_the_mean_of_solutions_on_all_images(steps, size, tasks):
    settings = replace(
        SETTINGS, iterations=2, checkpoints=2, tasks=tasks, reptile_steps=steps, reptile_batch=size, reptile_meta_lr=0.5
    )
    row = few_shot.learn(settings, "Reptile", 3, 1, Work(0))
    validated, _ = few_shot.problem(settings, 3, 1, Work(0))
    now, episodes, shuffles = validated.params, Work(0).generator("episodes 3 1"), Work(0).generator("shuffles")
    losses, scores = [], []
    for rate in (0.5, 0.25):  # half a cosine
        batch = validated.training(tasks, episodes)
        support = few_shot.in_batches(batch, steps, size, shuffles)
        solutions = []
        for x, y, query, wanted in zip(*support, strict=True):
            own = dict(now)
            for images, labels in zip(x, y, strict=True):
                loss = cross_entropy(validated.predict(own, images), labels)
                slopes = torch.autograd.grad(loss, list(own.values()))
                own = {key: v - settings.reptile_lr * g for (key, v), g in zip(own.items(), slopes, strict=True)}
            solutions.append((own, cross_entropy(validated.predict(own, query), wanted).item()))
        losses.append(sum(loss for _, loss in solutions) / tasks)
        mean = {key: sum(own[key] for own, _ in solutions) / tasks for key in now}
        now = {key: (v + rate * (mean[key] - v)).detach().requires_grad_() for key, v in now.items()}
        testing = few_shot.in_tests(settings, "Reptile", few_shot.methods(settings)["Reptile"])
        scores.append(100 * float(evaluate_adapted(validated, now, testing, settings.validation).mean()))
    assert row["losses"] == pytest.approx(losses, rel=1e-3)
    assert row["validation"] == pytest.approx(scores)
    assert testing.steps == settings.reptile_test_steps
    assert not testing.batched


@pytest.mark.parametrize(("steps", "size"), [(4, 3), (3, 6), (5, 4), (1, 100)])
def test_batches_go_through_all_images_of_a_task(steps, size):
    images = torch.arange(12, dtype=torch.float32).reshape(2, 6, 1, 1, 1)  # 0 to 5, and 6 to 11
    labels = images.flatten(1).long()
    episodes = Episodes(images[:, :2], labels[:, :2], images[:, 2:], labels[:, 2:])
    found = few_shot.in_batches(episodes, steps, size, torch.Generator().manual_seed(1))
    size = min(size, 6)
    assert found.support_inputs.shape == (2, steps, size, 1, 1, 1)
    assert torch.equal(found.support_inputs.flatten(2), found.support_targets.float())  # images keep their labels
    assert torch.equal(found.query_inputs, episodes.query_inputs)
    for task, own in enumerate(found.support_targets.flatten(1).tolist()):
        for begin in range(0, len(own), 6):
            shuffle = own[begin : begin + 6]
            assert len(set(shuffle)) == len(shuffle)
            assert set(shuffle) <= set(range(6 * task, 6 * task + 6))
    assert steps * size < 6 or found.support_targets[0].flatten()[:6].tolist() != list(range(6))


@pytest.mark.parametrize("method", ["binomial 1", "Reptile"])
def test_it_stops_and_goes_on_to_the_last_bit(tmp_path, method):
    settings = replace(SETTINGS, iterations=4, checkpoints=2)
    whole = few_shot.learn(settings, method, 3, 1, Work(0))
    again = gone_on(tmp_path, 3, few_shot.learn, settings, method, 3, 1)
    kept = ("losses", "validation", "after", "accuracy", "half_width", "each")
    assert [again[key] for key in kept] == [whole[key] for key in kept]


@pytest.mark.parametrize(("way", "expected"), [(3, 2), (10, 2), (11, 5)])
def test_many_ways_have_batches_of_their_own(monkeypatch, way, expected):
    class Seen(Exception):  # noqa: N818
        pass

    def stop(problem, params, adaptation, episodes):
        raise Seen(len(episodes[0]))

    monkeypatch.setattr(few_shot, "meta_gradient", stop)
    with pytest.raises(Seen) as seen:
        few_shot.learn(replace(SETTINGS, wide_tasks=5), "FOMAML", way, 1, Work(0))
    assert seen.value.args == (expected,)


@pytest.mark.parametrize(
    ("after", "lasted", "clock", "expected"),
    [
        ([], [], [1.0, 2.0], [1.0, 2.0]),
        ([1, 3], [10.0, 20.0], [1.0, 12.0, 13.0, 34.0], [1.0, 2.0, 3.0, 4.0]),
        ([2, 4], [5.0, 7.0], [1.0, 2.0, 8.0, 9.0], [1.0, 2.0, 3.0, 4.0]),  # the last look is after the last iteration
    ],
)
def test_the_time_of_validations_is_left_out(after, lasted, clock, expected):
    validated, _ = few_shot.problem(SETTINGS, 3, 1, Work(0))
    validation = few_shot.Validation(validated, few_shot.methods(SETTINGS)["MAML"], 2)
    validation.curves["after"][:], validation.curves["evaluating"][:] = after, lasted
    assert validation.left_out(clock) == expected


def test_methods_are_the_papers():
    found = few_shot.methods(few_shot.Settings())
    heavy = found["multi-step 4"].optimizer
    assert (heavy.momentum, heavy.weight_decay, found["multi-step 4"].steps) == (0.9, 1e-4, 8)
    assert found["momentum: first-order"].optimizer.momentum == 0
    assert (found["hybrid 1"].estimator.order, found["hybrid 1"].estimator.window) == (1, 4)  # K=5, L=1, C=4
    assert found["iMAML 2"].estimator.solver.max_iterations == 2
    assert found["binomial 2"].estimator.scale == 1
    scaled = few_shot.methods(few_shot.Settings(scale="paper"))
    assert (scaled["binomial 2"].estimator.scale, scaled["hybrid 1"].estimator.scale) == (2 / 5, 1 / 5)
    full = few_shot.methods(few_shot.FULL)
    assert (full["momentum: MAML"].optimizer.lr, full["momentum: first-order"].optimizer.lr) == (0.4, 0.1)
    assert (few_shot.FULL.tasks, few_shot.FULL.wide_tasks, few_shot.FULL.iterations) == (32, 16, 60_000)
    assert {found[name].steps for name in found if not name.startswith(("momentum", "multi", "Reptile"))} == {5}


def test_a_run_cut_short_has_whole_starts_of_the_main_methods():
    settings = replace(SETTINGS, levels=(1, 2), windows=(2, 4), seeds=2, shots=(1, 5), steps=5)
    units, every = few_shot.units(settings), list(few_shot.methods(settings))
    names = [unit.keys["method"] for unit in units]
    last = {"iMAML 1", "iMAML 2", "truncated 2", "binomial 2", "krylov 2", "hybrid 1"}
    later = {"Reptile", "momentum: first-order", "multi-step 2"}
    first = [name for name in every if name not in last]
    main = [name for name in first if name not in later]
    begin = 2 * len(first) + 2 * len(main)  # two shots of the first start, and of the second
    assert names[:begin] == first * 2 + main * 2
    assert [unit.keys["seed"] for unit in units][:begin] == [0] * 2 * len(first) + [1] * 2 * len(main)
    assert set(names[begin : begin + 2 * len(later)]) == later
    assert set(names[begin + 2 * len(later) :]) == last
    assert len(names) == 4 * len(every)
    results = {unit.name: {"diverged": "DivergenceError"} for unit in (units[0], units[1], units[2 * len(first)])}
    table = catalogue.experiment("few-shot").summarise(settings, results).tables[0]
    assert {line[0]: line[table.columns.index("starts")] for line in table.rows} == {"MAML": 2, "FOMAML": 1}


def test_the_papers_values():
    assert printed("omniglot", 5, 1, "multi-step 4") == "98.97+-1.02"
    assert printed("omniglot-vinyals", 20, 1, "multi-step 8") == "94.24+-0.95"
    assert printed("mini-imagenet", 5, 5, "binomial 1") == "62.36+-0.48"
    assert printed("mini-imagenet", 5, 5, "multi-step 8") == "60.84+-0.71"
    assert printed("tiered-imagenet", 5, 1, "truncated 1") == "43.67+-0.96"
    assert printed("tiered-imagenet", 5, 5, "MAML") == "65.12+-0.50"
    assert printed("caltech101", 5, 1, "MAML") is None
    assert printed("omniglot", 5, 1, "krylov 1") is None


def test_answers_follow_the_numbers():
    settings = replace(SETTINGS, ways=(5,), levels=(1,), windows=(2, 4, 8), episodes=3, seeds=3, steps=5)
    names = {unit.keys["method"] for unit in few_shot.units(settings)}

    def run(accuracy, seed, seconds=1.0):
        each = [accuracy + seed + 5 * draw for draw in range(3)]  # starts and episodes differ, methods do not in that
        return {"each": each, "seconds": [seconds], "losses": [1.0], "after": [1], "validation": [50.0]}

    figures = {"MAML": 80.0, "binomial 1": 79.5, "truncated 1": 78.0, "krylov 1": 79.0, "iMAML 1": 75.0, "FOMAML": 76.0}
    assert set(figures) <= names

    def rows(**changed):
        found = {"momentum: MAML": (85.0, 2.0), "multi-step 4": (84.95, 1.0), "multi-step 8": None}
        found |= {name: (value, 1.0) for name, value in figures.items()}
        found |= {name.replace("_", " ").replace("momentum ", "momentum: "): value for name, value in changed.items()}
        return {
            f"seed={seed} 5-way 1-shot, {name}": (
                {"diverged": "DivergenceError"} if pair is None else run(pair[0], seed, pair[1])
            )
            for seed in range(settings.seeds)
            for name, pair in found.items()
        }

    order, above, speed, loses, floor = (
        "the order is MAML >= binomial, Krylov >= truncated >= first order",
        "binomial is above truncated at equal L",
        "multi-step(4) is twice as fast as MAML (0.55 of its time) at a loss of 0.1 points",
        "multi-step(8) loses at most 2.59 points",
        "binomial and Krylov of level 1, the same estimator, end within one point: the noise floor",
    )

    def answers(results):
        summary = catalogue.experiment("few-shot").summarise(settings, results)
        found = {claim.text: claim for claim in summary.claims}
        return summary, found, [found[text].answer for text in (order, above, speed, loses, floor)]

    summary, found, said = answers(rows())
    assert said == ["yes", "yes", "yes", "no", "yes"]
    assert found[above].starts == 3
    assert found[above].effect == "1.5 (1.5 to 1.5)"
    line = next(row for row in summary.tables[0].rows if row[0] == "binomial 1")
    assert line[1] == pytest.approx(79.5 + 1 + 5)  # the mean over starts and episodes
    assert line[3:5] == (-0.5, 0)
    assert line[2] > 5  # of three starts and three episodes that lie wide apart
    assert next(row for row in summary.tables[0].rows if row[0] == "multi-step 8")[1] == 0
    changed = rows(truncated_1=(79.2, 1.0), FOMAML=(82.0, 1.0), multi_step_4=(84.0, 1.0), krylov_1=(77.0, 1.0))
    changed |= {name.replace("multi step", "multi-step"): row for name, row in changed.items() if "multi step" in name}
    assert answers(changed)[2] == ["partly", "yes", "partly", "no", "no"]
    one = {name: row for name, row in rows().items() if name.startswith("seed=1")}
    assert answers(one)[2] == ["not decided"] * 5


@pytest.mark.parametrize(
    ("slow", "expected", "of_fast"),
    [
        ([1.0, 2.0, 3.0, 4.0], 20.0, 30.0),  # MAML has looked after 2 iterations when FOMAML ends, at 2 s
        ([0.5, 1.0, 2.0, 3.0], 40.0, 30.0),  # half way between its two looks, at 1 s and 3 s
        ([3.0, 4.0, 5.0, 6.0], None, 30.0),  # it has not looked yet
        ([0.5, 1.0, 1.2, 1.5], 60.0, 20.0),  # it is itself the fastest: the other is half way, at 1.5 s
    ],
)
def test_accuracies_in_equal_time_are_those_when_the_fastest_has_finished(slow, expected, of_fast):
    settings = replace(SETTINGS, episodes=2, seeds=1)

    def row(seconds, validation):
        return {"each": [50.0, 60.0], "seconds": seconds, "losses": [1.0], "after": [2, 4], "validation": validation}

    names = [unit.name for unit in few_shot.units(settings)]
    fast = next(name for name in names if name.endswith(" FOMAML"))
    exact = next(name for name in names if name.endswith("1-shot, MAML"))
    other = next(name for name in names if name.endswith("momentum: MAML"))  # of the other group: it does not count
    results = {
        fast: row([0.5, 1.0, 1.5, 2.0], [10.0, 30.0]),
        exact: row(slow, [20.0, 60.0]),
        other: row([0.1, 0.1, 0.1, 0.1], [70.0, 80.0]),
    }
    table = catalogue.experiment("few-shot").summarise(settings, results).tables[0]
    at = table.columns.index("in equal time [%]")
    found = {line[0]: line[at] for line in table.rows}
    assert found == {"MAML": expected, "FOMAML": of_fast, "momentum: MAML": 80.0}


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


@pytest.mark.parametrize(("shape", "side"), [((3, 4, 6, 6), 3), ((2, 5, 3, 8, 8), 2), ((9000, 1, 4, 4), 2)])
def test_images_are_averaged_down(shape, side):
    images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    factor = shape[-1] // side
    blocks = images.double().unflatten(-1, (side, factor)).unflatten(-3, (side, factor))
    expected = blocks.mean(dim=(-3, -1)).round().to(torch.uint8)
    assert torch.equal(image_sets.shrunk(images, side), expected)
    ragged = image_sets.shrunk(RaggedImages(images.flatten(0, 1), torch.tensor([1, shape[0] * shape[1] - 1])), side)
    assert torch.equal(ragged.flat, expected.flatten(0, 1))
    assert len(ragged) == 2


@pytest.mark.parametrize(
    ("name", "side", "expected"),
    [("omniglot", 0, 20), ("omniglot", 100, 20), ("omniglot", 16, 16), ("omniglot-vinyals", 17, 17), ("fc100", 16, 20)],
)
def test_the_side_of_omniglot_is_a_setting(monkeypatch, name, side, expected):
    small = image_sets.ImageSet("dots", 1, 20, lambda f, s, r: torch.zeros(4, 20, 20, 20, dtype=torch.uint8))
    monkeypatch.setitem(image_sets.SETS, name, small)
    validated, tested = few_shot.problem(replace(SETTINGS, dataset=name, side=side), 3, 1, Work(0))
    for draw in (validated.training, validated.evaluation, tested.evaluation):
        assert draw(1, torch.Generator()).query_inputs.shape[-3:] == (1, expected, expected)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_characters_of_vinyals_are_turned_in_every_split(monkeypatch, split):
    asked = []

    def load(folder, *, split, rotations=False):
        asked.append((split, rotations))
        return Omniglot(torch.zeros(2, 20, 28, 28, dtype=torch.uint8), ("a", "b"), ("c", "d"), ("file",))

    monkeypatch.setattr(Omniglot, "load", load)
    assert len(image_sets.load("omniglot-vinyals", split, None, rotations=True)) == 2
    assert asked == [(f"vinyals-{split}", True)]


def test_the_data_set_is_an_option(tmp_path, capsys):
    from diffopt.cli import main

    out = ["--out", str(tmp_path / "run")]
    assert main(["reproduce", "few-shot", "--quick", "--data-dir", str(tmp_path), "--dataset", "fc100", *out]) == 2
    assert "FC100" in capsys.readouterr().err
    assert main(["reproduce", "few-shot", "--quick", "--dataset", "nonsense", *out]) == 2
    assert "expected one of omniglot, omniglot-vinyals" in capsys.readouterr().err
    assert main(["reproduce", "few-shot", "--quick", "--scale", "nonsense", *out]) == 2
    assert "expected one of one, paper" in capsys.readouterr().err
    assert main(["reproduce", "bounds", "--quick", "--dataset", "omniglot", *out]) == 2
    assert "--set dataset=omniglot, expected SETTING=VALUE" in capsys.readouterr().err
    assert issubclass(DataError, DiffoptError)
