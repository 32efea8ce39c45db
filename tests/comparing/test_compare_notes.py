"""``compare``: what it says of a problem and of each estimator, besides the numbers."""

from __future__ import annotations

import pytest
import torch
from compared import STEPS, quadratic_problem

import diffopt
from diffopt.comparing.comparison import brief
from diffopt.comparing.curvature import krylov_residual
from diffopt.estimators import (
    Binomial,
    ESJacobian,
    FirstOrder,
    Implicit,
    Krylov,
    MultiStep,
    Reptile,
    Reverse,
    Truncated,
)
from diffopt.linear_solve import GMRES
from diffopt.rollout.record import Record


@pytest.fixture
def problem():
    return quadratic_problem()


def test_what_to_beware_of_is_said(problem):
    text = str(diffopt.compare(problem, [Binomial(1), Truncated(0), Implicit(GMRES())], repeats=1))
    assert "Binomial: the terms of its series grow" in text
    assert "Truncated(steps=0): drops terms that matter" in text
    assert "Implicit(solver=GMRES()): the inner problem is far from its fixed point" in text


def test_what_is_no_better_than_zero_is_said_of_every_rule(problem):
    """Judged by the measured error, whatever the rule; zero itself has an error of one."""

    def linear_term_only(rule):
        return problem.quadratic.outer_loss(problem.solve(rule, torch.ones(5).double(), lr=2.0).params)

    rules = [Binomial(1), Krylov(1), MultiStep(STEPS), FirstOrder(), Reptile(), Reverse(), Implicit(GMRES())]
    table = diffopt.compare(linear_term_only, rules, repeats=1)
    zero, text = "no nearer to the exact hypergradient than zero is (error", "\n".join(table.notes)
    errors = [row.relative_error for row in table.rows]
    assert errors[3] == errors[4] == 1
    assert min(errors[:3]) > 1 > errors[5]
    assert f"Binomial(order=1): {zero} {errors[0]:.0%}, cosine {table.rows[0].cosine:+.2f})" in text
    assert f"Krylov(order=1): {zero}" in text
    assert f"MultiStep(window=4): takes other steps: {zero}" in text
    assert f"FirstOrder(): drops terms that matter here: {zero} 100%, cosine +0.00)" in text
    assert f"Reptile(): {zero} 100%, cosine +0.00)" in text
    assert "Reverse()" not in text
    assert text.count(zero) == sum(error >= 1 for error in errors)


def test_the_row_of_a_random_rule_says_that_it_is_one_draw(problem):
    rules = [ESJacobian(4, 1e-3), MultiStep(1, ESJacobian(4, 1e-3)), Truncated(1)]
    table = diffopt.compare(problem, rules, repeats=1)
    assert [row.random for row in table.rows] == [True, True, False]
    marked = [note for note in table.notes if "one random draw" in note]
    assert [note.partition(": ")[0] for note in marked] == [brief(rule) for rule in rules[:2]]


def test_a_row_of_krylov_says_what_a_solve_would_say_of_it(problem):
    rows = diffopt.compare(problem, [Krylov(1), Krylov(3), Krylov(STEPS), Implicit(GMRES())], repeats=1).rows
    found = []
    for order in (1, 3):
        solution = problem.solve(Krylov(order))
        problem.quadratic.outer_loss(solution.params).backward()
        found.append(float(solution.diagnostics["residual"]))
    assert [row.residual for row in rows] == [*found, 0.0, None]
    notes = diffopt.compare(problem, [Krylov(1), Krylov(STEPS)], repeats=1).notes
    own = [note for note in notes if "residual" in note]
    assert own == [f"Krylov(order=1): its own residual is {found[0]:.2g}; trust it below 0.01, or take more orders"]
    assert found[0] > 0.01


def test_the_residual_of_a_row_is_that_of_the_worst_task_of_any_solve():
    found = [{"residual": torch.tensor([0.25, 0.5])}, {"residual": torch.tensor(0.125)}, {}]
    implicit = {"residual": torch.tensor(9.0), "stationarity": torch.tensor(1.0)}
    assert krylov_residual([Record(diagnostics=x) for x in [*found, implicit]]) == 0.5
    assert krylov_residual([Record(diagnostics=implicit)]) is None


def test_a_minimiser_that_the_problem_differentiates_itself_is_no_rows_fixed_point(problem):
    """Whatever found it: ``implicit`` takes no steps, so it is neither near nor far, and its system is not Krylov's."""
    a = torch.ones(2, dtype=torch.float64, requires_grad=True)

    def with_minimiser(rule):
        found = diffopt.implicit(lambda v, a: (v - a).square().sum() + v.square().sum(), a.detach() / 2, a)
        return problem(rule) + found.square().sum()

    rows = diffopt.compare(with_minimiser, [Reverse(1), Krylov(STEPS)], repeats=1).rows
    assert [(row.stationarity, row.residual) for row in rows] == [(None, None), (None, 0.0)]
    assert diffopt.compare(with_minimiser, [Implicit()], repeats=1).rows[0].stationarity.share > 0.1


@pytest.mark.parametrize("tasks", [0, 3])
def test_stationarity_is_judged_by_the_next_step(problem, tasks):
    """Not by the error: a start has none of the fixed point's hypergradient, however near that is."""
    quadratic = problem.quadratic
    start, linear = (torch.linspace(-1, x, 5, dtype=torch.float64) for x in (1, 2))

    def run(steps, learn_start):
        inputs = start.clone().requires_grad_(learn_start), linear.clone().requires_grad_(not learn_start)

        def one(scale, rule):
            options = {"optimizer": diffopt.SGD(0.5), "steps": steps, "estimator": rule}
            w, b = inputs
            return quadratic.outer_loss(diffopt.solve(quadratic.loss, w, scale * b, **options).params)

        def outer(rule):
            if tasks == 0:
                return one(1.0, rule)
            scales = torch.linspace(1, 2, tasks, dtype=torch.float64)
            return torch.func.vmap(lambda scale: one(scale, rule))(scales).sum()

        comparison = diffopt.compare(outer, [Implicit(GMRES(rtol=1e-10)), Reverse()], repeats=1)
        assert comparison.rows[1].stationarity is None
        return comparison.rows[0], comparison.notes[-1]

    (early, far), (late, near), (moot, nothing) = run(3, False), run(400, False), run(400, True)
    step = torch.eye(5) - 0.5 * quadratic.hessian
    worst = []
    for scale in (1.0, 2.0) if tasks else (1.0,):  # in between lies between
        w, b = start, scale * linear
        for _ in range(3):
            w = step @ w + 0.5 * b
        worst.append((float((step @ w + 0.5 * b - w).norm()), float((w - start).norm()) / 3))
    assert early.stationarity.distance == pytest.approx(max(distance for distance, _ in worst), rel=1e-9)
    if not tasks:
        assert early.stationarity.share == pytest.approx(worst[0][0] / worst[0][1], rel=1e-9)
    assert "far from its fixed point: one more step would move the params by" in far
    assert late.stationarity.share < 1e-3
    assert late.relative_error < 1e-3
    assert near.endswith("of the average step")
    assert moot.relative_error == pytest.approx(1)
    assert "is at its fixed point: one more step" in nothing
    assert "but the error is 100%: a fixed point does not depend on the start" in nothing
