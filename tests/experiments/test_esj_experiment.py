"""The experiment ``esj``: its parts of the gradient beside plain loops, and its answers follow the numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from experiment_answers import answers
from torch.nn.functional import cross_entropy

from diffopt.adjoint import perturbation
from diffopt.estimators import FirstOrder, Reverse
from diffopt.experiments import esj
from diffopt.experiments.framework import catalogue
from diffopt.experiments.framework.unit_context import Work


@pytest.fixture
def problem():
    settings = replace(catalogue.experiment("esj").quick, steps=4)
    return esj.Embedding(settings, "linear", 0, Work(0))


def gradient(problem, method, episodes):
    leaves = list(problem.leaves(method).values())
    loss = problem.outer_loss(method, episodes)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves, materialize_grads=True)])


def test_direct_part_and_response(problem):
    """Plain loops with the heads detached, and not."""
    episodes, s = problem.sample(), problem.settings
    direct, exact = (gradient(problem, esj.Method(method), episodes) for method in (FirstOrder(), Reverse()))

    def plain(detached):
        total = 0.0
        for x, y, query_x, query_y in zip(*episodes, strict=True):
            head, velocity = problem.head.clone().requires_grad_(), 0.0
            features = torch.relu(problem.apply(problem.params, x.flatten(1)))
            for _ in range(s.steps):
                loss = cross_entropy(features @ head[:-1] + head[-1], y) + s.decay / 2 * head.square().sum()
                velocity = 0.9 * velocity + torch.autograd.grad(loss, head, create_graph=True)[0]
                head = head - s.lr * velocity
            head = head.detach() if detached else head
            features = torch.relu(problem.apply(problem.params, query_x.flatten(1)))
            total = total + cross_entropy(features @ head[:-1] + head[-1], query_y) / len(episodes[0])
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(problem.params.values()))])

    torch.testing.assert_close(direct, plain(True), rtol=1e-4, atol=1e-6)  # float32
    torch.testing.assert_close(exact, plain(False), rtol=1e-4, atol=1e-6)
    fraction = gradient(problem, esj.Method(Reverse(), divided=True), episodes)
    torch.testing.assert_close(fraction, direct + (exact - direct) / problem.count, rtol=1e-4, atol=1e-6)
    once = gradient(problem, esj.Method(Reverse(), once=True), episodes)
    torch.testing.assert_close(once, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["ANIL", "MAML"])
def test_the_rivals_are_plain_loops(problem, name):
    episodes, s = problem.sample(), problem.settings
    with torch.no_grad():  # a head of zeros has no gradient for the embedding
        problem.learned_head.add_(0.3 * torch.randn(problem.head.shape, generator=torch.Generator().manual_seed(1)))
    found = gradient(problem, esj.methods(s, Work(0))[name], episodes)
    leaves = [*problem.params.values(), problem.learned_head]
    total = 0.0
    for x, y, query_x, query_y in zip(*episodes, strict=True):
        body, head, velocity = dict(problem.params), problem.learned_head, 0.0
        for _ in range(s.steps):
            features = torch.relu(problem.apply(body, x.flatten(1)))
            loss = cross_entropy(features @ head[:-1] + head[-1], y)
            if name == "ANIL":
                loss = loss + s.decay / 2 * head.square().sum()
                velocity = 0.9 * velocity + torch.autograd.grad(loss, head, create_graph=True)[0]
                head = head - s.lr * velocity
                continue
            slopes = torch.autograd.grad(loss, [*body.values(), head], create_graph=True)
            body = {key: v - s.maml_lr * g for (key, v), g in zip(body.items(), slopes, strict=False)}
            head = head - s.maml_lr * slopes[-1]
        features = torch.relu(problem.apply(body, query_x.flatten(1)))
        total = total + cross_entropy(features @ head[:-1] + head[-1], query_y) / len(episodes[0])
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(total, leaves)])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)  # float32


def test_features_once_are_what_is_perturbed(problem, monkeypatch):
    """By forward differences of the head alone: as many rollouts as directions, of so many numbers."""
    episodes, sizes = problem.sample(), []
    group = perturbation.Group.rolled_out
    monkeypatch.setattr(
        perturbation.Group, "rolled_out", lambda self, moves: (sizes.append(moves.shape), group(self, moves))[1]
    )
    methods = esj.methods(replace(problem.settings, directions=(3,)), Work(0))
    gradient(problem, methods["ESJ, Q=3, features once"], episodes)
    assert [(size[0], size[-1]) for size in sizes] == [(3, 5 * 4)]  # five images of four features
    sizes.clear()
    gradient(problem, methods["ESJ, Q=1, forward"], episodes)
    assert [(size[0], size[-1]) for size in sizes] == [(1, problem.count)]


def test_features_once_estimate_the_response(problem):
    """So many directions that the noise is a small part: the error is far below that of leaving it out."""
    episodes = problem.sample()
    direct, exact = (gradient(problem, esj.Method(method), episodes) for method in (FirstOrder(), Reverse()))
    methods = esj.methods(replace(problem.settings, directions=(2000,), radius=1e-2), Work(0))
    found = gradient(problem, methods["ESJ, Q=2000, features once"], episodes)
    assert (found - exact).norm() < 0.3 * (direct - exact).norm()


def test_rules_see_the_same_tasks_and_new_directions(problem):
    again = esj.Embedding(problem.settings, "linear", 0, Work(0))
    assert all(torch.equal(a, b) for a, b in zip(problem.sample(), again.sample(), strict=True))
    episodes, method = problem.sample(), esj.methods(problem.settings, Work(0))["ESJ, Q=1"]
    first, second = (gradient(problem, method, episodes) for _ in range(2))
    assert not torch.allclose(first, second)


def test_the_deep_embedding_is_a_residual_network_on_larger_images():
    settings = catalogue.experiment("esj").quick
    deep = esj.Embedding(settings, esj.DEEP, 0, Work(0))
    episodes = deep.sample()
    assert len(episodes[0]) == 1
    assert episodes[0].shape[-2:] == (14, 14)  # smaller than the network takes
    assert deep.features(deep.params, episodes[0][0]).shape == (5, 64)
    once, exact = (gradient(deep, esj.Method(Reverse(), once=once), episodes) for once in (True, False))
    torch.testing.assert_close(once, exact, rtol=1e-3, atol=1e-5)  # float32, normalised twelve times


def test_a_step_of_the_deep_embedding_is_measured_by_each_rule_that_is_worth_it():
    settings = replace(catalogue.experiment("esj").quick, directions=(1, 10))
    units = [unit for unit in esj.units(settings) if unit.keys["embedding"] == esj.DEEP]
    names = {unit.keys["estimator"] for unit in units}
    assert names == {*esj.methods(settings, Work(0))} - {"ESJ, Q=1", "ESJ, Q=10", "ESJ, Q=1, divided by p"}
    assert len(units) == settings.seeds * len(names)
    for name in ("MAML", "ESJ, Q=1, features once"):
        row = esj.step(settings, name, 0, Work(0))
        assert row["parameters"] == esj.Embedding(settings, esj.DEEP, 0, Work(0)).count
        assert row["step"] > 0
        assert row["megabytes"] > 0
    none = replace(settings, deep_side=0)
    assert not any(unit.keys["embedding"] == esj.DEEP for unit in esj.units(none))


def test_answers_follow_the_numbers():
    settings = replace(catalogue.experiment("esj").quick, seeds=3, target=1.0)
    finals = {
        "ITD": 0.5,
        "direct part only": 0.8,
        "ESJ, Q=1, divided by p": 0.81,
        "ESJ, Q=1": 0.9,
        "AID, 10 CG": 0.9,
    }
    rest = dict.fromkeys(("ITD, features once", "AID, features once", "ANIL", "MAML"), 0.5)
    finals |= {**rest, "ESJ, Q=1, forward": 0.9, "ESJ, Q=1, features once": 0.9}
    rivals = "ESJ is faster than MAML and ANIL to a given loss"
    steps = [
        f"one outer step of a ResNet-12 takes less time by ESJ than by {of}"
        for of in ("MAML and by ANIL", "ITD and AID")
    ]
    later = "ESJ, in a form that is not scaled down, comes to a given loss no later than without any response"
    faster = "ESJ is faster than back-propagation (ITD) and implicit differentiation (AID) to a given loss"
    cheaper = "without second-order information an iteration is cheaper"
    like, worth = (
        "with the authors' scale, ESJ trains like the direct part alone (final loss within 5 %)",
        "the response is worth having: ITD ends below the direct part alone",
    )
    follows = "the error is sqrt((p + 1) / Q) times the response (within a factor of 2)"

    def said(times, error):
        results = {}
        for unit in esj.units(settings):
            method = unit.keys.get("estimator")
            if method is None:
                of = {f"ESJ, Q={q}": {"error": error * (100 / q) ** 0.5, "cosine": 0.1} for q in (1, 4)}
                results[unit.name] = {"parameters": 99, "response": 0.5, "rules": of}
                continue
            if unit.keys["embedding"] == esj.DEEP:
                results[unit.name] = {
                    "step": times[not method.startswith("ESJ")] + 0.01 * unit.keys["seed"],
                    "megabytes": 1,
                }
                continue
            scale = times[method.startswith("ESJ")] * (1 + 0.01 * unit.keys["seed"])
            losses = [2.0] * 20 + [finals[method]] * 20
            results[unit.name] = {"losses": losses, "seconds": [scale * i for i in range(40)]}
        claims = answers(catalogue.experiment("esj").summarise(settings, results))
        return [claims[text] for text in (rivals, later, faster, cheaper, like, worth, follows, *steps)]

    assert said((2.0, 1.0), 0.5) == ["yes"] * 7 + ["no"] * 2
    finals["direct part only"] = 0.4
    assert said((1.0, 2.0), 2.0) == ["no"] * 7 + ["yes"] * 2
