"""``compare``: problems that are not what they should be, and estimators that fail on them."""

from __future__ import annotations

import math

import pytest
import torch
from compared import STEPS
from matplotlib.figure import Figure

import diffopt
from diffopt.comparing.comparison import brief
from diffopt.estimators import FirstOrder, MultiStep, Reverse, Truncated, Unrolled


@pytest.mark.parametrize("exact", [None, Unrolled(), MultiStep(1)])
def test_a_problem_that_forgets_the_estimator_is_refused(problem, exact):
    """Whatever it runs instead: all its rows would be the same."""
    with pytest.raises(diffopt.EstimatorError, match=r"expected it to pass the estimator on; write diffopt\.solve"):
        diffopt.compare(lambda rule: problem(Unrolled()), [FirstOrder()], exact=exact)
    with pytest.raises(diffopt.EstimatorError, match="pass the estimator on"):
        diffopt.compare(lambda rule: problem(None), [FirstOrder()], exact=exact)


WEIGHTS = torch.ones(2, dtype=torch.float64, requires_grad=True)


def chunked(rule):
    """An outer loss whose graph holds no solve: each chunk of tasks is differentiated at once."""
    options = {"optimizer": diffopt.SGD(0.1), "steps": 2, "estimator": rule}

    def task(w, x):
        return diffopt.solve(lambda w, x: (w * x).square().sum(), w, x, **options).params.sum()

    return diffopt.mean_over_tasks(task, WEIGHTS, torch.ones(2).double(), in_dims=(None, 0), task_chunk=1)


class Delegating(diffopt.estimators.Estimator):
    """Not a dataclass, and run by another estimator, which is the one that the graph knows."""

    def __repr__(self):
        return "Delegating()"

    def run(self, problem):
        return Reverse(1).run(problem)


@pytest.mark.parametrize("rule", [Unrolled(), Truncated(2), Delegating(), Reverse(1)], ids=brief)
def test_a_rule_that_the_problem_does_run_is_never_taken_for_forgotten(problem, rule):
    """Run as it is, within another, one of a user's own, and chunk by chunk."""
    given = []

    def run(estimator):
        given.append(estimator)
        if rule == Reverse(1):
            return chunked(estimator)
        return problem(MultiStep(1, estimator) if rule == Truncated(2) else estimator)

    table = diffopt.compare(run, [rule], exact=rule, repeats=1)
    assert all(type(estimator) is type(rule) for estimator in given)
    assert "ran no solve" not in str(table)


def test_a_rule_that_the_problem_leaves_out_alone_is_marked(problem):
    def run(rule):
        return problem(Reverse(1) if isinstance(rule, FirstOrder) else rule)

    table = diffopt.compare(run, [FirstOrder(), Truncated(1)], repeats=1)
    assert [row.used for row in table.rows] == [False, True]
    assert "FirstOrder(): the problem ran no solve with it, so these are numbers of another estimator" in table.notes
    assert str(table).count("ran no solve") == 1


def test_a_problem_that_draws_other_numbers_at_every_call_is_refused(problem):
    with pytest.raises(diffopt.RandomnessError, match="expected the same problem at every call"):
        diffopt.compare(lambda rule: problem(rule) * torch.rand(()), [Reverse()], repeats=1)

    def seeded(rule):
        torch.manual_seed(0)
        return problem(rule) * torch.rand(())

    assert diffopt.compare(seeded, [Reverse()], repeats=1).rows[0].relative_error < 1e-12


@pytest.mark.parametrize(("change", "failure"), [(1e-8, "None"), (1e-3, "RandomnessError: the problem's outer loss")])
def test_a_problem_that_changes_only_later_costs_the_row_in_which_it_does(problem, change, failure):
    """Within what round-off can do (a GPU adds in any order) it may change."""
    calls = []

    def drifting(rule):
        calls.append(rule)
        return problem(rule) * (1 + change * (len(calls) == 4))  # two for the reference, one, and the first timed one

    found = [row.failure for row in diffopt.compare(drifting, [Reverse(), Reverse(1)], repeats=1).rows]
    assert str(found[0]).startswith(failure)
    assert found[1] is None


def test_a_rule_that_fails_costs_its_own_row_only(problem, monkeypatch):
    rules = [Truncated(STEPS + 1), Reverse(1), FirstOrder()]
    table = diffopt.compare(problem, rules, repeats=1)
    text = str(table).splitlines()
    message = f"StepsError: Truncated: steps is {STEPS + 1}, expected at most {STEPS}; the inner problem has only "
    message += f"{STEPS} steps (each window of MultiStep counts as one): take fewer, or more inner steps"
    assert table.rows[0].failure == message
    assert math.isnan(table.rows[0].relative_error)
    assert text[2] == f"Truncated(steps={STEPS + 1})     failed: StepsError"
    assert f"Truncated(steps={STEPS + 1}): failed with {message}" in text
    whole = diffopt.compare(problem, rules[1:], repeats=1)
    assert [row.relative_error for row in table.rows[1:]] == [row.relative_error for row in whole.rows]
    assert text[3].startswith("Reverse(checkpoint=1)     0.0e+00  +1.0000")
    assert text[0].split() == str(whole).splitlines()[0].split()
    assert table.to_markdown().splitlines()[2].endswith("| failed: StepsError |" + " - |" * 7)
    drawn = []

    def save(figure, *_, **__):
        drawn.extend(figure.axes[0].get_legend_handles_labels()[1])

    monkeypatch.setattr(Figure, "savefig", save)
    table.plot("plot.png")
    assert drawn == [row.estimator for row in whole.rows]
    assert whole.complete() == whole.rows
    with pytest.raises(diffopt.EstimatorError, match=r"steps=5\) failed, expected a row of numbers; StepsErr"):
        table.complete()


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_a_rule_for_which_memory_does_not_suffice_costs_its_own_row_only(problem, kind):
    def run(rule):
        if rule == Reverse("graph"):
            raise kind("out of\nmemory")
        return problem(rule)

    table = diffopt.compare(run, [Reverse("graph"), Reverse(1)], repeats=1)
    assert [row.failure for row in table.rows] == [f"{kind.__name__}: out of memory", None]


def test_what_fails_for_every_rule_or_is_a_mistake_of_the_callers_is_an_error(problem):
    with pytest.raises(diffopt.EstimatorError, match=r"every estimator failed, .*\(steps=9\): StepsError: Tr"):
        diffopt.compare(problem, [Truncated(9), Truncated(8)], repeats=1)
    with pytest.raises(diffopt.StepsError):
        diffopt.compare(problem, [Reverse(1)], exact=Truncated(9), repeats=1)
    with pytest.raises(KeyError):
        diffopt.compare(lambda rule: {Reverse(): problem}[rule](rule), [Reverse(), Reverse(1)], repeats=1)
