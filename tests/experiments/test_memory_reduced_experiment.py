"""The memory-reduced algorithm and its rivals, against plain autograd; its answers follow the numbers."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from experiment_answers import gone_on
from torch.autograd.functional import hessian
from torch.nn.functional import cross_entropy, linear

from diffopt.experiments import memory_reduced
from diffopt.experiments import memory_reduced_deterministic as deterministic
from diffopt.experiments.framework import catalogue
from diffopt.experiments.framework.run_folder import json_row
from diffopt.experiments.framework.unit_context import Work
from diffopt.experiments.memory_reduced_problem import FORMS, Shared, Warm

SETTINGS = catalogue.experiment("memory-reduced").quick


def task_of(problem, number=0):
    return tuple(side[number] for side in problem.tasks)


def gradients(problem, method):
    return [x.grad if x.grad is not None else torch.zeros_like(x) for x in problem.params(method).values()]


def plain(problem, method, steps):
    """The gradient of the outer loss through an unrolled loop."""
    inputs, labels, queries, wanted = task_of(problem)
    params, s = problem.params(method), problem.settings
    body = {name.removeprefix("body "): x for name, x in params.items() if name.startswith("body")}
    head = problem.learned_head if method in ("ANIL", "MAML") else problem.zero_head
    head = {name: x if x.requires_grad else x.clone().requires_grad_() for name, x in head.items()}
    now = {**head, **body} if method == "MAML" else dict(head)
    for _ in range(steps):
        features = problem.embed({name: now.get(name, x) for name, x in body.items()}, inputs)
        loss = cross_entropy(linear(features, now["weight"], now["bias"]), labels)
        if method != "MAML":
            loss = loss + s.decay / 2 * sum(x.square().sum() for x in now.values())
        slopes = torch.autograd.grad(loss, list(now.values()), create_graph=True)
        lr = s.maml_lr if method == "MAML" else s.lr
        now = {name: x - lr * g for (name, x), g in zip(now.items(), slopes, strict=True)}
    features = problem.embed({name: now.get(name, x) for name, x in body.items()}, queries)
    loss = cross_entropy(linear(features, now["weight"], now["bias"]), wanted)
    return loss, list(torch.autograd.grad(loss, list(params.values()))), {k: now[k].detach() for k in head}


@pytest.mark.parametrize("method", ["ITD-BiO", "ANIL", "MAML"])
def test_the_rivals_are_plain_loops(method):
    problem = Shared(SETTINGS, Work(0))
    loss, expected, _ = plain(problem, method, 3)
    assert problem.backward(method, FORMS[0], 3, task_of(problem), 0.5, None) == pytest.approx(loss.item(), rel=1e-4)
    for found, exact in zip(gradients(problem, method), expected, strict=True):
        torch.testing.assert_close(found, 0.5 * exact, rtol=1e-3, atol=1e-5)  # float32, normalised features


@pytest.mark.parametrize("form", FORMS)
def test_at_the_minimum_ours_is_the_gradient_through_all_steps(form):
    problem = Shared(replace(SETTINGS, products=20, decay=0.3, lr=0.4), Work(0))
    loss, expected, head = plain(problem, "ITD-BiO", 120)  # strongly convex: 120 steps come to the minimum
    warm = Warm(*({name: torch.zeros_like(x) for name, x in head.items()} for _ in range(2)))
    found = problem.backward("ours, warm", form, 120, task_of(problem), 0.5, warm)
    assert found == pytest.approx(loss.item(), rel=1e-4)
    for mine, exact in zip(gradients(problem, "ours, warm"), expected, strict=True):
        torch.testing.assert_close(mine, 0.5 * exact, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(warm.head, head, rtol=1e-4, atol=1e-5)
    # the multiplier is kept without the task's weight: the system's solution, by an explicit Hessian
    inner, args = problem.inner(FORMS[0], *task_of(problem)[:2])
    names = list(head)

    def flat_loss(vector):
        parts = vector.split([head[name].numel() for name in names])
        return inner({name: x.reshape(head[name].shape) for name, x in zip(names, parts, strict=True)}, *args)

    point = torch.cat([head[name].flatten() for name in names])
    outer = torch.func.grad(
        lambda h: cross_entropy(
            problem.logits(h, problem.embed(problem.body, task_of(problem)[2])), task_of(problem)[3]
        )
    )
    right_side = torch.cat([outer(head)[name].flatten() for name in names])
    solution = torch.linalg.solve(hessian(flat_loss, point), right_side)
    mine = torch.cat([warm.multiplier[name].flatten() for name in names])
    torch.testing.assert_close(mine, solution, rtol=1e-3, atol=1e-4)


def test_warm_runs_go_on_to_the_last_bit(tmp_path):
    whole = memory_reduced.learn(SETTINGS, "ours, warm", 0, Work(0))
    again = gone_on(tmp_path, 2, memory_reduced.learn, SETTINGS, "ours, warm", 0)
    assert [again[key] for key in ("losses", "accuracy")] == [whole[key] for key in ("losses", "accuracy")]
    cold = memory_reduced.learn(SETTINGS, "ours, cold", 0, Work(0))
    assert cold["losses"][0] == whole["losses"][0]
    assert cold["losses"] != whole["losses"]


@pytest.mark.slow
def test_memory_is_measured_and_flat():
    row, deep = (memory_reduced.measure(SETTINGS, steps, Work(0)) for steps in (1, 6))
    for form in FORMS:
        assert deep[form]["ours, warm"]["megabytes"] == pytest.approx(row[form]["ours, warm"]["megabytes"], rel=0.05)
        assert deep[form]["MAML"]["megabytes"] > 2 * row[form]["MAML"]["megabytes"]


def at_embedding(w, x, y, h):
    return deterministic.inner_loss(h, w, x, y)


def along(h, v, x, y, w):
    return (torch.func.grad(deterministic.inner_loss)(h, w, x, y) * v).sum()


class TestDeterministic:
    @pytest.fixture
    def tasks(self):
        generator = torch.Generator().manual_seed(0)

        def side():
            return torch.randn(6, 5, generator=generator, dtype=torch.float64), torch.arange(6) % 3

        return [(*side(), *side()) for _ in range(deterministic.TASKS)]

    def test_the_true_gradient_is_that_of_differences(self, tasks):
        generator = torch.Generator().manual_seed(1)
        point, direction = (
            torch.randn(5, deterministic.FEATURES, generator=generator, dtype=torch.float64) for _ in range(2)
        )

        def value(embedding):
            heads = [deterministic.minimiser(embedding, x, y) for x, y, _, _ in tasks]
            losses = [deterministic.outer_loss(h, embedding, *t[2:]) for h, t in zip(heads, tasks, strict=True)]
            return sum(losses) / len(tasks)

        difference = (value(point + 1e-5 * direction) - value(point - 1e-5 * direction)) / 2e-5
        found = (deterministic.true_gradient(point, tasks) * direction).sum()
        assert float(found) == pytest.approx(float(difference), rel=1e-7)  # central differences: 1e-10 and round-off

    @pytest.mark.parametrize("warm", [True, False])
    def test_it_descends_as_the_formulas_say(self, warm, monkeypatch, tasks):
        """Two steps, one iteration of conjugate gradients (from ``v``: along the residual), one mixed product."""
        monkeypatch.setattr(deterministic, "sample_episodes", lambda images, **sizes: stacked)
        monkeypatch.setattr(deterministic, "avg_pool2d", lambda x, size: x)
        stacked = tuple(torch.stack(side) for side in zip(*tasks, strict=True))
        row = deterministic.descend(3, False, warm, Work(0))
        start = torch.randn(5, deterministic.FEATURES, generator=Work(0).generator("embedding"), dtype=torch.float64)
        w, losses = 0.3 * start, []
        cold = torch.zeros(deterministic.FEATURES + 1, deterministic.WAY, dtype=torch.float64)
        heads, multipliers = [cold] * len(tasks), [cold] * len(tasks)
        for _ in range(3):
            total, loss = torch.zeros_like(w), 0.0
            for i, (x, y, query, wanted) in enumerate(tasks):
                h, v = (heads[i], multipliers[i]) if warm else (cold, cold)
                for _ in range(2):
                    h = h - deterministic.LR * torch.func.grad(deterministic.inner_loss)(h, w, x, y)
                loss += float(deterministic.outer_loss(h, w, query, wanted)) / len(tasks)
                b, direct = torch.func.grad(deterministic.outer_loss, argnums=(0, 1))(h, w, query, wanted)
                matrix = hessian(partial(at_embedding, w, x, y), h).reshape(h.numel(), h.numel())
                r = b.flatten() - matrix @ v.flatten()
                v = v + ((r @ r) / (r @ matrix @ r) * r).reshape(v.shape)
                mixed = torch.func.grad(partial(along, h, v, x, y))(w)
                total = total + (direct - mixed) / len(tasks)
                heads[i], multipliers[i] = h, v
            losses.append(loss)
            w = w - deterministic.OUTER_LR * total
        assert row["losses"] == pytest.approx(losses, rel=1e-10)  # float64
        assert row["after"] == [0, 1, 2, 3]
        assert row["gradient"][-1] == pytest.approx(float(deterministic.true_gradient(w, tasks).norm()), rel=1e-7)


@pytest.mark.slow
def test_answers_follow_the_numbers():
    units = catalogue.experiment("memory-reduced").units(SETTINGS)
    rows = {unit.name: json_row(unit.name, unit.run(Work(0))) for unit in units if "memory" in unit.name}
    run = {"losses": [1.0], "seconds": [2.0], "each": [70.0, 80.0, 90.0]}
    descent = {"losses": [1.0], "gradient": [1.0, 1e-3, 1e-6]}
    for seed in range(SETTINGS.seeds):
        rows[f"deterministic, warm, seed {seed}"] = copy.deepcopy(descent)
        rows[f"deterministic, cold, seed {seed}"] = {**descent, "gradient": [1.0, 0.1, 0.1]}
        for method in memory_reduced.METHODS:
            each = [x + seed - (method == "ANIL") for x in run["each"]]
            rows[f"{method}, seed {seed}"] = {**run, "each": each, "seconds": [4.0 - ("ours" in method)]}
    texts = (
        "memory does not grow with the number of inner steps K (up to 5 %)",
        f"it saves more than half of the memory of MAML, ANIL and ITD-BiO ({FORMS[1]})",
        "its accuracy is at least that of MAML, ANIL and ITD-BiO after as many iterations",
        "it takes less time for as many iterations",
        "with sampled tasks, warm starts train no worse than cold ones (up to one point)",
        "with K and N constant, the deterministic case converges to a stationary point",
        "that takes warm starts: from cold ones the gradient stalls (it ends 100 times larger)",
    )

    def answers():
        summary = catalogue.experiment("memory-reduced").summarise(SETTINGS, rows)
        found = {claim.text: claim for claim in summary.claims}
        return [found[text].answer for text in texts], found

    for steps in SETTINGS.memory_steps:
        for method, row in rows[f"memory K={steps}"][FORMS[1]].items():
            row["megabytes"] = 1.0 if method == "ours, warm" else 3.0
    said, found = answers()
    assert said == ["yes"] * 7
    assert found[texts[2]].starts == 2
    assert found[texts[4]].effect == "0 (0 to 0) points"
    assert "MAML: 67 to 67 %" in found[texts[1]].evidence
    rows["memory K=4"][FORMS[1]]["ours, warm"]["megabytes"] = 2.0
    for seed in range(SETTINGS.seeds):
        rows[f"MAML, seed {seed}"] |= {"each": [80.0 + seed, 90.0 + seed, 100.0 + seed], "seconds": [1.0]}
        rows[f"deterministic, warm, seed {seed}"]["gradient"] = [1.0, 1e-2, 1e-2]
    rows["ours, cold, seed 1"]["each"] = [90.0, 90.0, 99.0]
    assert answers()[0] == ["partly", "partly", "partly", "partly", "not decided", "no", "no"]
