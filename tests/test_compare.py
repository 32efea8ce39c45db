"""``compare``: its numbers against ones made by hand, and its three ways of showing them."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure

import diffopt
from diffopt.allocations import peak_bytes
from diffopt.comparison import brief
from diffopt.diagnostics import curvature_number, krylov_residual, solves_behind
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
    Unrolled,
)
from diffopt.linear_solve import GMRES
from diffopt.record import Record
from diffopt.tasks import Quadratic

STEPS = 4


@pytest.fixture
def problem():
    quadratic = Quadratic.random(5, definite=True, generator=torch.Generator().manual_seed(1))
    initial = torch.ones(5, dtype=torch.float64, requires_grad=True)
    linear = torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()

    def solve(estimator, start=initial, lr=0.5):
        optimizer = diffopt.SGD(lr)
        return diffopt.solve(quadratic.loss, start, linear, optimizer=optimizer, steps=STEPS, estimator=estimator)

    def run(estimator):
        return quadratic.outer_loss(solve(estimator).params)

    run.solve = solve
    run.quadratic, run.closed = quadratic, quadratic.hypergradient(initial.detach(), linear.detach(), 0.5, STEPS)
    return run


def test_errors_cosines_and_counts(problem):
    rules = [Reverse(1), Truncated(1), FirstOrder(), Binomial(2), Krylov(2), Unrolled()]
    found = dict(zip(rules, diffopt.compare(problem, rules, repeats=1).rows, strict=True))
    assert found[Reverse(1)].relative_error < 1e-15
    assert found[Unrolled()].relative_error < 1e-14
    assert found[Unrolled()].products is None
    # first order: the outer gradient at the solution for the initial parameters, nothing for the linear term
    exact = torch.cat([problem.closed.initial, problem.closed.linear])
    outer = torch.linalg.solve(
        torch.linalg.matrix_power(torch.eye(5) - 0.5 * problem.quadratic.hessian, STEPS), exact[:5]
    )
    estimate = torch.cat([outer, torch.zeros(5)])
    row = found[FirstOrder()]
    assert abs(row.relative_error - float((estimate - exact).norm() / exact.norm())) < 1e-10
    assert abs(row.cosine - float(estimate @ exact / estimate.norm() / exact.norm())) < 1e-10
    counts = {rule: (r.gradients, r.products, r.depth, r.states) for rule, r in found.items()}
    assert counts[Reverse(1)] == (2 * STEPS, STEPS, STEPS, STEPS)
    assert counts[Truncated(1)] == (STEPS, 1, 1, 0)
    assert counts[FirstOrder()] == (STEPS, 0, 0, 0)
    assert counts[Binomial(2)] == (STEPS, 2 * (STEPS - 1), 2, STEPS)
    assert counts[Krylov(2)] == (STEPS, 2 * STEPS - 1 + STEPS, 3, STEPS)


def test_several_solves_and_leaves_made_inside_them():
    w = torch.tensor([1.0, -0.5], dtype=torch.float64, requires_grad=True)

    def two(estimator):
        options = {"optimizer": diffopt.SGD(0.1), "estimator": estimator}
        a = diffopt.solve(lambda p: p.pow(4).sum(), w, steps=3, **options).params
        b = diffopt.solve(lambda p, c: (p - c).square().sum(), w.detach(), w, steps=2, **options).params
        return (a * b).sum()

    table = diffopt.compare(two, [Reverse(1), Unrolled()], exact=Unrolled(), repeats=1)
    assert all(row.relative_error < 1e-14 for row in table.rows)
    assert (table.rows[0].products, table.rows[0].states) == (5, 5)


@pytest.mark.parametrize("exact", [None, Unrolled(), MultiStep(1)])
def test_a_problem_that_forgets_the_estimator_is_refused(problem, exact):
    """Whatever it runs instead: all its rows would be the same."""
    with pytest.raises(diffopt.EstimatorError, match=r"expected it to pass the estimator on: write diffopt\.solve"):
        diffopt.compare(lambda rule: problem(Unrolled()), [FirstOrder()], exact=exact)
    with pytest.raises(diffopt.EstimatorError, match="pass the estimator on"):
        diffopt.compare(lambda rule: problem(None), [FirstOrder()], exact=exact)


WEIGHTS = torch.ones(2, dtype=torch.float64, requires_grad=True)


def chunked(rule):
    """An outer loss whose graph holds no solve: each chunk of tasks is differentiated at once."""

    def task(w, x):
        return diffopt.solve(
            lambda w, x: (w * x).square().sum(), w, x, optimizer=diffopt.SGD(0.1), **options
        ).params.sum()

    options = {"steps": 2, "estimator": rule}
    return diffopt.mean_over_tasks(task, WEIGHTS, torch.ones(2).double(), in_dims=(None, 0), task_chunk=1)


class Delegating(diffopt.estimators.Estimator):
    """Not a dataclass, and run by another rule, which is the one that the graph knows."""

    def run(self, problem):
        return Reverse(1).run(problem)


@pytest.mark.parametrize(
    ("rule", "within"),
    [
        (Unrolled(), lambda problem, rule: problem(rule)),
        (Truncated(2), lambda problem, rule: problem(MultiStep(1, rule))),
        (Delegating(), lambda problem, rule: problem(rule)),
        (Reverse(1), lambda problem, rule: chunked(rule)),
    ],
    ids=["unrolled", "within another", "of ones own", "chunk by chunk"],
)
def test_a_rule_that_the_problem_does_run_is_never_taken_for_forgotten(problem, rule, within):
    given = []

    def run(estimator):
        given.append(estimator)
        return within(problem, estimator)

    table = diffopt.compare(run, [rule], exact=rule, repeats=1)
    assert all(type(estimator) is type(rule) for estimator in given)
    assert "ran no solve" not in str(table)


def test_a_rule_that_the_problem_leaves_out_alone_is_marked(problem):
    table = diffopt.compare(
        lambda rule: problem(Reverse(1) if isinstance(rule, FirstOrder) else rule),
        [FirstOrder(), Truncated(1)],
        repeats=1,
    )
    assert [row.used for row in table.rows] == [False, True]
    assert "FirstOrder(): the problem ran no solve with it, so these are numbers of another rule" in table.notes
    assert str(table).count("ran no solve") == 1


def test_a_problem_that_draws_other_numbers_at_every_call_is_refused(problem):
    with pytest.raises(diffopt.RandomnessError, match="expected the same problem at every call"):
        diffopt.compare(lambda rule: problem(rule) * torch.rand(()), [Reverse()], repeats=1)

    def seeded(rule):
        torch.manual_seed(0)
        return problem(rule) * torch.rand(())

    assert diffopt.compare(seeded, [Reverse()], repeats=1).rows[0].relative_error == 0


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
    message = (
        f"StepsError: Truncated(steps={STEPS + 1}): expected at most {STEPS}, the inner problem has only {STEPS} steps"
    )
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
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *_, **__: drawn.extend(self.axes[0].get_legend_handles_labels()[1])
    )
    table.plot("plot.png")
    assert drawn == [row.estimator for row in whole.rows]
    assert whole.complete() == whole.rows
    with pytest.raises(
        diffopt.EstimatorError, match=r"Truncated\(steps=5\) failed, expected a row of numbers: StepsErr"
    ):
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
    with pytest.raises(
        diffopt.EstimatorError, match=r"every estimator failed, .*; Truncated\(steps=9\): StepsError: Tr"
    ):
        diffopt.compare(problem, [Truncated(9), Truncated(8)], repeats=1)
    with pytest.raises(diffopt.StepsError):
        diffopt.compare(problem, [Reverse(1)], exact=Truncated(9), repeats=1)
    with pytest.raises(KeyError):
        diffopt.compare(lambda rule: {Reverse(): problem}[rule](rule), [Reverse(), Reverse(1)], repeats=1)


def test_the_curvature_number_is_steps_times_lr_times_the_largest_eigenvalue(problem):
    (node,) = solves_behind(problem(Reverse()))
    saved = node.saved_tensors
    got = curvature_number(node.call.dynamics, saved[: len(saved) - node.call.state_count], iterations=200)
    largest = float(torch.linalg.eigvalsh(problem.quadratic.hessian).max())
    assert abs(got - STEPS * 0.5 * largest) < 1e-6


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


def test_the_table_in_markdown_and_the_picture(problem, tmp_path):
    table = diffopt.compare(problem, [Reverse(), MultiStep(2, Binomial(1))], repeats=1)
    lines = table.to_markdown().splitlines()
    assert lines[0].startswith("| estimator | rel. error |")
    assert lines[3].startswith("| MultiStep(window=2, adjoint=Binomial(order=1)) |")
    assert len({line.count("|") for line in lines[:4]}) == 1
    assert table.plot(tmp_path / "plot.png").stat().st_size > 10_000


def test_the_peak_is_that_of_the_allocator():
    def work():
        kept = [torch.empty(1_000_000) for _ in range(3)]
        del kept[0]
        return torch.empty(250_000)

    assert peak_bytes(work) == 12_000_000


def test_under_a_profiler_of_the_callers_the_peak_is_not_measured(problem):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        (row,) = (table := diffopt.compare(problem, [Reverse(1)], repeats=1)).rows
    assert row.megabytes is None
    assert str(table).splitlines()[2].endswith(" -")
    assert len(profile.events()) > 0, "and the caller's profile is whole"


QUIET = """
import os, torch, diffopt
from diffopt.estimators import Reverse
before = dict(os.environ), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_rng_state()
w = torch.ones(3, requires_grad=True)
def problem(rule):
    return diffopt.solve(lambda w: w.pow(2).sum(), w, optimizer=diffopt.SGD(0.1), steps=3, estimator=rule).params.sum()
