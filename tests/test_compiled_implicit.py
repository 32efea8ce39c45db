"""Implicit gradients in compiled programs: the numbers of the plain way, its diagnostics, errors and refusals.

The graphs run as they are here, uncompiled; inductor is asked by the slow tests only.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interpreted import Interpreted
from oracles import relative_error
from test_compiled_programs import with_gradients
from torch import Tensor
from torch.func import vmap

import diffopt
from diffopt.estimators import Implicit
from diffopt.linear_solve import GMRES, ConjugateGradient, Dense, LinearSolver, Neumann, Nystrom
from diffopt.linear_solve.loop import repeated
from diffopt.rollout.program import Program, _from_store
from diffopt.tensors import tracing
from diffopt.tensors.leaves import Leaves

pytestmark = pytest.mark.compiler

SOLVERS = (
    None,
    ConjugateGradient(max_iterations=40, rtol=1e-12),
    ConjugateGradient(max_iterations=2, throw=False),
    Neumann(terms=15, rtol=None),
    Neumann(terms=400, step_size=0.1, rtol=1e-10),
    Nystrom(4, damping=0.2),
    Nystrom(1, damping=50.0, seed=1),
)
GENERATOR = torch.Generator().manual_seed(0)
X, Y = (torch.randn(2, 6, n, generator=GENERATOR, dtype=torch.float64) for n in (3, 1))
PENALTY, SCALE = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64), torch.tensor(1.1, dtype=torch.float64)


def loss(params: Any, penalty: Tensor, scale: Tensor, x: Tensor, y: Tensor) -> Tensor:
    error = x @ params["w"] + params["b"] - scale * y[:, 0]
    return (error**2).mean() + 0.05 * (error**4).mean() + (penalty.exp() * params["w"] ** 2).sum() + params["b"] ** 2


def minimum(penalty: Tensor, scale: Tensor, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """By Newton's method."""
    flat = torch.zeros(4, dtype=torch.float64)

    def of(flat: Tensor) -> Tensor:
        return loss({"w": flat[:3], "b": flat[3]}, penalty, scale, x, y)

    for _ in range(20):
        flat = flat - torch.linalg.solve(torch.func.jacrev(torch.func.grad(of))(flat), torch.func.grad(of)(flat))
    return {"w": flat[:3], "b": flat[3]}


