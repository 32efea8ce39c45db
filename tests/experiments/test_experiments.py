"""What the experiments compute, against plain loops and explicit matrices; their answers follow the numbers."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from diffopt.adjoint import perturbation
from diffopt.estimators import FirstOrder, Reverse
from diffopt.experiments import anil, anil_report, bounds, cost, esj, sinusoid
from diffopt.experiments.framework import catalogue
from diffopt.experiments.framework.outer_loop import first_below, smoothed
from diffopt.experiments.framework.run_folder import json_row
from diffopt.experiments.framework.unit_context import OutOfTime, Work
from diffopt.tasks import MLP, Sinusoid, functional, sample_episodes


def rows(name, settings):
    units = catalogue.experiment(name).units(settings)
    return {unit.name: json_row(unit.name, unit.run(Work(0))) for unit in units}


def answers(summary):
    return {claim.text: claim.answer for claim in summary.claims}


class TestBounds:
    def product(self, factors):
        return np.linalg.multi_dot([np.eye(2), *factors, np.eye(2)])

    @pytest.mark.parametrize("level", range(4))
    def test_errors_are_those_of_explicit_products(self, level):
        settings = bounds.Settings(dimension=2, draws=3)
        lows = torch.full((3,), -0.7, dtype=torch.float64)
        sequences = bounds.random_hessians(settings, lows, 0.7, torch.Generator().manual_seed(0))
        found = bounds.errors(sequences, level)
        for i, sequence in enumerate(sequences):
            steps = [np.eye(2) - bounds.LR * h.numpy() for h in sequence]
            curved = [-bounds.LR * h.numpy() for h in sequence]
            exact = self.product(steps)
            subsets = [[c if s >> k & 1 else np.eye(2) for k, c in enumerate(curved)] for s in range(8)]
            expansion = sum(self.product(s) for k, s in enumerate(subsets) if k.bit_count() <= level)
            expected = {
                "first-order": np.eye(2) - exact,
                "truncated": self.product(steps[3 - level :] or [np.eye(2)]) - exact,
                "binomial": expansion - exact,
            }
            for name, matrix in expected.items():
                # products of three matrices of norm below 2
                assert found[name][i] == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-12, abs=1e-14)

    def test_random_curvature_stays_within_its_bounds_and_reaches_them(self):
        lows = torch.tensor([-0.5, 0.1], dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        sequences = bounds.random_hessians(bounds.Settings(draws=40), lows, 0.5, generator)
        values = torch.linalg.eigvalsh(sequences) * bounds.LR
        assert values.amax().item() == pytest.approx(0.5)
        assert values[:, 0].amin().item() == pytest.approx(-0.5)
        assert values[:, 1].amin().item() == pytest.approx(0.1)

    def test_the_counterexample(self):
        row = bounds.turn(bounds.Settings(turning_curvatures=2), 4, Work(0))
        assert row["curvatures"] == [0.5, 1.0]
        # four projections turned by a sixth of a circle each: 1 + cos(60 degrees)**3, if no other angle is worse
        assert row["error"][1] >= 1 + math.cos(math.pi / 3) ** 3 - 1e-12
        assert row["claimed (12a)"] == pytest.approx([1 - 0.5**4, 1])
        assert row["error"][1] <= row["proposition 4.1"][1] == pytest.approx(8 / 5)

    def test_bounds_by_hand(self):
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

    def test_answers_follow_the_numbers(self):
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


class TestSinusoid:
    def test_errors_are_those_of_plain_loops(self):
        settings = sinusoid.Settings((3,), (0.05,), batches=1, tasks=2, hidden=4)
        row = sinusoid.measure(settings, 3, 0.05, Work(0))
        generator = Work(0).generator("start")
        apply, params = functional(MLP((1, 4, 4, 1), generator=generator).double())
        waves = Sinusoid().sample(2, Work(0).generator("tasks"), dtype=torch.float64)

        def gradient(wave, detached):
            """The meta-gradient, the first ``detached`` steps a constant added to the start."""
            x, y, query_x, query_y = wave
            start = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
            now = start
            for step in range(3):
                loss = (apply(now, x) - y).square().mean()
                slopes = torch.autograd.grad(loss, list(now.values()), create_graph=True)
                slopes = [s.detach() if step < detached else s for s in slopes]
                now = {name: value - 0.05 * s for (name, value), s in zip(now.items(), slopes, strict=True)}
            loss = (apply(now, query_x) - query_y).square().mean()
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(start.values()))])

        tasks = list(zip(*waves, strict=True))
        for name, level, detached in (("first-order", "0", 3), ("truncated", "1", 2), ("truncated", "2", 1)):
            expected = sum((gradient(t, detached) - gradient(t, 0)).norm().item() for t in tasks) / 2
            # float64, differences of gradients of norm 1 to 10
            assert row["errors"][name][level] == [pytest.approx(expected, rel=1e-9)]
        norm = sum(gradient(t, 0).norm().item() for t in tasks) / 2
        assert row["norm"] == [pytest.approx(norm, rel=1e-12)]

    def test_levels_and_windows(self):
        assert sinusoid.levels(5) == [0, 1, 2, 3, 4]
        assert sinusoid.levels(20) == [0, 1, 2, 3, 4, 6, 8, 10, 12, 16, 19]
        assert (sinusoid.hybrid_window(5), sinusoid.hybrid_window(10)) == (4, 8)
        assert "hybrid" not in sinusoid.rules(5, 5)


class TestCost:
    @pytest.mark.slow
    def test_counts_are_the_papers(self):
        settings = replace(catalogue.experiment("cost").quick, levels_steps=4, steps=(), filters=1, seeds=1)
        (row,) = rows("cost", settings).values()
        measured = row["rules"]
        for level in range(5):
            truncated, binomial = measured[f"truncated {level}"], measured[f"binomial {level}"]
            assert (truncated["products"], truncated["depth"]) == (level, level)
            assert (binomial["products"], binomial["depth"]) == (level * (4 - level + 1) if level < 4 else 4, level)
        assert measured["MAML"]["products"] == measured["MAML"]["depth"] == 4
        assert measured["binomial, one by one 2"]["depth"] == 6

    def test_answers_follow_the_numbers(self):
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
                rules = cost.level_rules(2) if over else cost.step_rules(unit.keys["K"])
                of = {name: seconds.get(re.sub(r"\W", "_", name), 1.0) * noise for name in rules}
                size = {name: 1.0 if name in ("MAML", "first-order") else 0.5 * value for name, value in of.items()}
                counts = {"gradients": 1, "products": 1, "depth": 1}
                both = {name: {**counts, "seconds": of[name], "megabytes": size[name] / noise} for name in rules}
                results[unit.name] = {"rules": both}
            found = answers(catalogue.experiment("cost").summarise(settings, results))
            return [found[text] for text in texts]

        falls = {"multi_step_2": 0.9, "multi_step_4": 0.5, "multi_step_8": 0.3}
        assert said(binomial_1=1.2, implicit__5_CG=1.5, **falls) == ["yes"] * 6
        slow = {"multi_step_2": 1.1, "multi_step_4": 1.7, "multi_step_8": 2.3}
        assert said(binomial_1=2.0, binomial_2=2.0, implicit__5_CG=0.5, **slow)[:5] == [
            "no",
            "no",
            "no",
            "partly",
            "no",
        ]

    def test_windows_are_counted(self):
        assert [rule for rule in cost.step_rules(4) if rule.startswith("multi")] == ["multi-step 2", "multi-step 4"]


class TestAnil:
    @pytest.mark.parametrize("layers", [1, 2])
    def test_it_trains_as_a_plain_loop_does(self, layers):
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

    def test_it_stops_and_goes_on_to_the_last_bit(self, tmp_path):
        settings = replace(catalogue.experiment("anil").quick, iterations=6)
        whole = anil.run(settings, 1, 0.5, 2, 0, Work(0))
        stopped = Work(0, unit="x", store=tmp_path / "x.pt", deadline=0.0)  # out of time after every iteration
        for _ in range(5):
            with pytest.raises(OutOfTime):
                anil.run(settings, 1, 0.5, 2, 0, stopped)
        assert anil.run(settings, 1, 0.5, 2, 0, stopped)["losses"] == whole["losses"]

    STEPS = (1, 3, 5, 10)

    def said(self, head, several, starts=3):
        """The answers where every start has these losses by N, one rate, both numbers of layers; 9 iterations each."""
        settings = replace(catalogue.experiment("anil").quick, steps=self.STEPS, seeds=starts, rates=(1.0,), target=0.5)
        results = {}
        for unit in anil.units(settings):
            losses = head if unit.keys["layers"] == 1 else several
            loss = losses[self.STEPS.index(unit.keys["N"])]
            run = {"losses": [2.0] * 8 + [loss], "seconds": [float(i) for i in range(9)], "curvature": 0.5}
            results[unit.name] = {"diverged": "DivergenceError"} if math.isinf(loss) else run
        return answers(catalogue.experiment("anil").summarise(settings, results))

    def test_answers_follow_the_numbers(self):
        first, second = "strongly convex: more inner steps converge faster per iteration", "and then it saturates"
        slower = "non-convex: more inner steps converge more slowly per iteration"
        opposite = "so the two geometries have opposite trends, at one inner step size"
        said = self.said((1.0, 0.8, 0.75, 0.7), (0.7, 0.8, 0.9, 1.0))
        assert [said[text] for text in (first, second, slower, opposite)] == ["yes"] * 4
        said = self.said((1.0, 1.1, 1.2, 1.3), (1.0, 0.9, 0.8, 0.7))
        assert [said[text] for text in (first, second, slower, opposite)] == ["no"] * 4
        said = self.said((1.0, 0.8, 0.75, 0.7), (0.7, 0.8, 0.9, 1.0), starts=1)
        assert [said[text] for text in (first, second, slower)] == ["not decided"] * 3

    @pytest.mark.parametrize("last", [10.0, 1e6, math.inf])
    def test_a_loss_that_diverges_does_not_saturate(self, last):
        said = self.said((1.0, 0.8, 0.75, last), (0.7, 0.8, 0.9, last))
        assert said["and then it saturates"] == "no"

    def test_saturation(self):
        assert anil_report.saturation((1, 3, 5), (3.0, 1.0, 0.5)) == 0.25
        assert anil_report.saturation((1, 3, 5), (3.0, 1.0, 1.5)) == 0.25
        assert anil_report.saturation((1, 3, 5), (1.0, 3.0, 2.9)) == math.inf
        assert anil_report.saturation((1, 3), (3.0, 1.0)) is None


class TestESJ:
    @pytest.fixture
    def problem(self):
        settings = replace(catalogue.experiment("esj").quick, steps=4)
        return esj.Embedding(settings, "linear", 0, Work(0))

    def gradient(self, problem, rule, episodes):
        leaves = list(problem.leaves(rule).values())
        loss = problem.outer_loss(rule, episodes)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves, materialize_grads=True)])

    def test_direct_part_and_response(self, problem):
        """Plain loops with the heads detached, and not."""
        episodes, s = problem.sample(), problem.settings
        direct, exact = (self.gradient(problem, esj.Rule(rule), episodes) for rule in (FirstOrder(), Reverse()))

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
        fraction = self.gradient(problem, esj.Rule(Reverse(), divided=True), episodes)
        torch.testing.assert_close(fraction, direct + (exact - direct) / problem.count, rtol=1e-4, atol=1e-6)
        once = self.gradient(problem, esj.Rule(Reverse(), once=True), episodes)
        torch.testing.assert_close(once, exact, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("name", ["ANIL", "MAML"])
    def test_the_rivals_are_plain_loops(self, problem, name):
        episodes, s = problem.sample(), problem.settings
        with torch.no_grad():  # a head of zeros has no gradient for the embedding
            problem.learned_head.add_(0.3 * torch.randn(problem.head.shape, generator=torch.Generator().manual_seed(1)))
        found = self.gradient(problem, esj.rules(s, Work(0))[name], episodes)
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

    def test_features_once_are_what_is_perturbed(self, problem, monkeypatch):
        """By forward differences of the head alone: as many rollouts as directions, of so many numbers."""
        episodes, sizes = problem.sample(), []
        group = perturbation.Group.rolled_out
        monkeypatch.setattr(
            perturbation.Group, "rolled_out", lambda self, moves: (sizes.append(moves.shape), group(self, moves))[1]
        )
        rules = esj.rules(replace(problem.settings, directions=(3,)), Work(0))
        self.gradient(problem, rules["ESJ, Q=3, features once"], episodes)
        assert [(size[0], size[-1]) for size in sizes] == [(3, 5 * 4)]  # five images of four features
        sizes.clear()
        self.gradient(problem, rules["ESJ, Q=1, forward"], episodes)
        assert [(size[0], size[-1]) for size in sizes] == [(1, problem.count)]

    def test_features_once_estimate_the_response(self, problem):
        """So many directions that the noise is a small part: the error is far below that of leaving it out."""
        episodes = problem.sample()
        direct, exact = (self.gradient(problem, esj.Rule(rule), episodes) for rule in (FirstOrder(), Reverse()))
        rules = esj.rules(replace(problem.settings, directions=(2000,), radius=1e-2), Work(0))
        found = self.gradient(problem, rules["ESJ, Q=2000, features once"], episodes)
        assert (found - exact).norm() < 0.3 * (direct - exact).norm()

    def test_rules_see_the_same_tasks_and_new_directions(self, problem):
        again = esj.Embedding(problem.settings, "linear", 0, Work(0))
        assert all(torch.equal(a, b) for a, b in zip(problem.sample(), again.sample(), strict=True))
        episodes, rule = problem.sample(), esj.rules(problem.settings, Work(0))["ESJ, Q=1"]
        first, second = (self.gradient(problem, rule, episodes) for _ in range(2))
        assert not torch.allclose(first, second)

    def test_answers_follow_the_numbers(self):
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
                rule = unit.keys.get("rule")
                if rule is None:
                    of = {f"ESJ, Q={q}": {"error": error * (100 / q) ** 0.5, "cosine": 0.1} for q in (1, 4)}
                    results[unit.name] = {"parameters": 99, "response": 0.5, "rules": of}
                    continue
                scale = times[rule.startswith("ESJ")] * (1 + 0.01 * unit.keys["seed"])
                losses = [2.0] * 20 + [finals[rule]] * 20
                results[unit.name] = {"losses": losses, "seconds": [scale * i for i in range(40)]}
            claims = answers(catalogue.experiment("esj").summarise(settings, results))
            return [claims[text] for text in (rivals, later, faster, cheaper, like, worth, follows)]

        assert said((2.0, 1.0), 0.5) == ["yes"] * 7
        finals["direct part only"] = 0.4
        assert said((1.0, 2.0), 2.0) == ["no"] * 7


def test_smoothing_and_first_below():
    assert smoothed([3.0, 0.0, 3.0, 9.0], 3) == [1.5, 2.0, 4.0, 6.0]
    assert smoothed([1.0, 2.0], 1) == [1.0, 2.0]
    assert first_below([3.0, 2.0, 1.0], 2.0, [0.1, 0.2, 0.3]) == 0.3
    assert first_below([3.0], 2.0, [0.1]) is None
