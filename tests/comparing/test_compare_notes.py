"""``compare``: what it says of a problem and of each estimator, besides the numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from compared import STEPS

import diffopt
from diffopt.comparing.comparison import Row, brief
from diffopt.comparing.curvature import krylov_residual
from diffopt.comparing.notes import notes
from diffopt.estimators import (
    Binomial,
    ESJacobian,
    Estimator,
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


def test_what_to_beware_of_is_said(problem):
    text = str(diffopt.compare(problem, [Binomial(1), Truncated(0), Implicit(GMRES())], repeats=1))
    assert "Binomial: its terms grow until about order" in text
    assert "Truncated(steps=0): drops terms that matter" in text
    assert "Implicit(solver=GMRES()): the inner problem is far from its fixed point" in text


def test_what_is_no_better_than_zero_is_said_of_every_estimator(problem):
    """Judged by the measured error, whatever the estimator; zero itself has an error of one."""

    def linear_term_only(estimator):
        return problem.quadratic.outer_loss(problem.solve(estimator, torch.ones(5).double(), lr=2.0).params)

    estimators = [Binomial(1), Krylov(1), MultiStep(STEPS), FirstOrder(), Reptile(), Reverse(), Implicit(GMRES())]
    table = diffopt.compare(linear_term_only, estimators, repeats=1)
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


def test_the_row_of_a_random_estimator_says_that_it_is_one_draw(problem):
    estimators = [ESJacobian(4, 1e-3), MultiStep(1, ESJacobian(4, 1e-3)), Truncated(1)]
    table = diffopt.compare(problem, estimators, repeats=1)
    assert [row.random for row in table.rows] == [True, True, False]
    marked = [note for note in table.notes if "one random draw" in note]
    assert [note.partition(": ")[0] for note in marked] == [brief(estimator) for estimator in estimators[:2]]


@pytest.mark.slow
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

    def with_minimiser(estimator):
        found = diffopt.implicit(lambda v, a: (v - a).square().sum() + v.square().sum(), a.detach() / 2, a)
        return problem(estimator) + found.square().sum()

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

        def one(scale, estimator):
            options = {"optimizer": diffopt.SGD(0.5), "steps": steps, "estimator": estimator}
            w, b = inputs
            return quadratic.outer_loss(diffopt.solve(quadratic.loss, w, scale * b, **options).params)

        def outer(estimator):
            if tasks == 0:
                return one(1.0, estimator)
            scales = torch.linspace(1, 2, tasks, dtype=torch.float64)
            return torch.func.vmap(lambda scale: one(scale, estimator))(scales).sum()

        comparison = diffopt.compare(outer, [Implicit(GMRES(rtol=1e-10)), Reverse()], repeats=1)
        assert comparison.rows[1].stationarity is None
        return comparison.rows[0], comparison.notes[-1]

    (early, far), (late, near), (moot, nothing) = run(3, False), run(150, False), run(150, True)
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


@dataclass(frozen=True)
class TruncatedOtherwise(Estimator):
    """A user's own estimator, whose name begins as that of a shipped one does."""

    def run(self, problem):
        return Truncated(0).run(problem)


class BinomialLike(TruncatedOtherwise):
    """One that says for itself what is to be known of it."""

    if_wrong = "looks at {half} of the steps"
    if_unsolved = "sum up more rows"

    def if_curved(self, number):
        return f"rounds off {number:.1f} digits" if number > 2 else ""


def row(estimator, error=0.1, **numbers):
    return replace(Row(brief(estimator), error, 1.0, 0, 0, 0, 0, 0.0, 0.0, rule=estimator), **numbers)


def test_a_users_own_estimator_is_noted_in_its_own_words(problem):
    found = diffopt.compare(problem, [BinomialLike(), TruncatedOtherwise(), Truncated(0)], repeats=1)
    error = found.rows[0].relative_error
    zero = f"no nearer to the exact hypergradient than zero is (error {error:.0%}, cosine {found.rows[0].cosine:+.2f})"
    assert error > 1
    assert [row.rule for row in found.rows] == [BinomialLike(), TruncatedOtherwise(), Truncated(0)]
    assert found.notes[1:] == (
        f"BinomialLike(): looks at {{half}} of the steps: {zero}",
        f"TruncatedOtherwise(): {zero}",
        f"Truncated(steps=0): drops terms that matter here: {zero}",
    )


@pytest.mark.parametrize(("error", "said"), [(0.4, False), (0.6, True), (2.0, True)])
@pytest.mark.parametrize("estimator", [BinomialLike(), Truncated(1), FirstOrder(), MultiStep(2)], ids=brief)
def test_why_an_estimator_is_wrong_is_said_where_it_is_more_than_half_off(estimator, error, said):
    (text,) = notes([row(estimator, error)], None) or ("",)
    assert (f"{estimator.if_wrong} (error 60%" in text or f"{estimator.if_wrong}: no nearer" in text) == said
    (text,) = notes([row(TruncatedOtherwise(), error)], None) or ("",)
    assert (text != "") == (error >= 1)


def test_what_an_estimator_says_of_the_curvature_is_said_once_for_all_of_its_rows():
    rows = [row(estimator) for estimator in (Binomial(1), Binomial(2), BinomialLike(), TruncatedOtherwise(), Reverse())]
    first, *said = notes(rows, 3.14)
    assert first.endswith(": 3.1")
    assert said == [
        "Binomial: its terms grow until about order 3: distrust orders below three times that, or take Krylov",
        "BinomialLike: rounds off 3.1 digits",
    ]
    assert len(notes(rows, 1.5)) == 2
    assert len(notes(rows, 0.9)) == 1
    assert notes(rows, None) == ()


@pytest.mark.parametrize(
    ("estimator", "fix"),
    [(Krylov(1), ", or take more orders"), (BinomialLike(), ", or sum up more rows"), (TruncatedOtherwise(), "")],
    ids=["Krylov", "advised", "silent"],
)
def test_what_to_do_about_a_residual_is_the_estimators_own(estimator, fix):
    (text,) = notes([row(estimator, residual=0.25)], None)
    assert text == f"{brief(estimator)}: its own residual is 0.25; trust it below 0.01{fix}"
    assert notes([row(estimator, residual=0.005)], None) == ()


def test_a_row_without_its_estimator_is_judged_by_its_numbers():
    """As a program may make one, or keep it from before."""
    plain = replace(row(Truncated(0), 2.0, residual=0.5), rule=None)
    assert notes([plain], 3.0)[1:] == (
        "Truncated(steps=0): no nearer to the exact hypergradient than zero is (error 200%, cosine +1.00)",
        "Truncated(steps=0): its own residual is 0.5; trust it below 0.01",
    )


def test_a_row_of_a_failed_estimator_holds_the_estimator_too(problem):
    rows = diffopt.compare(problem, [Truncated(STEPS + 1), Reverse()], repeats=1).rows
    assert [row.rule for row in rows] == [Truncated(STEPS + 1), Reverse()]
