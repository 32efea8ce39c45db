"""The benchmarks' answers at tiny sizes, in float64, and what is made of their numbers.

The reference there, the plain loop, is itself compared with differences and with explicit matrices.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torchopt")  # it calls functorch by its old name

CPU = torch.device("cpu")
WORKLOADS = ("sinusoid", "images", "penalties", "weights", "binomial", "leaves", "long")


@pytest.fixture(scope="module")
def bench(checkout: Path) -> Iterator[ModuleType]:
    """The package ``benchmarks``, which is not installed, with all its modules loaded."""
    lacking = [name for name in ("higher", "torchopt", "matplotlib", "rich") if not importlib.util.find_spec(name)]
    if lacking:
        pytest.skip(f"needs {', '.join(lacking)}: pip install -e '.[bench]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(checkout))
        importlib.import_module("benchmarks.__main__")
        importlib.import_module("benchmarks.document")
        yield importlib.import_module("benchmarks")


FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
MODULES = {path.relative_to(FOLDER.parent).as_posix(): path for path in sorted(FOLDER.rglob("*.py"))}


@pytest.mark.parametrize("file", MODULES)
def test_every_name_that_a_benchmark_imports_is_where_it_says(bench, file):
    """Also those imported within functions: a benchmark that is seldom run must not break where something moves."""
    importlib.import_module(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    for node in ast.walk(ast.parse(MODULES[file].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("diffopt", "benchmarks"):
            source = importlib.import_module(str(node.module))
            assert [name.name for name in node.names if not has(source, name.name)] == []


def has(source, name):
    """Whether a module has this name, or a module of it beside it."""
    return hasattr(source, name) or importlib.util.find_spec(f"{source.__name__}.{name}") is not None


def smoke_cells(bench, workload):
    return importlib.import_module(f"benchmarks.workloads.{workload}").cells(bench.measure.Size.SMOKE)


WITH_PROGRAMS = ("binomial",)
"""Those whose smallest cells have programs, which a compiler makes: of numbers that the other tests do not have."""


@pytest.mark.parametrize(
    "workload",
    [pytest.param(x, marks=[pytest.mark.slow, pytest.mark.compiler] if x in WITH_PROGRAMS else []) for x in WORKLOADS],
)
def test_every_method_that_counts_gives_the_reference_answer(bench, workload):
    role = bench.measure.Role
    for cell in smoke_cells(bench, workload):
        errors = bench.measure.relative_errors(cell, CPU)
        by_role = {
            kind: [e for e, m in zip(errors, cell.methods, strict=True) if m.role is kind and e is not None]
            for kind in bench.measure.Role
        }
        # round-off of a few steps in float64, amplified by max-pooling's and ReLU's choices at most a little
        exact = (role.PEER, role.LOOP_PEER, role.JAX, role.LIMIT, role.OURS)
        assert max(error for kind in exact for error in by_role[kind]) < 1e-11
        # what is said to be wrong or biased is, if not by much: else the label is out of date
        assert all(error > 1e-6 for error in by_role[role.WRONG_PEER])
        assert all(1e-12 < error < 0.1 for kind in (role.BIASED, role.BIASED_PEER) for error in by_role[kind])


def test_a_peer_that_is_not_installed_costs_its_own_row_only(bench):
    method = bench.measure.Method("no such peer", bench.measure.Role.JAX, lambda problem: 1 / 0, needs="no_such_peer")
    cell = smoke_cells(bench, "leaves")[0]
    cell = dataclasses.replace(cell, methods=(cell.methods[0], method))
    result = bench.measure.measure(cell, CPU, bench.measure.Limit(0.0, (1, 1)))
    missing = result.of("no such peer")
    assert (missing.error, missing.times, missing.peak, missing.missing) == (None, [], None, "not installed")
    assert bench.report.cell_rows(result)[1][:3] == ("no such peer", "-", "not installed")
    assert result.fastest([bench.measure.Role.JAX]) is None


@pytest.mark.slow
@pytest.mark.compiler
def test_compiled_methods_give_the_reference_answer(bench):
    cell = smoke_cells(bench, "sinusoid")[0]
    cell = dataclasses.replace(cell, methods=(cell.methods[0], *bench.workloads.sinusoid.PROGRAMS))
    assert max(bench.measure.relative_errors(cell, CPU)) < 1e-11


@pytest.mark.parametrize("seconds", [1.0, 0.004, 1e-6])
@pytest.mark.parametrize("rounds", [1, 15, 31])
def test_no_call_that_is_timed_is_one_that_a_program_makes_plainly_as_well(bench, monkeypatch, seconds, rounds):
    calls = []
    monkeypatch.setattr(bench.measure, "seconds_of", lambda work, device: work() or seconds)
    assert bench.measure._settled(lambda: calls.append(0), CPU, rounds) == ""
    before = len(calls)
    limit = bench.measure.Limit(1e9, (1, rounds))
    bench.measure.interleaved([lambda: calls.append(0)], CPU, limit.share, limit.rounds)
    calls.append(0)  # the one that is weighed
    plain = {2**power for power in range(30)}
    assert not plain & set(range(before + 1, len(calls) + 1))


def test_what_is_made_for_a_problem_is_made_once_and_let_go_with_it(bench):
    made = []
    way = bench.measure.Prepared(lambda problem: made.append(problem) or (lambda: [len(made)]))
    first, second = object(), object()
    assert [way(first), way(first), way(second), way(first)] == [[1], [1], [2], [3]]
    assert made == [first, second, first]


@pytest.mark.parametrize("workload", ["sinusoid", "penalties", "weights", "long"])
def test_the_reference_agrees_with_differences_of_the_outer_loss(bench, workload):
    torch.manual_seed(0)
    problem = smoke_cells(bench, workload)[0].make(torch.float64, CPU, 2)
    name = "hyper" if problem.hyper else "initial"
    at = getattr(problem, name)
    direction = {key: torch.randn_like(x) for key, x in at.items()}

    def moved(amount):
        shifted = {key: x + amount * direction[key] for key, x in at.items()}
        return outer_loss(dataclasses.replace(problem, **{name: shifted}))

    gradient = bench.peers.loop.unroll(problem)
    slope = sum((g * d).sum() for g, d in zip(gradient, direction.values(), strict=True))
    step = 1e-6  # truncation 1e-12 and round-off 1e-10 of the loss; no kink of a ReLU lies between
    assert float(slope) == pytest.approx((moved(step) - moved(-step)) / (2 * step), rel=1e-6)


def outer_loss(problem):
    """The mean outer loss, by torch's own SGD."""
    total = 0.0
    for support, query in problem.tasks():
        params = {key: x.clone().requires_grad_() for key, x in problem.initial.items()}
        optimizer = torch.optim.SGD(list(params.values()), lr=problem.lr, momentum=problem.momentum)
        for _ in range(problem.steps):
            optimizer.zero_grad()
            problem.inner(params, problem.hyper, support).backward()
            optimizer.step()
        total += problem.outer(params, query).item() / problem.count
    return total


