"""The theorems' problem: its true gradient, the algorithm on it step by step, and answers that follow the numbers."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from diffopt.experiments import memory_rates
from diffopt.experiments import memory_rates_problem as problem
from diffopt.experiments.framework import catalogue
from diffopt.experiments.framework.unit_context import Work
from diffopt.experiments.memory_rates_report import slope

SETTINGS = replace(catalogue.experiment("memory-rates").quick, iterations=12)


def written_out(theta, phi, target):
    return (1 + (phi - target).square()).log().sum() + problem.DECAY / 2 * theta.square().sum()


@pytest.fixture(scope="module")
def tasks():
    return problem.drawn(5, torch.Generator().manual_seed(3))


def test_the_true_gradient_is_that_of_the_outer_loss_at_the_exact_solution(tasks):
    theta = torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64, requires_grad=True)
    found = problem.true_gradients(theta.detach(), tasks)
    for i in range(5):
        task = problem.Tasks(*(x[i] for x in tasks))
        phi = torch.linalg.inv(task.curvature) @ (task.mixing @ theta + task.offset)
        (wanted,) = torch.autograd.grad(written_out(theta, phi, task.target), theta)
        torch.testing.assert_close(found[i], wanted, rtol=1e-11, atol=1e-12)
        at = phi.detach().requires_grad_()
        (rest,) = torch.autograd.grad(problem.inner_loss(at, theta.detach(), task), at)
        assert float(rest.norm()) < 1e-12  # it is the inner minimum


def test_curvatures_are_as_said_and_tasks_differ(tasks):
    eigenvalues = torch.linalg.eigvalsh(tasks.curvature)
    torch.testing.assert_close(eigenvalues[:, 0], torch.full((5,), problem.LOWEST, dtype=torch.float64))
    torch.testing.assert_close(eigenvalues[:, -1], torch.ones(5, dtype=torch.float64))
    assert all(len(x.flatten(1).unique(dim=0)) == 5 for x in tasks)


def plainly(settings, sampled, tasks, order):
    """The algorithm as it is written down, one task after the other, by dense algebra."""
    theta = torch.full((problem.SHARED,), 2.0, dtype=torch.float64)
    phi, v = (torch.zeros(settings.tasks, problem.SIZE, dtype=torch.float64) for _ in range(2))
    norms = []
    for _ in range(settings.iterations):
        norms.append(float(problem.true_gradients(theta, tasks).mean(0).square().sum()))
        rows = range(settings.tasks)
        if sampled is not None:
            rows = torch.randint(settings.tasks, (sampled,), generator=order).tolist()
        slopes, before = [], (phi.clone(), v.clone())
        for i in rows:
            a, b = tasks.curvature[i], tasks.mixing[i]
            x, y = before[0][i].clone(), before[1][i].clone()
            for _ in range(settings.steps):
                x = x - problem.LR * (a @ x - b @ theta - tasks.offset[i])
            right = 2 * (x - tasks.target[i]) / (1 + (x - tasks.target[i]) ** 2)
            residual = right - a @ y
            direction = residual.clone()
            for _ in range(settings.products):  # conjugate gradients
                size = residual @ residual / (direction @ a @ direction)
                y, new = y + size * direction, residual - size * (a @ direction)
                direction, residual = new + (new @ new) / (residual @ residual) * direction, new
            phi[i], v[i] = x, y
            slopes.append(b.T @ y + problem.DECAY * theta)
        theta = theta - settings.outer_lr * sum(slopes) / len(slopes)
    return norms


@pytest.mark.parametrize("sampled", [None, 1, 4])
def test_the_algorithm_is_the_one_that_is_written_down(sampled):
    work = Work(7)
    row = problem.descend(SETTINGS, sampled, work)
    tasks = problem.drawn(SETTINGS.tasks, work.generator("tasks"))
    norms = plainly(SETTINGS, sampled, tasks, work.generator("sampled tasks"))
    assert row["after"] == list(range(1, SETTINGS.iterations + 1))
    assert row["squared"] == pytest.approx(norms, rel=1e-9)
    assert row["floor"] == pytest.approx(sum(norms[6:]) / 6, rel=1e-9)
    assert row["left"] == pytest.approx(norms[-1] / norms[0], rel=1e-9)


def test_when_a_target_was_reached():
    count = len(problem.TARGETS)
    assert problem.reached([1.0, 0.2, 0.1, 0.05, 0.5, 0.001]) == [3, 4, *[6] * (count - 2)]
    assert problem.reached([1.0, 0.5]) == [None] * count
    row = problem.said([8.0, 0.0, 0.0, 0.0, *[0.0] * 96])
    assert row["mean"][0] == 10  # 8 / n is a tenth of 8
    assert row["last"][0] == 2
    assert (row["after"][:2], row["squared"][:2]) == ([2, 4], [4.0, 0.0])


def test_a_slope_is_the_exponent_of_a_power():
    assert slope([1, 4, 16], [5.0, 5 * 4**-0.7, 5 * 16**-0.7]) == pytest.approx(-0.7)


def made_up(settings, floor, mean, last, left):
    """Rows whose exponents are these."""
    eps = problem.TARGETS
    row = {"after": [1], "squared": [1.0], "variance": 2.0, "left": left}
    found = {}
    for unit in memory_rates.units(settings):
        size = unit.keys["tasks"] or 1
        times = {name: [10 * e**-exponent for e in eps] for name, exponent in (("mean", mean), ("last", last))}
        found[unit.name] = {**row, "floor": 3 * size**-floor, **times}
    return found


def test_answers_follow_the_numbers():
    experiment = catalogue.experiment("memory-rates")

    def answers(rows):
        return [claim.answer for claim in experiment.summarise(SETTINGS, rows).claims]

    right = made_up(SETTINGS, 1.0, 1.0, 0.3, 1e-20)
    assert answers(right) == ["yes"] * 4
    assert answers(made_up(SETTINGS, 0.5, 1.5, 1.5, 1e-3)) == ["no"] * 4
    assert answers(made_up(SETTINGS, 1.5, 0.5, 0.9, 1e-20)) == ["no", "no", "yes", "yes"]
    mixed = copy.deepcopy(right)
    mixed["seed=1 |B|=4"]["floor"] = 3 / 4**0.5  # of the two starts one has half the exponent
    mixed["seed=1 all tasks"] |= {"mean": [None] * len(problem.TARGETS), "left": 1.0}
    assert answers(mixed) == ["not decided", "not decided", "yes", "partly"]
    table = experiment.summarise(SETTINGS, right).tables[0]
    assert "8 tasks" in table.title
    assert [line[-1] for line in table.rows] == pytest.approx([1.5, 1.5])  # 3 / size * size / 2