row, = diffopt.compare(problem, [Reverse(1)], repeats=1).rows
assert row.megabytes > 0
after = dict(os.environ), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_rng_state()
assert before[:3] == after[:3] and torch.equal(before[3], after[3])
"""


def test_a_comparison_says_nothing_and_leaves_the_process_as_it_was():
    environment = {key: value for key, value in os.environ.items() if key != "KINETO_LOG_LEVEL"}
    done = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, check=True, env=environment)
    assert (done.stdout, done.stderr) == ("", "")


CYCLE = """
import gc, torch
from diffopt.allocations import peak_bytes
class Cycle:
    def __init__(self):
        self.itself, self.held = self, torch.ones(1000)
def work():
    kept = torch.empty(1_000_000)
    print(gc.collect() > 0)
gc.disable()
Cycle()
assert peak_bytes(work) == 4_000_000
"""


def test_garbage_of_earlier_calls_is_collected_before_torch_watches_what_is_freed():
    """Or torch warns on stderr of blocks that it has not seen allocated."""
    done = subprocess.run([sys.executable, "-c", CYCLE], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_brief_names_what_is_not_default():
    assert brief(Implicit(GMRES(5, throw=False))) == "Implicit(solver=GMRES(max_iterations=5, throw=False))"


def test_importing_the_library_loads_neither_matplotlib_nor_the_tasks():
    program = "import sys, diffopt; print([m for m in ('matplotlib', 'einops', 'PIL', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("curvatures", [[1.0, 3.0, 2.0], [2.0, 3.0, 1.0]])
def test_the_curvature_number_is_the_larger_of_the_first_steps_and_the_lasts(curvatures):
    batches = torch.tensor(curvatures, dtype=torch.float64)
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = diffopt.SGD(0.1)
    final = diffopt.solve(lambda w, h: h * w.square().sum() / 2, w, optimizer=optimizer, steps=3, batches=batches)
    (node,) = solves_behind(final.params.sum())
    inputs = node.saved_tensors[: len(node.saved_tensors) - node.call.state_count]
    assert curvature_number(node.call.dynamics, inputs) == pytest.approx(3 * 0.1 * 2.0, rel=1e-12)


def test_a_comparison_goes_on_where_the_curvature_cannot_be_computed():
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)

    def random(estimator):
        torch.manual_seed(0)
        options = {"optimizer": diffopt.SGD(0.1), "steps": 3, "estimator": estimator}
        return diffopt.solve(lambda w: (torch.rand(3) * w).square().sum(), w, **options).params.square().sum()

    table = diffopt.compare(random, [Reverse(1), Truncated(3)], repeats=1)
    assert table.curvature is None
    assert max(row.relative_error for row in table.rows) < 1e-14
