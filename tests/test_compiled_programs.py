"""A solve and its hypergradient as one graph: the numbers of the plain way, for everything that can be traced.

The graphs run as they are here, uncompiled: what inductor makes of them it is asked in ``test_compiled_outer.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import OPTIMIZERS, MetaParameters, small_network
from oracles import relative_error
from torch import Tensor
from torch.func import vmap

import diffopt
from diffopt.estimators import Binomial, FirstOrder, Krylov, MultiStep, Reptile, Reverse, Truncated
from diffopt.tensors import tracing

STEPS = 4
CASES = {case.name: case for case in OPTIMIZERS}
ESTIMATORS = (
    *(Reverse(), Truncated(2), FirstOrder(), Reptile(), MultiStep(3), MultiStep(2, Truncated(1))),
    *(Binomial(2), Krylov(2)),
)
EVERY = [(name, estimator) for name in CASES for estimator in ESTIMATORS]
EVERY += [
    (name, estimator)
    for name in ("gd", "momentum", "adam")
    for estimator in (Binomial(3, 3, 0.5), Krylov(3), MultiStep(3, Binomial(1)), MultiStep(3, Krylov(1)))
]
pytestmark = pytest.mark.compiler


def with_gradients(outer: Callable[..., Tensor], count: int) -> Callable[..., list[Tensor]]:
    """``(*tensors) -> (value, 0 if all is finite, *gradients by the first tensors)``."""

    def function(*tensors: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(i < count) for i, x in enumerate(tensors)]
            value = outer(*leaves)
            found = torch.autograd.grad(value, leaves[:count], allow_unused=True)
        trace = tracing.current()
        unsound = torch.zeros(()) if trace is None else trace.unsound(value)
        grads = [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=False)]
        return [value.detach(), unsound.double(), *grads]

    return function


def compared(outer: Callable[..., Tensor], tensors: Sequence[Tensor], count: int | None = None) -> float:
    """By how much the graph is off, at other numbers than those it was traced with.

    Always the same ones: under Adam, a coordinate whose gradient is nearly zero magnifies round-off.
    """
    function = with_gradients(outer, len(tensors) if count is None else count)
    graph, captured = tracing.trace(function, tensors)
    generator = torch.Generator().manual_seed(0)
    others = [x + 0.01 * torch.rand(x.shape, generator=generator, dtype=x.dtype) for x in tensors]
    found, expected = graph(*others, *captured), function(*others)
    assert not bool(found[1])
    return relative_error([found[0], *found[2:]], [expected[0], *expected[2:]])


def meta_loss(case: Any, estimator: Any, tasks: int | None = None) -> tuple[Callable[..., Tensor], list]:
    """The outer loss of a small network, and all that it is differentiated by."""
    problem, names = small_network(0, STEPS), list(case.learned)
    meta = MetaParameters.of(problem, case)

    def outer(a: Tensor, b: Tensor, c: Tensor, weights: Tensor, x: Tensor, y: Tensor, *hypers: Tensor) -> Tensor:
        def of_task(weights: Tensor, x: Tensor, hypers: Sequence[Tensor]) -> Tensor:
            optimizer = case.optimizer(dict(zip(names, hypers, strict=True)))
            solution = diffopt.solve(
                problem.loss,
                [a, b, c],
                weights,
                optimizer=optimizer,
                steps=STEPS,
                batches=(x, y),
                estimator=estimator,
            )
            return problem.outer_loss(solution.params)

        if tasks is None:
            return of_task(weights, x, hypers)
        factors = torch.linspace(0.9, 1.1, tasks, dtype=torch.float64)
        own = [f * factors for f in hypers]
        return vmap(of_task, (0, None, 0))(weights * factors[:, None], x, tuple(own)).sum()

    given = [*meta.params, meta.weights, meta.inputs, meta.targets, *meta.hyperparameters.values()]
    return outer, [x.detach() for x in given]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "estimator"), EVERY, ids=lambda x: x if isinstance(x, str) else repr(x))
def test_every_optimizer_under_every_estimator_has_the_numbers_of_the_plain_way(name: str, estimator: Any) -> None:
    """By the initial params, a loss argument, the batches and every hyperparameter; each task has its own."""
    for tasks in (None, 3):
        outer, tensors = meta_loss(CASES[name], estimator, tasks)
        assert compared(outer, tensors) < 1e-10


def quadratic(w: Tensor, a: Tensor) -> Tensor:
    return 0.5 * (a * w**2).sum() + (w**4).sum() / 4


def with_batches(w: Tensor, batch: Tensor) -> Tensor:
    return quadratic(w, batch)


W = torch.tensor([1.0, -2.0], dtype=torch.float64)
A = torch.tensor([1.0, 0.5], dtype=torch.float64)
LR = torch.tensor([0.05, 0.04, 0.06, 0.03, 0.05], dtype=torch.float64)
ROWS = torch.linspace(0.5, 1.5, 10, dtype=torch.float64).reshape(5, 2)


def solved(w: Any, a: Any, lr: Any = 0.05, steps: int = 5, **options: Any) -> Any:
    given = {"optimizer": diffopt.SGD(lr, momentum=0.5), "steps": steps, **options}
    return diffopt.solve(quadratic, w, a, **given)


def squares(x: Tensor) -> Tensor:
    return ((x - 1) ** 2).sum()


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_few_steps(steps: int) -> None:
    assert compared(lambda w, a: squares(solved(w, a, steps=steps).params) + a.sum(), [W, A]) < 1e-12


ORDERS = [*map(Binomial, (0, 1, 3, 5)), Binomial(2, 3), Binomial(2, None, 0.5), Binomial(2, None, 1.0, 5)]
ORDERS += [*map(Krylov, (0, 1, 2, 5)), Krylov(1, 0.5), Krylov(3)]
ORDERS += [MultiStep(3, Binomial(1)), MultiStep(2, Krylov(2))]
RUNS = [Reverse(), Truncated(2), MultiStep(2), MultiStep(3), MultiStep(2, Binomial(2)), Krylov(3, 0.0, 5)]


@pytest.mark.parametrize("estimator", [*RUNS, *[pytest.param(x, marks=pytest.mark.slow) for x in ORDERS]], ids=repr)
def test_what_runs_over_steps_and_goes_on_from_a_state(estimator: Any) -> None:
    """A schedule and batches, of which the last window may be short, and a state that has gone on."""

    def outer(w: Tensor, rows: Tensor, lr: Tensor) -> Tensor:
        first = solved(w, rows[0], 0.05, steps=1).state
        optimizer = diffopt.SGD(diffopt.Schedule(torch.cat([lr, lr])), momentum=0.5)
        end = diffopt.solve(with_batches, first, optimizer=optimizer, steps=5, batches=rows, estimator=estimator)
        return squares(end.params)

    assert compared(outer, [W, ROWS, LR]) < 1e-12


FEW = [(7, Reverse(3)), (9, Reverse("sqrt")), (8, MultiStep(3, Reverse(2))), (7, Truncated(5, 2))]
MORE = [
    *[(steps, Reverse(length)) for steps, length in ((5, 2), (6, 3), (3, 7), (2, 2), (1, 3))],
    *[(steps, MultiStep(n, Reverse(length))) for steps, n, length in ((7, 2, 2), (11, 2, 2), (7, 2, 3))],
    *[(7, Truncated(4, "sqrt")), (7, Truncated(7, 3)), (9, MultiStep(2, Truncated(3, 2)))],
]
BLOCKS = [*FEW, *[pytest.param(*case, marks=pytest.mark.slow) for case in MORE]]
"""Blocks that steps and windows fill, and last ones that are short; of which the last window may be short, too."""


@pytest.mark.parametrize(("steps", "estimator"), BLOCKS, ids=repr)
def test_blocks_of_steps_of_which_one_state_is_kept(steps: int, estimator: Any) -> None:
    """What runs over steps, counts them and is handed out on the way, on from a state."""

    def outer(w: Tensor, rows: Tensor, rates: Tensor) -> Tensor:
        optimizer = diffopt.Adam(diffopt.Schedule(rates), eps=0.1)
        first = diffopt.solve(with_batches, w, optimizer=optimizer, steps=1, batches=rows[:1]).state
        given = {"steps": steps, "batches": rows[1:], "estimator": estimator, "observe": lambda w, b: (b * w).sin()}
        end = diffopt.solve(with_batches, first, optimizer=optimizer, **given)
        if isinstance(getattr(estimator, "adjoint", estimator), Truncated):
            return squares(end.params)
        return squares(end.params) + end.losses.prod() + end.observed[-1].prod()

    rows = torch.linspace(0.5, 1.5, 2 * steps + 2, dtype=torch.float64).reshape(steps + 1, 2)
    assert compared(outer, [W, rows, torch.linspace(0.03, 0.06, steps + 1, dtype=torch.float64)]) < 1e-12


def test_a_schedule_of_plain_numbers_and_optimizers_that_count() -> None:
    """What looks at the number of its step can do so as arithmetic only."""
    schedule = diffopt.Schedule([0.05, 0.01, 0.1, 0.02, 0.03])
    optimizers = (
        diffopt.SGD(schedule, momentum=0.5, dampening=0.3),
        diffopt.Lookahead(diffopt.SGD(0.1), period=2),
        diffopt.Clip(diffopt.Adam(schedule, eps=0.1), max_norm=0.3),
        diffopt.EMA(diffopt.Groups({"0": diffopt.SGD(0.1), "1": diffopt.Adam(0.05, eps=0.1)}), decay=0.5),
    )
    for optimizer in optimizers[:3]:
        assert compared(lambda w, a, o=optimizer: squares(solved(w, a, optimizer=o).params), [W, A]) < 1e-12

    def counting(w: Tensor, a: Tensor) -> Tensor:
        """On from a state, in windows of which the last is short."""
        adam = diffopt.Adam(diffopt.Schedule([0.05, 0.01, 0.1, 0.02, 0.03, 0.04]), eps=0.1)
        first = solved(w, a, optimizer=adam, steps=1).state
        return squares(diffopt.solve(quadratic, first, a, optimizer=adam, steps=5, estimator=MultiStep(2)).params)

    assert compared(counting, [W, A]) < 1e-12

    def pair(w: Tensor, a: Tensor) -> Tensor:
        def loss(params: Any, a: Tensor) -> Tensor:
            return quadratic(params["0"], a) + quadratic(params["1"], a) + (params["0"] * params["1"]).sum()

        # two leaves that start at one tensor
        end = diffopt.solve(loss, {"0": w, "1": w}, a, optimizer=optimizers[3], steps=3)
        return squares(end.params["0"]) + squares(end.state.buffers["average"]["1"])

    assert compared(pair, [W, A]) < 1e-12


def test_losses_observed_and_aux() -> None:
    """Running costs enter the adjoint on the way; what a loss returns besides is a number only."""

    def aux_loss(w: Tensor, a: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return quadratic(w, a), {"norm": w.norm()}

    def outer(w: Tensor, a: Tensor, lr: Tensor) -> Tensor:
        given = {"optimizer": diffopt.SGD(lr[0]), "steps": 4}
        seen = diffopt.solve(quadratic, w, a, observe=lambda w, a: {"square": (a * w**2).sum(), "w": w}, **given)
        both = diffopt.solve(aux_loss, w, a, has_aux=True, **given)
        costs = seen.losses[1] * seen.losses.sum() + (seen.observed["w"][2] ** 3).sum()
        return squares(seen.params) + costs + both.losses[3] * both.aux["norm"].sum()

    assert compared(outer, [W, A, LR]) < 1e-12
    assert compared(lambda w, a, lr: solved(w, a, lr[0], observe=lambda w, a: w).observed[1].sum(), [W, A, LR]) < 1e-12
    assert compared(lambda w, a, lr: solved(w, a, lr[0]).losses[2], [W, A, LR]) < 1e-12


def test_cotangents_that_are_zero_equal_or_expanded() -> None:
    for outer in (
        lambda w, a: solved(w, a).params.sum(),
        lambda w, a: solved(w, a).params[0],
        lambda w, a: solved(w, a).state.buffers["velocity"].sum() + a.sum(),
        lambda w, a: w.sum() + solved(w.detach(), a.detach()).params.sum(),
    ):
        assert compared(outer, [W, A]) < 1e-12


def test_vmap_within_vmap_and_mean_over_tasks() -> None:
    rows = ROWS[:4].reshape(2, 2, 2)

    def nested(w: Tensor, rows: Tensor, lr: Tensor) -> Tensor:
        def of_one(a: Tensor, lr: Tensor) -> Tensor:
            return squares(solved(w, a, lr).params)

        return vmap(vmap(of_one, (0, None)), (0, 0))(rows, lr[:2]).mean()

    assert compared(nested, [W, rows, LR]) < 1e-12

    def mean(w: Tensor, rows: Tensor) -> Tensor:
        def of_task(w: Tensor, a: Tensor) -> Tensor:
            return squares(solved(w, a).params)

        return diffopt.mean_over_tasks(of_task, w, rows, in_dims=(None, 0), task_chunk=2)

    assert compared(mean, [W, ROWS]) < 1e-12


def test_the_gradient_by_a_transform_within() -> None:
    """``torch.func.grad`` inside, and each task's own gradient."""

    def outer(w: Tensor, rows: Tensor) -> Tensor:
        gradients = vmap(torch.func.grad(lambda w, a: squares(solved(w, a).params)), (None, 0))(w, rows)
        return gradients.detach().square().sum() + squares(solved(w, rows[0]).params)

    assert compared(outer, [W, ROWS]) < 1e-12


