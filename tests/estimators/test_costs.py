"""What estimators cost: the counters against formulas, against what a loss sees of them, and the page of them."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import diffopt
from diffopt.estimators import (
    Binomial,
    ESJacobian,
    FirstOrder,
    ForwardMode,
    Implicit,
    Krylov,
    MultiStep,
    Reptile,
    Reverse,
    Truncated,
)
from diffopt.linear_solve import GMRES, ConjugateGradient, Dense, Neumann, Nystrom
from diffopt.tensors.memory import peak_bytes

SIZE = 8
SIZES = [(5, 2), (6, 6), (9, 1), (12, 5), (20, 3)]  # steps and order


class Seen:
    """What a loss sees of a backward pass: how often its gradient is differentiated, in how many batches."""

    products = batches = 0


class Probe(torch.autograd.Function):
    """The identity on the parameters, in the forward pass of a loss."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, cotangent):
        return ProbePullback.apply(cotangent)

    @classmethod
    def vmap(cls, info, in_dims, x):
        return cls.apply(x), in_dims[0]


class ProbePullback(Probe):
    """Its derivative is taken once per curvature product, for as many steps and tasks as there are vectors in it."""

    @staticmethod
    def backward(ctx, cotangent):
        Seen.products += cotangent.numel() // SIZE
        Seen.batches += 1
        return cotangent


def loss(w: Tensor, penalty: Tensor, inputs: Tensor) -> Tensor:
    w = Probe.apply(w)
    return torch.nn.functional.softplus(inputs @ w).mean() + (penalty.exp() * w.square()).sum()


def run(estimator: Any, steps: int, learned: str, tasks: int = 0) -> diffopt.Solution[Tensor]:
    """One hypergradient of the start, the penalties or ``"all"``, of one problem or of a batch."""
    generator = torch.Generator().manual_seed(0)
    start, penalty = torch.randn(2, SIZE, generator=generator, dtype=torch.float64) / 10
    inputs = torch.randn(max(tasks, 1), 12, SIZE, generator=generator, dtype=torch.float64)
    start.requires_grad_(learned in ("all", "start"))
    penalty.requires_grad_(learned in ("all", "penalty"))
    kept = []

    def outer(inputs: Tensor) -> Tensor:
        optimizer = diffopt.SGD(0.3, momentum=0.5)
        kept.append(diffopt.solve(loss, start, penalty, inputs, optimizer=optimizer, steps=steps, estimator=estimator))
        return kept[-1].params.square().sum()

    value = vmap(outer)(inputs).sum() if tasks else outer(inputs[0])
    assert kept[-1].counts.products == 0
    Seen.products = Seen.batches = 0
    value.backward()
    return kept[-1]


def counted(solution: diffopt.Solution[Tensor]) -> tuple[int, int, int]:
    return solution.counts.gradients, solution.counts.products, solution.counts.depth