def test_conjugate_gradients_of_the_peer_solve_the_system(bench):
    """Twenty products for twenty unknowns: the explicit Hessian's solution."""
    cell = next(cell for cell in smoke_cells(bench, "penalties") if cell.setting == "CG(20)")
    problem = cell.make(torch.float64, CPU, 1)
    support, query = next(problem.tasks())
    w, log_penalty = problem.initial["w"], problem.hyper["log_penalty"]

    def inner(w):
        return problem.inner({"w": w}, problem.hyper, support)

    hessian = torch.autograd.functional.hessian(inner, w)
    outer_gradient = torch.autograd.functional.jacobian(lambda w: problem.outer({"w": w}, query), w)
    mixed = torch.diag(log_penalty.exp() * w)
    expected = -mixed @ torch.linalg.solve(hessian, outer_gradient)
    for method in cell.methods:
        if not method.lacks(CPU):
            # conjugate gradients lose orthogonality: far above round-off, far below any fault
            found = torch.from_numpy(method.run(problem)[0].__array__().copy())
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_goals_are_judged_by_ratios_within_rounds(bench):
    role = bench.measure.Role

    def took(name, kind, *times, peak=100):
        return bench.measure.Measurement(name, kind, 0.0, list(times), peak)

    measured = [
        took("plain loop", role.LOOP_PEER, 20.0, 40.0, 20.0),
        took("functorch, backward outside", role.PEER, 2.0, 4.0, 2.0),
        took("cheat", role.WRONG_PEER, 0.1, 0.1, 0.1),
        took("ours, graphs", role.OURS, 1.0, 2.0, 1.8, peak=400),
    ]
    verdicts = bench.goals.judge([bench.measure.Result("W1", "T=5 B=25", tuple(measured))])
    (time, memory, loops) = [v for v in verdicts if v.goal.method == "ours, graphs"]
    assert (time.against, time.measured, time.met) == ("functorch, backward outside", 0.5, True)
    assert (time.low, time.high) == pytest.approx((0.5, 0.7))
    assert (memory.measured, memory.met) == (4.0, False)
    assert (loops.against, loops.measured) == ("plain loop", 0.05)


