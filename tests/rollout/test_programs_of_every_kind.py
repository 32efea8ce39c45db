"""``compile=True``, all steps as one program: every optimizer, estimator and level of vmap; and two that inductor made.

What is checked and noticed is tested in ``test_whole_programs.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import OPTIMIZERS, MetaParameters, small_network
from oracles import relative_error
from torch import Tensor
from torch.func import vmap

import diffopt
from diffopt.estimators import Binomial, FirstOrder, Krylov, MultiStep, Reptile, Reverse, Truncated
from diffopt.rollout import compiled, known_programs

STEPS = 4
CASES = {case.name: case for case in OPTIMIZERS}
ESTIMATORS = (
    *(Reverse(), Reverse(1), Reverse(3), Truncated(2), Truncated(3, "sqrt"), FirstOrder(), Reptile()),
    *(MultiStep(3), MultiStep(2, Truncated(1)), MultiStep(3, Reverse(2)), Binomial(2), Krylov(2)),
)
ORDERS = (
    *(Binomial(1), Binomial(3), Binomial(2, 3), Binomial(2, scale=0.5), Binomial(2, chunk_size=4)),
    *(Krylov(1), Krylov(3), MultiStep(2, Binomial(1)), MultiStep(3, Krylov(1))),
)
EVERY = [(name, estimator) for name in CASES for estimator in ESTIMATORS]
EVERY += [(name, estimator) for name in ("gd", "momentum", "adam") for estimator in ORDERS]
pytestmark = [pytest.mark.compiler, pytest.mark.slow]
PROBLEM = small_network(0, STEPS)


def hypergradient(case: Any, estimator: Any, *, compile: bool, tasks: tuple[int, ...] = ()) -> list[Tensor]:
    """Of the initial params, a loss argument, the batches and every hyperparameter, each task with its own."""
    names, meta = list(case.learned), MetaParameters.of(PROBLEM, case)

    def of_task(weights: Tensor, *hypers: Tensor) -> Tensor:
        optimizer = case.optimizer(dict(zip(names, hypers, strict=True)))
        given = {"optimizer": optimizer, "steps": STEPS, "estimator": estimator, "compile": compile}
        batches = meta.inputs, PROBLEM.batches[1]
        solution = diffopt.solve(PROBLEM.loss, list(meta.params), meta.weights * weights, batches=batches, **given)
        return PROBLEM.outer_loss(solution.params)

    function: Callable[..., Tensor] = of_task
    for _ in tasks:
        function = vmap(function)
    factors = torch.linspace(0.9, 1.1, max(1, *tasks, 1) ** len(tasks), dtype=torch.float64).reshape(tasks)
    own = [factors * x for x in meta.hyperparameters.values()]
    total = function(factors, *own).sum()
    inputs = [*meta.params, meta.weights, meta.inputs, *meta.hyperparameters.values()]
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    return [total.detach(), *[torch.zeros(()) if x is None else x for x in found]]


@pytest.mark.parametrize(("name", "estimator"), EVERY, ids=lambda x: x if isinstance(x, str) else repr(x))
def test_every_optimizer_under_every_estimator_has_the_numbers_of_the_plain_way(name: str, estimator: Any) -> None:
    for tasks in ((), (3,), (2, 2)):
        expected = hypergradient(CASES[name], estimator, compile=False, tasks=tasks)
        for _ in range(2):
            found = hypergradient(CASES[name], estimator, compile=True, tasks=tasks)
            assert relative_error(found, expected) < 1e-10
    known = known_programs._known[compiled.owner(PROBLEM.loss)]
    assert all([one.program is not None for one in known.values()])


def quadratic(w: Tensor, a: Tensor) -> Tensor:
    return 0.5 * (a * w**2).sum() + (w**4).sum() / 4


@pytest.mark.parametrize(
    ("name", "dtype", "estimator"),
    [
        ("adam", torch.float64, Reverse(1)),
        ("momentum", torch.float32, Reverse(1)),
        ("adam", torch.float64, Reverse(2)),
        ("adam", torch.float64, Binomial(2)),
        ("gd", torch.float32, Binomial(3, 4)),
        ("momentum", torch.float64, Krylov(3)),
    ],
)
def test_programs_that_inductor_has_made(
    inductor: None, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, estimator: Any
) -> None:
    monkeypatch.setattr(known_programs, "_functions", Counter())  # the loss is made anew in each of these tests
    case = CASES[name]
    weights = torch.linspace(0.5, 1.5, 6, dtype=dtype).reshape(3, 2)

    def loss(w: Tensor, a: Tensor, batch: Tensor) -> Tensor:
        return quadratic(w, a * batch) + (torch.outer(w, a) @ batch).sin().sum()

    def outer(factor: Tensor, compile: bool) -> list[Tensor]:
        w = torch.tensor([1.0, -2.0], dtype=dtype, requires_grad=True)
        hypers = {key: torch.tensor(x, dtype=dtype, requires_grad=True) for key, x in case.learned.items()}
        batches = (factor * torch.linspace(0.5, 1.0, 10, dtype=dtype).reshape(5, 2)).requires_grad_()

        def of_task(a: Tensor) -> Tensor:
            given = {"optimizer": case.optimizer(hypers), "steps": 5, "batches": batches, "compile": compile}
            solution = diffopt.solve(loss, w, a, estimator=estimator, **given)
            return solution.params.square().sum() + (solution.losses.sum() if estimator.takes_running_costs else 0)

        total = vmap(of_task)(weights).sum()
        return [total.detach(), *torch.autograd.grad(total, [w, batches, *hypers.values()], allow_unused=True)]

    tolerance = 1e-10 if dtype == torch.float64 else 1e-4  # float32: these steps make some 300 of its rounding errors
    for factor in (1.0, 1.1, 0.9):
        found, expected = (outer(torch.tensor(factor, dtype=dtype), compile) for compile in (True, False))
        pairs = [(x, y) for x, y in zip(found, expected, strict=True) if y is not None]
        assert relative_error([x for x, _ in pairs], [y for _, y in pairs]) < tolerance
    known = known_programs._known[compiled.owner(loss)].values()
    assert [one.program is not None for one in known] == [True, True]