def by_hand(T: int, L: int) -> list[tuple[Any, str, tuple[int, int, int, int]]]:
    """Estimators of order L, what is learned, and the gradients, products, depth and stored states of T steps."""
    return [
        (Reverse("graph"), "all", (T, T, T, 0)),
        (Reverse(1), "all", (2 * T, T, T, T)),
        (Reverse(3), "all", (3 * T - (T + 2) // 3, T, T, (T + 2) // 3)),
        (ForwardMode(), "penalty", (2 * T, T * SIZE, T, 0)),
        (ForwardMode(chunk_size=4), "penalty", (T + T * SIZE // 4, T * SIZE, T * SIZE // 4, 0)),
        (FirstOrder(), "all", (T, 0, 0, 0)),
        (Reptile(), "all", (T, 0, 0, 0)),
        (Truncated(L), "all", (T, L, L, 0)),
        (Truncated(L, 1), "all", (T + L, L, L, L)),
        (ESJacobian(3, 1e-3), "penalty", (T * (1 + 1 + 2 * 3), 0, 0, 0)),
        (Implicit(ConjugateGradient(L, 0.0, False)), "penalty", (T + 1, L + 1, L + 1, 0)),
        (Implicit(Neumann(L, 1.0, 0.0, False)), "penalty", (T + 1, L + 1, L + 1, 0)),
        (Implicit(Neumann(L, None, 0.0, False, 7)), "penalty", (T + 1, L + 8, L + 8, 0)),
        (Implicit(GMRES(L, 0.0, False)), "penalty", (T + 1, L + 2, L + 2, 0)),
        (Implicit(Nystrom(L, 0.1, throw=False)), "penalty", (T + 1, L + 2, L + 2, 0)),
        (Implicit(Dense()), "penalty", (T + 1, SIZE + 1, SIZE + 1, 0)),
    ]


@pytest.mark.parametrize(
    ("steps", "estimator", "learned", "counts"), [(T, *row) for T, L in SIZES for row in by_hand(T, L)]
)
def test_the_counters_are_the_formulas(steps, estimator, learned, counts):
    solution = run(estimator, steps, learned)
    assert (*counted(solution), solution.kept.states) == counts
    assert (Seen.products, Seen.batches) == counts[1:3]


@pytest.mark.parametrize("learned", ["start", "all"])
@pytest.mark.parametrize("tasks", [0, 3])
@pytest.mark.parametrize(("steps", "order"), [s for s in SIZES if s[1] < s[0]])
def test_orders_of_curvature(steps, order, tasks, learned):
    """``L (T - L + 1)`` products for Binomial, whatever is learned, ``T + (L - 1)(T - 1)`` for Krylov.

    These are the ones that are needed; from the second order on they are pulled through one graph of all steps.
    """
    each = max(tasks, 1)
    solution = run(Binomial(order), steps, learned, tasks)
    products = order * (steps - order + 1)
    assert counted(solution) == (steps, products, order)
    assert solution.kept.states == steps
    assert (Seen.products, Seen.batches) == (each * order * steps, order)
    solution = run(Krylov(order), steps, learned, tasks)
    again = learned == "all" and order > 1
    products = steps + (order - 1) * (steps - 1) + steps * again
    assert counted(solution) == (steps, products, order + again)
    assert solution.kept.states == steps
    assert (Seen.products, Seen.batches) == (each * (order + again) * steps, order + again)


@pytest.mark.parametrize("estimator", [Binomial(0), Krylov(0)], ids=str)
def test_without_an_order_no_product_is_taken(estimator):
    assert counted(run(estimator, 5, "all")) == (5, 0, 0)


@pytest.mark.parametrize("estimator", [Binomial(6), Krylov(6), Krylov(9)], ids=str)
def test_as_many_orders_as_steps_cost_what_the_exact_estimator_costs(estimator):
    assert counted(run(estimator, 6, "all")) == (2 * 6, 6, 6)
    assert (Seen.products, Seen.batches) == (6, 6)


@pytest.mark.parametrize("learned", ["start", "all"])
@pytest.mark.parametrize(("steps", "order"), [(5, 2), (12, 5), (20, 3)])
def test_windows_and_chunks(steps, order, learned):
    window, chunk = steps - 2, 3
    assert counted(run(Binomial(order, window), steps, learned)) == (steps, order * (window - order + 1), order)
    assert Seen.products == order * window
    levels = math.ceil((steps - order + 1) / chunk)
    # the last level also takes the mixed products that the levels before it owe for the latest steps
    depth = (order - 1) * levels + (levels if learned == "start" else math.ceil(steps / chunk))
    solution = run(Binomial(order, chunk_size=chunk), steps, learned)
    assert counted(solution) == (steps, order * (steps - order + 1), depth)
    assert Seen.batches == depth
    assert learned == "all" or Seen.products == order * (steps - order + 1)
    count = math.ceil(steps / 2)
    solution = run(MultiStep(2, Binomial(2)), steps, learned)
    assert counted(solution) == (count, 2 * (count - 1), 2)
    assert solution.kept.states == count
    assert counted(run(MultiStep(2), steps, learned)) == (count, count, count)


def peak_trees(estimator: Any, steps: int, learned: int = 1, start: bool = False) -> float:
    """The peak memory of one hypergradient, in trees of parameters; a state of momentum is two."""
    w = torch.linspace(-1, 1, 10_000, dtype=torch.float64, requires_grad=start)
    scales = torch.full((learned,), 0.5, dtype=torch.float64, requires_grad=True)

    def work():
        optimizer = diffopt.SGD(0.01, momentum=0.5)
        function = lambda w, scales: (w.tanh() * scales.sum()).square().sum()  # noqa: E731
        solution = diffopt.solve(function, w, scales, optimizer=optimizer, steps=steps, estimator=estimator)
        solution.params.square().sum().backward()

    work()
    peak = peak_bytes(work)
    assert peak is not None
    return peak / w.nbytes


# Scalars and losses lie between whole trees; they are some hundred numbers of 10,000.
ROUGHLY = 0.05


@pytest.mark.parametrize("steps", [10, 20])
def test_a_level_of_krylov_holds_one_adjoint_per_step(steps):
    fewer, more = (peak_trees(Krylov(order, chunk_size=1), steps, start=True) for order in (3, 6))
    assert (more - fewer) / 3 == pytest.approx(2 * steps, abs=ROUGHLY)


def test_binomial_holds_some_trees_per_step_whatever_the_order():
    fewer, more = (peak_trees(Binomial(2, chunk_size=1), steps) for steps in (10, 20))
    # kept: state 2, gradient 1; stacked: adjoint 2, E' of it 1, curvature 1, and what the updates are taken apart at 3
    assert (more - fewer) / 10 <= 10 + ROUGHLY
    assert peak_trees(Binomial(4, chunk_size=1), 10) <= fewer


@pytest.mark.parametrize("estimator", [ForwardMode(), ESJacobian(4, 1e-3), Implicit(GMRES(4, 0.0, False))], ids=str)
def test_what_does_not_store_the_rollout_needs_the_same_for_any_number_of_steps(estimator):
    assert peak_trees(estimator, 40, 4) == pytest.approx(peak_trees(estimator, 10, 4), abs=ROUGHLY)


def test_a_column_of_nystrom_and_a_direction_of_gmres_are_one_tree():
    for solvers in ((Nystrom(8, 0.1), Nystrom(16, 0.1)), (GMRES(8, 0.0, False), GMRES(16, 0.0, False))):
        fewer, more = (peak_trees(Implicit(solver), 3) for solver in solvers)
        assert (more - fewer) / 8 <= 2 + ROUGHLY  # and its copy where they are put together
        assert fewer < 50


@pytest.mark.parametrize("count", [1, 3])
def test_forward_mode_runs_once_for_each_tensor_that_is_learned(count):
    penalties = [torch.full((6 // count,), -1.0, requires_grad=True) for _ in range(count)]

    def loss(w, penalties):
        return (torch.cat(penalties).exp() * (w - 1).square()).sum()

    sgd = diffopt.SGD(0.1)
    solution = diffopt.solve(loss, torch.zeros(6), penalties, optimizer=sgd, steps=5, estimator=ForwardMode())
    solution.params.sum().backward()
    assert counted(solution) == (5 * (1 + count), 5 * 6, 5 * count)


@pytest.mark.slow
def test_the_page_is_what_is_measured(checkout, monkeypatch):
    monkeypatch.syspath_prepend(str(checkout))
    text = importlib.import_module("benchmarks.costs").page()  # raises where a count is not its formula's
    assert text == (checkout / "docs" / "costs.md").read_text(encoding="utf-8"), "run: python -m benchmarks.costs"