@pytest.mark.parametrize(("jax", "against", "measured"), [((), "", None), ((0.4, 0.8, 0.4), "JAX", 1.25)])
def test_a_goal_of_a_program_is_not_judged_without_jax(bench, jax, against, measured):
    role = bench.measure.Role
    rows = [
        bench.measure.Measurement("functorch, backward outside", role.PEER, 0.0, [2.0, 4.0, 2.0], 1),
        bench.measure.Measurement("JAX", role.JAX, 0.0, list(jax), 1, "" if jax else "not installed"),
        bench.measure.Measurement("ours, compiled program", role.OURS, 0.0, [0.5, 1.0, 0.5], 1),
    ]
    (verdict,) = [
        v
        for v in bench.goals.judge([bench.measure.Result("W1", "T=5 B=25", tuple(rows))])
        if v.goal.method == "ours, compiled program"
    ]
    assert (verdict.against, verdict.measured) == (against, measured)
    assert verdict.met is (None if measured is None else False)
    page = bench.document.reasons([verdict])
    assert page == "No goal was missed." if measured is None else page.startswith("- **W1 T=5 B=25 (ours, compiled")


def test_every_goal_names_a_cell_that_is_measured(bench):
    size = bench.measure.Size.FULL
    cells = {f"{c.workload} {c.setting}": c for make in bench.__main__.CELLS.values() for c in make(size)}
    cells |= {f"{c.workload} {c.setting}": c for c in bench.gpu.cells(size)}
    for goal in bench.goals.GOALS:
        names = [method.name for method in cells[goal.cell].methods]
        assert goal.method in names
        assert not isinstance(goal.against, str) or goal.against in [*names, bench.goals.MEGABYTES]
    for cell in cells.values():
        assert len({method.name for method in cell.methods}) == len(cell.methods)


def test_rounds_run_to_and_fro_after_one_to_warm_up(bench, monkeypatch):
    monkeypatch.setattr(bench.measure, "LONG_ENOUGH", 0.0)
    seen = []
    jobs = [lambda: seen.append("a"), lambda: seen.append("b")]
    times = bench.measure.interleaved(jobs, CPU, 0.0, (2, 5))
    assert "".join(seen) == "ab" + "ab" + "ba"
    assert [len(own) for own in times] == [2, 2]


def test_short_calls_are_repeated_within_their_round_and_long_ones_are_not(bench, monkeypatch):
    took = {"short": 0.001, "long": 0.02, "all": []}

    def seconds_of(work, device):
        took["all"].clear()
        work()
        return sum(took["all"])

    monkeypatch.setattr(bench.measure, "seconds_of", seconds_of)
    counts = {"short": 0, "long": 0}

    def job(name):
        counts[name] += 1
        took["all"].append(took[name])

    times = bench.measure.interleaved([lambda: job("short"), lambda: job("long")], CPU, 0.0, (3, 5))
    assert counts == {"short": 1 + 3 * bench.measure.MOST_CALLS, "long": 1 + 3}
    assert [pytest.approx(own) for own in times] == [[0.001] * 3, [0.02] * 3]


@pytest.mark.slow
def test_a_report_survives_its_file_and_becomes_a_page(bench, tmp_path):
    cells = [dataclasses.replace(cell, x=i + 1) for i, cell in enumerate(smoke_cells(bench, "sinusoid") * 2)]
    cells.append(dataclasses.replace(cells[0], x=None, setting="T=5 B=4"))
    limit = bench.measure.Limit(0.0, (1, 1))
    results = [bench.measure.measure(cell, CPU, limit) for cell in cells]
    for result in results[:2]:
        object.__setattr__(result, "workload", "Steps")
    report = bench.report.Report(bench.report.about("python -m benchmarks"), results)
    report.save(tmp_path / "results.json")
    assert bench.report.Report.load(tmp_path / "results.json") == report
    assert json.loads((tmp_path / "results.json").read_text())["about"]["command"] == "python -m benchmarks"
    bench.document.write(report, tmp_path)
    page = (tmp_path / "performance.md").read_text()
    assert "| W1 T=5 B=4 | ours, graphs | " in page
    assert "performance/steps.png" in page
    assert (tmp_path / "performance" / "steps.png").stat().st_size > 5000