def field(w: Tensor, m: Tensor) -> Tensor:
    return m @ w + 0.1 * w**3


def of_a_field(w: Tensor, m: Tensor) -> Tensor:
    end = diffopt.solve(diffopt.VectorField(field), w, m, optimizer=diffopt.Adam(0.1, eps=0.1), steps=3)
    return squares(end.params)


def of_a_game(w: Tensor, m: Tensor) -> Tensor:
    players = diffopt.game(lambda p, m: p[0] @ m @ p[1] + p[0].square().sum(), lambda p, m: -(p[0] @ m @ p[1]))
    return squares(diffopt.solve(players, (w, w), m, optimizer=diffopt.SGD(0.1), steps=3).params[0])


def of_a_prox(w: Tensor, m: Tensor) -> Tensor:
    optimizer = diffopt.Proximal(diffopt.SGD(0.1, momentum=0.5), diffopt.prox.L1(0.3))
    return squares(diffopt.solve(quadratic, w, m[0], optimizer=optimizer, steps=4).params)


def of_a_matrix(w: Tensor, m: Tensor) -> Tensor:
    optimizer = diffopt.Groups({"m": diffopt.Muon(0.1), "w": diffopt.Clip(diffopt.SGD(0.2), value=0.5)})

    def loss(params: Any, w: Tensor) -> Tensor:
        return (params["m"] @ params["w"] - w).square().sum() + params["m"].sum()

    return squares(diffopt.solve(loss, {"m": m, "w": w}, w, optimizer=optimizer, steps=3).params["w"])


