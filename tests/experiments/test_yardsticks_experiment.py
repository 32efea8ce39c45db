"""What the public yardsticks compute, against closed forms, dense algebra, differences and plain loops."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from experiment_answers import gone_on
from scipy.optimize import minimize_scalar
from scipy.stats import mannwhitneyu
from torch.nn.functional import cross_entropy

from diffopt.experiments import yardsticks
from diffopt.experiments import yardsticks_cleaning as cleaning
from diffopt.experiments import yardsticks_influence as influence
from diffopt.experiments import yardsticks_toy as toy
from diffopt.experiments.framework import catalogue
from diffopt.experiments.framework.run_folder import json_row
from diffopt.experiments.framework.unit_context import Work
from diffopt.experiments.yardsticks_report import plain_fit

SETTINGS = catalogue.experiment("yardsticks").quick
MATRIX = 0.5 * np.eye(23) + 0.5 * np.eye(23, k=1)
SIGNS = np.array([1.0] * 10 + [-1.0] * 13)


class TestInfluenceBalancing:
    @pytest.mark.parametrize(
        ("steps", "published"), [(1, -4.0), (10, -40.0), (20, -65.9), (50, 19.0), (100, 24.0), (1000, 24.0)]
    )
    def test_windows_by_hand_are_sums_of_powers_of_the_matrix(self, steps, published):
        reach, influences = SIGNS.copy(), 0.0
        for _ in range(steps):
            influences += reach[0]
            reach = MATRIX @ reach
        assert influence.of_window(steps, 0.5) == pytest.approx(influences * (-3 - 1), rel=1e-12)
        assert influence.of_window(steps, 0.5) == pytest.approx(published, abs=0.05)

    @pytest.mark.parametrize(("theta", "expected"), [(0.5, 24.0), (-1 / 6, 0.0), (-1.0, -30.0)])
    def test_the_hypergradient_at_rest_is_that_of_the_linear_system(self, theta, expected):
        rest = np.linalg.solve(np.eye(23) - MATRIX, SIGNS)
        assert influence.at_rest(theta) == pytest.approx(rest[0] * (rest[0] * theta - 1)) == pytest.approx(expected)

    @pytest.mark.parametrize("theta", [0.5, 0.1, -0.4])
    def test_the_exact_estimator_is_a_difference_of_rollouts(self, theta):
        def loss(theta):
            s = np.ones(23)
            for _ in range(30):  # not at rest yet
                s = MATRIX @ s + theta * SIGNS
            return (s[0] - 1) ** 2 / 2

        found = influence.hypergradient(influence.Reverse(), torch.tensor(theta, dtype=torch.float64), 30)
        # quadratic in theta: central differences are right up to round-off
        assert found == pytest.approx((loss(theta + 1e-3) - loss(theta - 1e-3)) / 2e-3, rel=1e-9)

    @pytest.mark.parametrize("name", ["exact", "truncated 1", "truncated 10", "truncated 20", "implicit, Neumann 20"])
    def test_estimators_give_what_was_worked_out_by_hand(self, name):
        row = influence.measure(name, 200, 1, 0.002, Work(0))
        assert row["gradient"] == pytest.approx(influence.by_hand(name), rel=1e-9)
        assert (row["gradient"] > 0) == (name == "exact")
        assert row["path"] == pytest.approx([0.5, 0.5 - 0.002 * row["gradient"]])
        assert row["warned"] == []

    def test_descent_by_the_exact_estimator_is_that_of_a_parabola(self):
        row, theta = influence.measure("exact", 150, 4, 0.01, Work(0)), 0.5
        for found in row["path"][1:]:
            theta -= 0.01 * (36 * theta + 6)
            assert found == pytest.approx(theta, rel=1e-9)

    def test_solvers_for_symmetric_matrices_refuse(self):
        assert influence.measure("implicit, CG", 50, 1, 0.01, Work(0)) == {"refused": "LinearSolveError"}
        assert influence.measure("implicit, Nystrom", 50, 1, 0.01, Work(0)) == {"refused": "LinearSolveError"}

    def test_a_descent_that_leaves_is_stopped_and_a_bad_series_warns(self):
        row = influence.measure("binomial 1", 100, 50, 0.01, Work(0))
        assert row["warned"] == ["EstimateWarning"]
        assert len(row["path"]) < 20
        assert abs(row["path"][-1]) > influence.FAR >= abs(row["path"][-2])


class TestToy:
    def test_the_slope_is_that_of_the_closed_form(self):
        x = np.linspace(0.05, 2.95, 30)

        def h(x):
            return np.cos(2 - 4 * x) / (1 + np.exp(2 - 4 * x)) + np.log((4 * x - 2) ** 2 + 1) / 2

        differences = (h(x + 1e-5) - h(x - 1e-5)) / 2e-5
        np.testing.assert_allclose(toy.slope(torch.from_numpy(x)), differences, rtol=1e-7, atol=1e-9)
        grid = np.linspace(0, 3, 3001)
        low = grid[1:-1][(h(grid)[1:-1] < h(grid)[:-2]) & (h(grid)[1:-1] < h(grid)[2:])]
        np.testing.assert_allclose(toy.minimisers(), low, atol=1e-3)
        assert toy.distances([float(low[0]), float(low[1]) + 0.1]).tolist() == pytest.approx([0, 0.1], abs=1e-3)

    @pytest.mark.parametrize("x", [0.3, 1.5, 3.0])
    def test_the_inner_solution_is_minus_x(self, x):
        found = minimize_scalar(lambda y: (x + y) ** 2 + x * np.sin(x + y) ** 2, bounds=(-6, 3), method="bounded")
        assert found.x == pytest.approx(-x, abs=1e-4)
        y = torch.tensor(0.2 - x, dtype=torch.float64, requires_grad=True)
        value = toy.inner_loss(y, torch.tensor(x, dtype=torch.float64))
        assert value.item() == pytest.approx(0.2**2 + x * np.sin(0.2) ** 2)

    @pytest.mark.parametrize(("name", "kept"), [("exact", 7), ("truncated 1", 1), ("truncated 5", 5)])
    def test_hypergradients_are_those_of_plain_loops(self, name, kept):
        x = torch.tensor([0.4, 1.7, 2.9], dtype=torch.float64, requires_grad=True)
        start = torch.tensor([1.0, -2.0, 0.3], dtype=torch.float64)
        y = start.clone().requires_grad_()
        for step in range(7):
            inner = ((x + y) ** 2 + x * torch.sin(x + y) ** 2).sum()
            y = y - 0.1 * torch.autograd.grad(inner, y, create_graph=True)[0]
            if step < 7 - kept:
                y = y.detach().requires_grad_()
        outer = torch.cos(4 * y + 2) / (1 + torch.exp(2 - 4 * x)) + torch.log((4 * x - 2) ** 2 + 1) / 2
        (expected,) = torch.autograd.grad(outer.sum(), x)
        estimator = toy.estimators(7, torch.Generator())[name]
        torch.testing.assert_close(
            toy.hypergradients(estimator, x.detach(), start, 7), expected, rtol=1e-10, atol=1e-12
        )

    def test_errors_vanish_with_the_steps_and_descents_end_in_minima(self):
        row = toy.measure("exact", (5, 30), 21, 30, 40, 0.05, Work(0))
        assert row["errors"]["30"][1] < 2e-2 < row["errors"]["5"][0]
        assert row["errors"]["30"][2] == 0
        assert toy.distances(row["ends"]).max() < toy.CLOSE
        assert len(row["starts"]) == len(row["ends"]) == 30
        assert 0 <= min(row["ends"]) <= max(row["ends"]) <= 3

    def test_a_bad_estimator_ends_at_the_bounds(self):
        row = toy.measure("binomial 1", (20,), 5, 20, 6, 0.05, Work(0))
        assert {0.0, 3.0} & set(row["ends"])
        assert 0 <= min(row["ends"]) <= max(row["ends"]) <= 3

    def test_an_estimator_that_is_longer_than_the_rollout_is_left_out(self):
        assert list(toy.measure("krylov 5", (3, 6), 5, 2, 1, 0.03, Work(0))["errors"]) == ["6"]


@pytest.fixture(scope="module")
def data():
    return cleaning.load("clusters", (40, 30), 0.5, 0, Work(0))


@pytest.fixture(scope="module")
def inner():
    return cleaning.Inner(6, 0.4, 200)


class TestCleaning:
    def test_images_are_standardised_and_the_same_at_every_corruption(self, data):
        torch.testing.assert_close(data.inputs.mean(0), torch.zeros(6), atol=1e-6, rtol=0)
        torch.testing.assert_close(data.inputs.square().mean(0), torch.ones(6))
        more = cleaning.load("clusters", (40, 30), 0.9, 0, Work(0))
        assert torch.equal(more.inputs, data.inputs)
        assert torch.equal(more.test[1], data.test[1])
        assert more.clean.sum() < data.clean.sum() < 40
        other = cleaning.load("clusters", (40, 30), 0.5, 1, Work(0))
        assert not torch.equal(other.inputs, data.inputs)

    def test_the_inner_loss_is_the_source_s(self, data):
        z, x = torch.linspace(-1, 1, 18).view(6, 3), torch.linspace(-3, 2, 40)
        logs = (data.inputs @ z).log_softmax(1)[torch.arange(40), data.labels]
        expected = -(logs / (1 + (-x).exp())).sum() / 40 + 0.2 * (z**2).sum()
        torch.testing.assert_close(data.loss(z, x), expected)

    @pytest.mark.parametrize("ties", [False, True])
    def test_told_apart_is_the_area_under_the_curve(self, data, ties):
        x = torch.randn(40, generator=torch.Generator().manual_seed(1)) + data.clean
        x = x.round() if ties else x
        area = mannwhitneyu(x[data.clean], x[~data.clean]).statistic / (data.clean.sum() * (~data.clean).sum())
        assert data.told_apart(x) == pytest.approx(float(area), abs=1e-6)

    def test_hypergradients_are_judged_by_the_implicit_one(self, data, inner):
        x = torch.full((40,), -2.0, dtype=torch.float64, requires_grad=True)
        inputs, (sides, wanted) = data.inputs.double(), data.validation

        def loss(z, x):
            each = cross_entropy(inputs @ z.view(6, 3), data.labels, reduction="none")
            return (x.sigmoid() * each).mean() + 0.2 * z.square().sum()

        z = torch.zeros(18, dtype=torch.float64)
        for _ in range(60):  # Newton's method
            slope = torch.autograd.functional.jacobian(lambda z: loss(z, x.detach()), z)
            z = z - torch.linalg.solve(torch.autograd.functional.hessian(lambda z: loss(z, x.detach()), z), slope)
        outer = torch.autograd.functional.jacobian(lambda z: cross_entropy(sides.double() @ z.view(6, 3), wanted), z)
        curvature = torch.autograd.functional.hessian(lambda z: loss(z, x.detach()), z)
        adjoint, point = torch.linalg.solve(curvature, outer), z.requires_grad_()
        (slope,) = torch.autograd.grad(loss(point, x), point, create_graph=True)
        (true,) = torch.autograd.grad(-slope @ adjoint, x)
        optimizer_steps = torch.zeros(18, dtype=torch.float64, requires_grad=True)
        for _ in range(6):
            (step,) = torch.autograd.grad(loss(optimizer_steps, x), optimizer_steps, create_graph=True)
            optimizer_steps = optimizer_steps - 0.4 * step
        (ours,) = torch.autograd.grad(cross_entropy(sides.double() @ optimizer_steps.view(6, 3), wanted), x)
        found = cleaning.first_hypergradients(data, inner, Work(0))
        cosine = float(torch.cosine_similarity(ours, true, dim=0))
        # float32 there, float64 here
        assert found["exact"] == pytest.approx([float((ours - true).norm() / true.norm()), cosine], rel=1e-3)
        assert found["first-order"] == [1.0, 0.0]
        assert found["implicit, 5 CG"][0] < found["exact"][0]

    def test_it_learns_as_a_plain_loop_does(self, data, inner):
        x = torch.full((40,), -2.0, requires_grad=True)
        outer, losses = torch.optim.Adam([x], lr=0.5), []
        for _ in range(3):
            z = torch.zeros(6, 3, requires_grad=True)
            for _ in range(6):
                each = cross_entropy(data.inputs @ z, data.labels, reduction="none")
                loss = (x.sigmoid() * each).mean() + 0.2 * z.square().sum()
                z = z - 0.4 * torch.autograd.grad(loss, z, create_graph=True)[0]
            loss = cross_entropy(data.validation[0] @ z, data.validation[1])
            losses.append(loss.item())
            outer.zero_grad()
            loss.backward()
            outer.step()
        row = cleaning.learn(data, "exact", inner, 3, 0.5, Work(0))
        assert row["losses"] == pytest.approx(losses, rel=1e-5)
        assert row["told apart"] == pytest.approx(data.told_apart(x))
        z = cleaning.fitted(data, x.detach().sigmoid(), inner)
        wrong = ((data.test[0] @ z).argmax(1) != data.test[1]).float().mean()
        assert row["test error"] == pytest.approx(100 * float(wrong))

    @pytest.mark.parametrize("name", ["ES Jacobian, Q=2", "implicit, 5 Neumann"])
    def test_a_unit_that_was_stopped_goes_on_to_the_last_bit(self, data, inner, name, tmp_path):
        whole = cleaning.learn(data, name, inner, 3, 0.5, Work(0))
        again = gone_on(tmp_path, 2, cleaning.learn, data, name, inner, 3, 0.5)
        assert {**again, "seconds": None} == {**whole, "seconds": None}


def test_parts_can_be_left_out():
    kinds = {unit.name.split(" ")[0].strip(",") for unit in yardsticks.units(SETTINGS)}
    assert kinds == {"influence", "toy", "cleaning"}
    assert {unit.name.split(",")[0] for unit in yardsticks.units(replace(SETTINGS, parts=("toy",)))} == {"toy"}


@pytest.fixture(scope="module")
def rows():
    chosen = ("exact", "truncated 1", "truncated 10", "truncated 20", "implicit, Neumann 10", "implicit, 5 CG")
    chosen += ("truncated 5", "baselines", "hypergradients")
    units = yardsticks.units(SETTINGS)
    return {u.name: json_row(u.name, u.run(Work(0))) for u in units if u.name.partition(", ")[2] in chosen}


def test_answers_follow_the_numbers(rows):
    rows = copy.deepcopy(rows)
    prefix = "cleaning p=0.5 seed=0, "
    away, ends = "descent by it moves away from the optimum -1/6", "descent by the exact one reaches it"
    nearer = "5 products of conjugate gradients are nearer the hypergradient than back-propagation through all steps is"
    lower = "weights learned by the exact estimator lower the test error below that of equal weights (1 or the start's)"
    minima = "from random starts, descent by the exact estimator ends in local minima of h"
    watched = (away, ends, nearer, lower, minima)

    def answers():
        found = {
            claim.text: claim.answer for claim in catalogue.experiment("yardsticks").summarise(SETTINGS, rows).claims
        }
        return [found[text] for text in watched]

    rows["influence, exact"]["path"] = [0.5, -0.166]
    rows[prefix + "baselines"] |= {"noisy": 20.0, "start": 18.0}
    rows[prefix + "exact"]["test error"] = 17.0
    rows["toy, exact"]["ends"] = toy.minimisers().tolist()
    assert plain_fit(rows[prefix + "baselines"]) == 18
    assert answers() == ["yes"] * 5
    rows["influence, exact"]["path"] = [0.5, -0.5]
    for length in (1, 10, 20):
        rows[f"influence, truncated {length}"]["path"] = [0.5, 0.4]
    rows[prefix + "exact"]["test error"] = 19.0
    rows[prefix + "hypergradients"]["implicit, 5 CG"] = [9.0, 0.1]
    rows["toy, exact"]["ends"] = [0.0, 0.1]
    assert answers() == ["no"] * 5
    del rows["influence, truncated 1"], rows["influence, exact"]
    assert answers()[1] == "not measured"


def test_the_table_of_cleaning_has_the_means_of_the_draws(rows):
    first, settings = "cleaning p=0.5 seed=0, ", replace(SETTINGS, seeds=2)
    rows = {**rows, **{name.replace("seed=0", "seed=1"): row for name, row in copy.deepcopy(rows).items()}}
    rows[first + "exact"] = {**rows[first + "exact"], "told apart": 0.5}
    rows["cleaning p=0.5 seed=1, exact"]["told apart"] = 0.8
    rows["cleaning p=0.5 seed=1, implicit, 5 CG"] = {"diverged": "DivergenceError", "seconds": 1.0}
    tables = {table.title: table for table in catalogue.experiment("yardsticks").summarise(settings, rows).tables}
    (table,) = (table for title, table in tables.items() if "the first hypergradient" in title)
    assert "means of 2 draws" in table.title
    lines = {line[0]: dict(zip(table.columns, line, strict=True)) for line in table.rows}
    assert lines["exact"]["told apart"] == pytest.approx(0.65)
    assert lines["implicit, 5 CG"]["diverged"] == "DivergenceError"
    assert lines["first-order"]["test error [%]"] is None
