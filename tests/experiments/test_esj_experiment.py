"""The experiment ``esj``: its parts of the gradient beside plain loops, and its answers follow the numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from experiment_answers import answers
from torch.nn.functional import cross_entropy

from diffopt.estimators import FirstOrder, Reverse
from diffopt.experiments import esj
from diffopt.experiments.framework import catalogue
from diffopt.experiments.framework.unit_context import Work


@pytest.fixture
def problem():
    settings = replace(catalogue.experiment("esj").quick, steps=4)
    return esj.Embedding(settings, "linear", 0, Work(0))


def gradient(problem, rule, divided, episodes):
    loss = problem.outer_loss(rule, divided, episodes)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(problem.params.values()))])


def test_direct_part_and_response(problem):
    """Plain loops with the heads detached, and not."""
    episodes, s = problem.sample(), problem.settings
    direct, exact = (gradient(problem, rule, False, episodes) for rule in (FirstOrder(), Reverse()))

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
    fraction = gradient(problem, Reverse(), True, episodes)
    torch.testing.assert_close(fraction, direct + (exact - direct) / problem.count, rtol=1e-4, atol=1e-6)


def test_rules_see_the_same_tasks_and_new_directions(problem):
    again = esj.Embedding(problem.settings, "linear", 0, Work(0))
    assert all(torch.equal(a, b) for a, b in zip(problem.sample(), again.sample(), strict=True))
    episodes, (rule, _) = problem.sample(), esj.rules(problem.settings, Work(0))["ESJ, Q=1"]
    first, second = (gradient(problem, rule, False, episodes) for _ in range(2))
    assert not torch.allclose(first, second)


def test_answers_follow_the_numbers():
    settings = replace(catalogue.experiment("esj").quick, seeds=3, target=1.0)
    of_esj = {"ESJ, Q=1, divided by p": 0.81, "ESJ, Q=1": 0.9}
    finals = {"ITD": 0.5, "direct part only": 0.8, "AID, 10 CG": 0.9, **of_esj}
    faster = "ESJ is faster than back-propagation (ITD) and implicit differentiation (AID) to a given loss"
    cheaper = "without second-order information an iteration is cheaper"
    like = "with the authors' scale, ESJ trains like the direct part alone (final loss within 5 %)"
    worth = "the response is worth having: ITD ends below the direct part alone"
    follows = "the error is sqrt((p + 1) / Q) times the response (within a factor of 2)"

    def said(times, error):
        results = {}
        for unit in esj.units(settings):
            rule = unit.keys.get("rule")
            if rule is None:
                of = {f"ESJ, Q={q}": {"error": error * (100 / q) ** 0.5, "cosine": 0.1} for q in (1, 4)}
                results[unit.name] = {"parameters": 99, "response": 0.5, "rules": of}
                continue
            scale = times[rule.startswith("ESJ")] * (1 + 0.01 * unit.keys["seed"])
            losses = [2.0] * 20 + [finals[rule]] * 20
            results[unit.name] = {"losses": losses, "seconds": [scale * i for i in range(40)]}
        claims = answers(catalogue.experiment("esj").summarise(settings, results))
        return [claims[text] for text in (faster, cheaper, like, worth, follows)]

    assert said((2.0, 1.0), 0.5) == ["yes"] * 5
    finals["direct part only"] = 0.4
    assert said((1.0, 2.0), 2.0) == ["no"] * 5