LAYERS = (torch.nn.Conv2d(1, 2, 3), torch.nn.GroupNorm(1, 2), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
NETWORK, NAMED = diffopt.functional(torch.nn.Sequential(*LAYERS, torch.nn.Flatten(), torch.nn.Linear(8, 3)).double())
LABELS = torch.tensor([0, 2])


def of_a_network(w: Tensor, m: Tensor) -> Tensor:
    """Convolutions, pooling and a normalisation under ``vmap``, and labels that are integers."""
    start = {name: 0.1 * torch.arange(x.numel()).double().sin().reshape(x.shape) for name, x in NAMED.items()}
    images = m.flatten().repeat(36).reshape(2, 2, 1, 6, 6)

    def loss(params: Any, images: Tensor, w: Tensor) -> Tensor:
        return w.square().mean() * torch.nn.functional.cross_entropy(NETWORK(params, images), LABELS)

    def of_task(images: Tensor) -> Tensor:
        end = diffopt.solve(loss, start, images, w, optimizer=diffopt.SGD(0.5), steps=2).params
        return loss(end, images, w)

    return vmap(of_task)(images).mean()


@pytest.mark.slow
@pytest.mark.parametrize("outer", [of_a_field, of_a_game, of_a_prox, of_a_matrix, of_a_network])
def test_inner_problems_of_other_kinds(outer: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    assert compared(outer, [W, torch.tensor([[1.0, 0.3], [-0.4, 0.8]], dtype=torch.float64)]) < 1e-12


@pytest.mark.parametrize("estimator", [Reverse(), Reverse(3)], ids=repr)
def test_captured_tensors_are_read_anew_at_every_call(estimator: Any) -> None:
    """Real ones, which are inputs of the graph; and what the outer loss itself computes, inside an inner loss."""
    target = torch.ones(2, dtype=torch.float64)

    def outer(w: Tensor, a: Tensor) -> Tensor:
        scale = 2 * a.detach()
        given = {"optimizer": diffopt.SGD(0.05), "steps": 6, "estimator": estimator}
        end = diffopt.solve(lambda w: quadratic(w, scale * target), w, **given)
        return (end.params * target).sum()

    function = with_gradients(outer, 1)
    graph, captured = tracing.trace(function, [W, A])
    assert len(captured) == 1
    assert captured[0] is target
    # (a tensor that a graph has as its own is frozen by the compiler)
    nodes = [(module, node) for module in graph.modules() for node in module.graph.nodes if node.op == "get_attr"]
    assert not any([isinstance(getattr(module, node.target), Tensor) for module, node in nodes])
    target.mul_(3)
    for a in (A, 2 * A):
        found, expected = graph(W, a, *captured), function(W, a)
        assert relative_error([found[0], found[2]], [expected[0], expected[2]]) < 1e-12


def test_numbers_that_are_not_finite_are_noticed() -> None:
    """Losses and states of the rollout, though the outer loss does not see them, and the hypergradient."""

    def blind(w: Tensor, a: Tensor) -> Tensor:
        return solved(w, a).params[0]

    function = with_gradients(blind, 1)
    graph, captured = tracing.trace(function, [W, A])
    assert float(graph(W, A, *captured)[1]) == 0
    far = torch.tensor([1.0, 1e70], dtype=torch.float64)
    found = graph(far, A, *captured)
    assert found[0].isfinite()
    assert found[1].isnan()
    with pytest.raises(diffopt.DivergenceError):
        function(far, A)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"estimator": Reverse("log")}, "checkpoint='log'"),
        ({"estimator": Truncated(3, memory="2GB")}, "with memory"),
        ({"estimator": Krylov(3, rtol=0.1)}, "stops once its residual is small"),
        ({"estimator": Krylov(2, chunk_size=4)}, "with a chunk_size of fewer steps"),
        ({"estimator": MultiStep(2, Binomial(1, chunk_size=2))}, "with a chunk_size of fewer steps"),
        ({"estimator": diffopt.estimators.Unrolled()}, "a solve by Unrolled"),
        ({"tol": 0.1}, "may end early"),
        ({"on_step": print}, "may end early"),
    ],
)
def test_what_cannot_be_traced_is_named(options: dict[str, Any], why: str) -> None:
    function = with_gradients(lambda w, a: solved(w, a, **options).params.sum(), 2)
    with pytest.raises(tracing.NotTraceableError, match=why):
        tracing.trace(function, [W, A])


