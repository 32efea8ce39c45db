"""``compare``: its numbers against ones made by hand, and its three ways of showing them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from compared import STEPS

import diffopt
from diffopt.adjoint.autograd_function import solves_behind
from diffopt.comparing.comparison import brief
from diffopt.comparing.curvature import curvature_number
from diffopt.estimators import Binomial, FirstOrder, Implicit, Krylov, MultiStep, Reverse, Truncated, Unrolled
from diffopt.linear_solve import GMRES
from diffopt.tensors.memory import peak_bytes


def test_errors_cosines_and_counts(problem):
    estimators = [Reverse(1), Truncated(1), FirstOrder(), Binomial(2), Krylov(2), Unrolled()]
    found = dict(zip(estimators, diffopt.compare(problem, estimators, repeats=1).rows, strict=True))
    assert found[Reverse(1)].relative_error < 1e-12
    assert found[Unrolled()].relative_error < 1e-12
    assert found[Unrolled()].products is None
    # first order: the outer gradient at the solution for the initial parameters, nothing for the linear term
    exact = torch.cat([problem.closed.initial, problem.closed.linear])
    outer = torch.linalg.solve((torch.eye(5) - 0.5 * problem.quadratic.hessian).matrix_power(STEPS), exact[:5])
    estimate = torch.cat([outer, torch.zeros(5)])
    row = found[FirstOrder()]
    assert abs(row.relative_error - float((estimate - exact).norm() / exact.norm())) < 1e-10
    assert abs(row.cosine - float(estimate @ exact / estimate.norm() / exact.norm())) < 1e-10
    counts = {estimator: (r.gradients, r.products, r.depth, r.states) for estimator, r in found.items()}
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
    assert all(row.relative_error < 1e-12 for row in table.rows)
    assert (table.rows[0].products, table.rows[0].states) == (5, 5)


def test_the_curvature_number_is_steps_times_lr_times_the_largest_eigenvalue(problem):
    loss = problem(Reverse())  # kept: an old torch frees what its graph saved along with it
    (node,) = solves_behind(loss)
    saved = node.saved_tensors
    got = curvature_number(node.call.dynamics, saved[: len(saved) - node.call.state_count], iterations=200)
    largest = float(torch.linalg.eigvalsh(problem.quadratic.hessian).max())
    assert abs(got - STEPS * 0.5 * largest) < 1e-6


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
from diffopt.tensors.memory import peak_bytes
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
    assert max(row.relative_error for row in table.rows) < 1e-12