def of_task(solver: LinearSolver | None, **options: Any) -> Callable[..., Tensor]:
    def outer(penalty: Tensor, scale: Tensor, w: Tensor, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
        found = diffopt.implicit(loss, {"w": w, "b": b}, penalty, scale, x, y, solver=solver, **options)
        return (found["w"] ** 3).sum() + found["b"].sin() + 0.1 * scale

    return outer


def alone(solver: LinearSolver | None, **options: Any) -> tuple[Callable[..., Tensor], list[Tensor]]:
    best = minimum(PENALTY, SCALE, X[0], Y[0])
    return of_task(solver, **options), [PENALTY, SCALE, best["w"], best["b"], X[0], Y[0]]


def together(solver: LinearSolver | None, **options: Any) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Two tasks, of which each has a penalty and a minimum of its own."""
    penalties = torch.stack([PENALTY, 2 * PENALTY])
    best = [minimum(p, SCALE, x, y) for p, x, y in zip(penalties, X, Y, strict=True)]
    stacked = [torch.stack([one[name] for one in best]) for name in ("w", "b")]

    def outer(penalties: Tensor, scale: Tensor, *own: Tensor) -> Tensor:
        return vmap(of_task(solver, **options), (0, None, 0, 0, 0, 0))(penalties, scale, *own).sum()

    return outer, [penalties, SCALE, *stacked, X, Y]


def nested(solver: LinearSolver | None, **options: Any) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The same with two scales for each task, in a vmap of their own."""
    _, tensors = together(solver)

    def outer(penalties: Tensor, scales: Tensor, *own: Tensor) -> Tensor:
        one = vmap(of_task(solver, **options), (None, 0, None, None, None, None))
        return vmap(one, (0, None, 0, 0, 0, 0))(penalties, scales, *own).sum()

    return outer, [tensors[0], torch.stack([SCALE, 0.9 * SCALE]), *tensors[2:]]


def traced(outer: Callable[..., Tensor], tensors: list[Tensor], count: int = 2) -> Callable[[list[Tensor]], float]:
    """Of a graph: by how much it is off at other numbers; NaN where it says that they are not to be used."""
    function = with_gradients(outer, count)
    graph, captured = tracing.trace(function, tensors)

    def off(others: list[Tensor]) -> float:
        found, expected = graph(*others, *captured), function(*others)
        return relative_error([found[0], *found[2:]], [expected[0], *expected[2:]]) + float(found[1])

    return off


@pytest.mark.slow
@pytest.mark.parametrize("made", [alone, together, nested])
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_every_solver_has_the_numbers_of_the_plain_way(solver: LinearSolver | None, made: Any) -> None:
    """By two hyperparameters of the loss, at other numbers than those that were traced."""
    check_numbers(solver, made)


@pytest.mark.parametrize(("solver", "made"), [(SOLVERS[1], nested), (SOLVERS[3], together), (SOLVERS[5], together)])
def test_some_solvers_have_the_numbers_of_the_plain_way(solver: LinearSolver | None, made: Any) -> None:
    """Of what the test above looks at whole."""
    check_numbers(solver, made)


def check_numbers(solver: LinearSolver | None, made: Any) -> None:
    outer, tensors = made(solver, stationarity=None)
    generator = torch.Generator().manual_seed(1)
    others = [x + 0.05 * torch.rand(x.shape, generator=generator, dtype=x.dtype) for x in tensors]
    assert traced(outer, tensors)(others) < 1e-10


@pytest.mark.parametrize("made", [alone])
def test_single_precision_judges_the_true_residual(made: Any) -> None:
    outer, tensors = made(ConjugateGradient(rtol=1e-4))
    assert traced(outer, [x.float() for x in tensors])([x.float() for x in tensors]) < 1e-4


@pytest.mark.parametrize("solver", [SOLVERS[2], SOLVERS[4], SOLVERS[6]], ids=repr)
def test_diagnostics_are_those_of_the_plain_way(solver: LinearSolver) -> None:
    """How many products were made, how large the residual is, what has converged, and the solution itself."""

    def function(*tensors: Tensor) -> list[Tensor]:
        penalty, scale, w, b, x, y = tensors
        found = diffopt.implicit_gradients(
            loss, {"w": w, "b": b}, penalty, scale, x, y, cotangent={"w": w + 1, "b": b - 1}, solver=solver
        )
        return [*found.args[:2], *found.multiplier.values(), *found.system[1:]]

    _, tensors = alone(solver)
    graph, captured = tracing.trace(function, tensors)
    others = [1.1 * x for x in tensors]
    for found, expected in zip(graph(*others, *captured), function(*others), strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_trace_evaluates_the_inner_loss_once() -> None:
    """At the point; the backward pass differentiates that graph. The same of a solve of one step."""
    calls: list[None] = []

    def counted(w: Tensor, a: Tensor) -> Tensor:
        calls.append(None)
        return ((w - a) ** 2).sum()

    def implicit(a: Tensor) -> Tensor:
        return diffopt.implicit(counted, a.detach(), a, stationarity=None).square().sum()

    def one_step(a: Tensor) -> Tensor:
        end = diffopt.solve(counted, a + 1, a, optimizer=diffopt.SGD(0.1), steps=1)
        return (end.params**2 + end.losses[0] * a).sum()

    for outer in (implicit, one_step):
        calls.clear()
        function = with_gradients(outer, 1)
        graph, captured = tracing.trace(function, [PENALTY])
        assert len(calls) == 1
        found, expected = graph(2 * PENALTY, *captured), function(2 * PENALTY)
        assert relative_error([found[0], found[2]], [expected[0], expected[2]]) < 1e-12


def test_a_step_whose_graph_is_kept_is_looked_at() -> None:
    """Its gradient, which the outer loss does not see, is infinite."""

    def function(a: Tensor) -> list[Tensor]:
        trace = tracing.current()
        assert trace is not None
        a = a.detach().requires_grad_()
        with torch.enable_grad():
            found = diffopt.implicit(lambda w, a: (w * a).sqrt().sum(), torch.zeros(2).double(), a, stationarity=None)
        return [found.detach(), trace.unsound(found)]

    graph, captured = tracing.trace(function, [A.abs()])
    assert graph(A.abs(), *captured)[1].isnan()


def test_in_single_precision_no_more_products_are_made_than_in_the_plain_way() -> None:
    """One more, for the true residual, where the recurrence says that it has converged, and none where it does not."""
    for rtol, products in ((1e-3, 4), (0.0, 3)):

        def function(scale: Tensor, rtol: float = rtol) -> list[Tensor]:
            diagonal = torch.tensor([1.0, 2.0, 3.0])
            solver = ConjugateGradient(3, rtol, throw=False)
            return list(solver.solve(lambda x: diagonal * scale * x, torch.ones(3))[:4])

        graph, captured = tracing.trace(function, [SCALE.float()])
        with torch.no_grad():
            found, expected = graph(SCALE.float(), *captured), function(SCALE.float())
        assert int(found[2]) == int(expected[2]) == products
        assert bool(found[3]) is bool(expected[3]) is (rtol > 0)


def test_a_loop_is_given_a_matrix_once_and_not_its_transpose() -> None:
    """Of three axes as well; the numbers are those of the plain way, at other numbers than those traced."""
    matrix, cube = (torch.randn(shape, generator=GENERATOR, dtype=torch.float64) for shape in ((4, 3), (4, 5, 3)))

    def outer(a: Tensor, matrix: Tensor, cube: Tensor) -> Tensor:
        def inner(w: Tensor, a: Tensor) -> Tensor:
            return ((matrix @ w) ** 4).sum() + ((cube @ w) ** 2).sum() + (a.exp() * w**2).sum()

        solver = ConjugateGradient(2, throw=False)
        return diffopt.implicit(inner, a.detach() + 1, a, solver=solver, stationarity=None).sin().sum()

    function = with_gradients(lambda a, matrix, cube: outer(a, matrix.detach(), cube.detach()), 1)
    graph, captured = tracing.trace(function, [PENALTY, matrix, cube])
    loop = next(node for node in graph.graph.nodes if "while_loop" in str(node.target) and node.op == "call_function")
    given = [tuple(node.meta["val"].shape) for node in loop.args[3]]
    assert (3, 4) not in given
    others = [2 * x for x in (PENALTY, matrix, cube)]
    found, expected = graph(*others, *captured), function(*others)
    assert relative_error([found[0], found[2]], [expected[0], expected[2]]) < 1e-12


def test_a_loop_stops_where_the_plain_one_does() -> None:
    """Of many products that are allowed few are made: as many as for the worst task."""

    def products(rtol: float, most: int) -> Callable[..., list[Tensor]]:
        def function(scale: Tensor) -> list[Tensor]:
            b = torch.ones(5, dtype=torch.float64)
            diagonal = torch.arange(1.0, 6, dtype=torch.float64)
            found = ConjugateGradient(most, rtol, throw=False).solve(lambda x: diagonal * scale * x, b)
            return [found.iterations, found.value]

        return function

    for most, expected in ((10_000_000, 5), (3, 3)):
        graph, captured = tracing.trace(products(1e-10, most), [SCALE])
        with torch.no_grad():
            found = graph(2 * SCALE, *captured)
        assert int(found[0]) == expected


@pytest.mark.parametrize(("most", "end"), [(1000, 5), (3, 3), (0, 0)])
def test_a_loop_ends_when_no_task_goes_on_or_at_its_limit(most: int, end: int) -> None:
    """One that does not stand still by itself; two tasks, of which the second goes on for longer."""

    def function(scale: Tensor) -> list[Tensor]:
        def step(x: Leaves, number: Leaves) -> list[Leaves]:
            return [x + scale, number + 1]

        carry = [Leaves([torch.zeros(2, dtype=torch.float64)]), Leaves([torch.zeros(2, dtype=torch.int64)])]
        end = torch.tensor([2, 5])
        x, number = repeated(step, carry, most, lambda x, number: number[0] < end)
        return [*x, *number]

    for form in (tracing.trace(function, [SCALE])[0], function):
        with torch.no_grad():
            x, number = form(2 * SCALE, *([] if form is function else [torch.tensor([2, 5])]))
        assert number.tolist() == [end, end]
        assert torch.equal(x, torch.full_like(x, float(2 * end * SCALE))) or torch.allclose(x, 2 * end * SCALE)


# ------------------------------------------------------------------------------------------- what is looked at


def kinked(params: Any, penalty: Tensor, scale: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return loss(params, penalty, scale, x, y) + (10 * params["w"][0]).abs()


def test_points_that_are_no_minimum_are_noticed() -> None:
    """A large gradient, a small one in its units whose minimum is far, and a kink: the plain way then raises."""
    outer, tensors = alone(None)
    function = with_gradients(outer, 2)
    graph, captured = tracing.trace(function, tensors)
    assert float(graph(*tensors, *captured)[1]) == 0
    far = [*tensors[:2], tensors[2] + 1, *tensors[3:]]
    assert graph(*far, *captured)[1].isnan()
    with pytest.raises(diffopt.errors.StationarityError, match="gradient"):
        function(*far)

    def small(a: Tensor, w: Tensor) -> Tensor:
        return diffopt.implicit(lambda w, a: 1e-4 * ((w - a) ** 2).sum(), w, a).sum()

    here = torch.ones(2, dtype=torch.float64)
    found = tracing.trace(with_gradients(small, 1), [here, here])[0]
    assert float(found(here, here)[1]) == 0
    assert found(here, 2 * here)[1].isnan()
    with pytest.raises(diffopt.errors.StationarityError, match="Newton step"):
        with_gradients(small, 1)(here, 2 * here)


def test_a_kink_is_noticed_and_a_zero_without_one_is_none() -> None:
    def outer(a: Tensor, w: Tensor, kink: Tensor) -> Tensor:
        return diffopt.implicit(lambda w, a: ((w - a) ** 2).sum() + kink * w[0].abs(), w, a).sum()

    def here(w: list[float], a: list[float], kink: float) -> list[Tensor]:
        return [torch.tensor(x, dtype=torch.float64) for x in (a, w, kink)]

    function = with_gradients(outer, 1)
    smooth, kink = here([0.0, 1.0], [0.0, 1.0], 0.0), here([0.0, 1.0], [1e-3, 1.0], 0.01)
    graph, captured = tracing.trace(function, smooth)
    assert float(graph(*smooth, *captured)[1]) == 0
    assert graph(*kink, *captured)[1].isnan()
    with pytest.raises(diffopt.errors.StationarityError, match="kink"):
        function(*kink)


@pytest.mark.parametrize("solver", [Nystrom(2, damping=0.1), ConjugateGradient()], ids=repr)
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_start_or_cotangent_that_is_not_finite_is_noticed(solver: LinearSolver, number: float) -> None:
    """Also by a solver that does not look at where it starts."""

    def outer(a: Tensor, cotangent: Tensor, start: Tensor) -> Tensor:
        found = diffopt.implicit_gradients(
            lambda w, a: ((w - a) ** 2).sum(), a.detach(), a, cotangent=cotangent, start=start, solver=solver
        )
        return a.sum() + found.args[0].sum()

    one = torch.ones(2, dtype=torch.float64)
    function = with_gradients(outer, 1)
    graph, captured = tracing.trace(function, [one, one, one])
    assert float(graph(one, one, one, *captured)[1]) == 0
    for name, given in (("start", [one, one, number * one]), ("cotangent", [one, number * one, one])):
        assert graph(*given, *captured)[1].isnan()
        with pytest.raises(diffopt.LinearSolveError, match=f"{name} holds NaN"):
            function(*given)


@pytest.mark.parametrize("made", [alone, together])
def test_a_system_that_is_not_solved_is_noticed(made: Any) -> None:
    """Too few products, or a curvature that is negative; with ``throw=False`` it is taken as it is."""
    outer, tensors = made(ConjugateGradient(max_iterations=1))
    assert tracing.trace(with_gradients(outer, 2), tensors)[0](*tensors)[1].isnan()
    with pytest.raises(diffopt.LinearSolveError, match="did not converge"):
        with_gradients(outer, 2)(*tensors)
    outer, tensors = made(ConjugateGradient(max_iterations=1, throw=False))
    assert float(tracing.trace(with_gradients(outer, 2), tensors)[0](*tensors)[1]) == 0


def saddle(a: Tensor, w: Tensor) -> Tensor:
    return diffopt.implicit(lambda w, a: (a * w**2).sum(), w, a).sum()


def test_a_breakdown_of_one_task_is_noticed() -> None:
    def outer(a: Tensor, w: Tensor) -> Tensor:
        return vmap(saddle, (0, None))(a, w).sum()

    a, w = torch.ones(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    graph, captured = tracing.trace(with_gradients(outer, 1), [a, w])
    assert float(graph(a, w, *captured)[1]) == 0
    a[1] = -1
    assert graph(a, w, *captured)[1].isnan()
    with pytest.raises(diffopt.LinearSolveError, match="broke down"):
        with_gradients(outer, 1)(a, w)


# ------------------------------------------------------------------------------------------- solves by Implicit


def quadratic(w: Tensor, a: Tensor) -> Tensor:
    return 0.5 * (a.exp() * (w - a) ** 2).sum() + 0.1 * (w**4).sum()


A, W = torch.tensor([0.4, -0.3], dtype=torch.float64), torch.tensor([2.0, -1.0], dtype=torch.float64)


def solved(a: Tensor, w: Tensor, strength: Tensor, steps: int = 60, **options: Any) -> Tensor:
    rule = Implicit(**options)
    optimizer = diffopt.ProximalGD(0.2, strength=strength)
    return diffopt.solve(quadratic, w, a, optimizer=optimizer, steps=steps, estimator=rule).params.sin().sum()


@pytest.mark.parametrize(("tasks", "whole_state"), [(False, True), (True, False)])
def test_a_solve_by_implicit_with_a_learned_damping(tasks: bool, whole_state: bool) -> None:
    """By what the loss reads, the center of the proximal term, and its strength, a damping that each task learns."""
    solver = Neumann(terms=500, step_size=1.0, rtol=1e-12) if whole_state else ConjugateGradient(rtol=1e-12)

    def outer(a: Tensor, w: Tensor, strength: Tensor) -> Tensor:
        if not tasks:
            return solved(a, w, strength, solver=solver, whole_state=whole_state)
        own = strength * torch.tensor([1.0, 1.5], dtype=torch.float64)
        one = vmap(lambda s: solved(a, w, s, solver=solver, whole_state=whole_state))
        return one(own).sum()

    strength = torch.tensor(0.5, dtype=torch.float64)
    assert traced(outer, [A, W, strength], 3)([1.1 * A, 0.9 * W, 1.2 * strength]) < 1e-10


def test_a_solve_that_is_not_finished_is_noticed() -> None:
    """The plain way then warns."""

    def outer(a: Tensor, w: Tensor) -> Tensor:
        return diffopt.solve(quadratic, w, a, optimizer=diffopt.SGD(0.05), steps=2, estimator=Implicit()).params.sum()

    function = with_gradients(outer, 1)
    graph, captured = tracing.trace(function, [A, A])
    assert graph(A, W, *captured)[1].isnan()
    with pytest.warns(diffopt.errors.EstimateWarning, match="no fixed point"):
        function(A, W)


def of_buffers(a: Tensor, w: Tensor) -> Tensor:
    optimizer = diffopt.SGD(0.1, momentum=0.5)
    end = diffopt.solve(quadratic, w, a, optimizer=optimizer, steps=100, estimator=Implicit())
    return end.params.sum() + sum([(x * a).sum() for x in end.state.buffers.values()])


def test_an_outer_loss_of_buffers_that_are_held_is_noticed() -> None:
    function = with_gradients(of_buffers, 1)
    graph, captured = tracing.trace(function, [A, W])
    assert graph(A, W, *captured)[1].isnan()
    with pytest.warns(diffopt.errors.EstimateWarning, match="holds fixed"):
        function(A, W)


# ------------------------------------------------------------------------------------------- what is refused


def of_a_field(penalty: Tensor, w: Tensor) -> Tensor:
    return diffopt.implicit(diffopt.VectorField(lambda w, p: (p.exp() + 1) * w - p), w, penalty).sum()


def within(penalty: Tensor, w: Tensor) -> Tensor:
    def inner(w: Tensor, penalty: Tensor) -> Tensor:
        point = diffopt.implicit(lambda v, p: ((v - p) ** 2).sum(), penalty.detach(), penalty)
        return ((w - point.detach()) ** 2).sum()

    return diffopt.solve(inner, w, penalty, optimizer=diffopt.SGD(0.1), steps=2).params.sum()


@pytest.mark.parametrize(
    ("outer", "why"),
    [
        (alone(GMRES())[0], "GMRES"),
        (alone(Dense())[0], "Dense, whose decompositions"),
        (of_a_field, "GMRES"),
        (within, "within the loss"),
    ],
)
def test_what_cannot_be_compiled_runs_plainly_after_one_warning(outer: Any, why: str) -> None:
    p, w = PENALTY.clone(), PENALTY / (PENALTY.exp() + 1)
    tensors = alone(None)[1] if outer not in (of_a_field, within) else [p, w]
    program = diffopt.compiled(outer)
    with pytest.warns(diffopt.CompileWarning, match=why):
        program.value_and_grad(*tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value, gradient = program.value_and_grad(*tensors)
    expected = with_gradients(outer, 1)(*tensors)
    assert relative_error([value, gradient], [expected[0], expected[2]]) < 1e-12


# ------------------------------------------------------------------------------------------- the compiled function


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> type[Interpreted]:
    monkeypatch.setattr("diffopt.outer_program.Program", Interpreted)
    monkeypatch.setattr(Interpreted, "made", 0)
    return Interpreted


def test_calls_raise_what_the_plain_way_raises_and_go_on(interpreted: type[Interpreted]) -> None:
    outer, tensors = alone(None)
    program = diffopt.compiled(outer)
    first = program.value_and_grad(*tensors)
    with pytest.raises(diffopt.errors.StationarityError):
        program.value_and_grad(*tensors[:2], tensors[2] + 1, *tensors[3:])
    for _ in range(3):
        assert relative_error(list(program.value_and_grad(*tensors)), list(first)) < 1e-12
    assert interpreted.made == 1


def test_a_loss_that_has_changed_is_noticed(interpreted: type[Interpreted]) -> None:
    """What it reads by closure: a number, and a tensor, which is an input of the program."""
    factor, shift = [1.0], torch.zeros((), dtype=torch.float64)

    def outer(a: Tensor) -> Tensor:
        def own(w: Tensor, a: Tensor) -> Tensor:
            return (factor[0] * (w - a) ** 2).sum() + (w * a * (1 + shift)).sum()

        return diffopt.implicit(own, a.detach() * (1 - (1 + shift) / (2 * factor[0])), a).sum()

    program = diffopt.compiled(outer)
    for _ in range(2):
        assert torch.allclose(program.value_and_grad(A)[1], torch.full_like(A, 0.5))
    factor[0] = 2.0
    for _ in range(3):
        assert torch.allclose(program.value_and_grad(A)[1], torch.full_like(A, 0.75))
    shift.fill_(1.0)
    for _ in range(3):
        assert torch.allclose(program.value_and_grad(A)[1], torch.full_like(A, 0.5))
    assert interpreted.made == 2


@pytest.mark.slow
@pytest.mark.parametrize("made", [alone, together])
@pytest.mark.parametrize("solver", [None, Neumann(400, step_size=0.1), Nystrom(4, damping=0.2)], ids=repr)
def test_inductor_has_the_same_numbers(solver: LinearSolver | None, made: Any) -> None:
    outer, tensors = made(solver)
    program = diffopt.compiled(outer)
    for _ in range(3):
        value, gradient = program.value_and_grad(*tensors)
        expected = with_gradients(outer, 1)(*tensors)
        assert relative_error([value, gradient], [expected[0], expected[2]]) < 1e-10
    assert all([entry.program is not None for known in program._entries.values() for entry in known])


@pytest.mark.slow
def test_a_loop_is_found_again_in_torchs_store() -> None:
    """As in a second process; what its body does, and how often it may be done, are part of what it is found by."""
    fresh_cache: Any = importlib.import_module("torch._inductor.utils").fresh_cache
    counters: Any = importlib.import_module("torch._dynamo.utils").counters

    def of(power: float, most: int) -> Callable[..., list[Tensor]]:
        def outer(a: Tensor) -> Tensor:
            point = a.detach() ** (1 / power)
            solver = ConjugateGradient(most, throw=False)
            return diffopt.implicit(lambda w, a: ((w**power - a) ** 2).sum(), point, a, solver=solver).sum()

        return with_gradients(outer, 1)

    found, positive = [], A.abs()
    with fresh_cache():
        for power, most in ((2, 3), (2, 3), (3, 3), (2, 4), (2, 3)):
            before = _from_store(counters)
            program = Program(of(power, most), [positive])
            program.check(of(power, most), [positive])
            found.append(_from_store(counters) > before)
    assert found == [False, True, False, False, True]