def test_losses_that_cannot_be_traced() -> None:
    def noisy(w: Tensor) -> Tensor:
        return (w * torch.randn(2, dtype=torch.float64)).sum() ** 2

    def nested(w: Tensor) -> Tensor:
        inner = diffopt.solve(quadratic, A, A, optimizer=diffopt.SGD(0.1), steps=1).params
        return (w**2 * inner.detach()).sum()

    number = torch.tensor(2.0)

    def reading(w: Tensor) -> Tensor:
        return quadratic(w, A) * float(number)

    for loss, why in ((noisy, "random numbers"), (nested, "within the loss of another"), (reading, "read out of")):
        function = with_gradients(
            lambda w, f=loss: diffopt.solve(f, w, optimizer=diffopt.SGD(0.1), steps=2).params.sum(), 1
        )
        with pytest.raises(tracing.NotTraceableError, match=why):
            tracing.trace(function, [W])
    assert tracing.current() is None


@pytest.mark.parametrize("estimator", [Reverse(), Reverse(2), Binomial(1)], ids=repr)
def test_a_single_number_in_single_precision_stays_in_it(estimator: Any) -> None:
    """Though a step's number, which is a tensor of as few axes, is in double precision."""

    def outer(w: Tensor, a: Tensor) -> Tensor:
        solution = diffopt.solve(
            lambda w, a: (w - a.sum()) ** 2 + w**4, w, a, optimizer=diffopt.Adam(0.1), steps=4, estimator=estimator
        )
        return solution.params**2

    assert compared(outer, [torch.tensor(1.0), torch.tensor([0.3, 0.4])]) < 1e-4
