"""On a GPU: the same numbers as on the CPU, states kept in the CPU's memory, random numbers drawn again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import small_network
from oracles import relative_error
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
    Reverse,
    Truncated,
    Unrolled,
)
from diffopt.linear_solve import GMRES

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TO_THE_CPU = [Reverse(2, offload=True), Reverse("sqrt", offload=True), Reverse("log", offload="cpu")]
TO_THE_DISK = [Reverse(1, offload="disk"), Reverse("sqrt", offload="disk")]
OFFLOADING = [*TO_THE_CPU, *TO_THE_DISK, Truncated(3, checkpoint=1, offload=True)]
OTHERS = [Unrolled(), ForwardMode(), FirstOrder(), Binomial(2), Krylov(3), MultiStep(2)]
ESTIMATORS = [Reverse("graph"), Reverse(1), *OFFLOADING, *OTHERS, Implicit(GMRES(max_iterations=20, throw=False))]


def hypergradient(estimator: Any, device: str, tasks: int | None = None) -> list[torch.Tensor]:
    problem = small_network(0, 6)

    def move(x: Any) -> Any:
        return tuple(map(move, x)) if isinstance(x, tuple) else x.to(device)

    params, weights = [move(p).requires_grad_() for p in problem.params], move(problem.weights).requires_grad_()
    lr, batches = torch.tensor(0.1, dtype=torch.float64, device=device, requires_grad=True), move(problem.batches)
    query = move(problem.query)

    def outer(weights: torch.Tensor) -> torch.Tensor:
        options = {"optimizer": diffopt.SGD(lr, momentum=0.5), "steps": 6, "batches": batches, "estimator": estimator}
        end = diffopt.solve(problem.loss, params, weights, **options).params
        return (problem.predict(end, query[0]) - query[1]).square().mean()

    scales = torch.linspace(0.5, 1.5, tasks or 1, dtype=torch.float64, device=device)[:, None]
    total = outer(weights) if tasks is None else vmap(outer)(weights * scales).sum()
    inputs = [*params, weights, lr]
    return list(torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True))


@cuda
@pytest.mark.parametrize("tasks", [None, 3])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_the_numbers_are_those_of_the_cpu(estimator: Any, tasks: int | None) -> None:
    """In float64, to the round-off of sums in another order."""
    found = hypergradient(estimator, "cuda", tasks)
    assert relative_error([x.cpu() for x in found], hypergradient(estimator, "cpu", tasks)) < 1e-9


@pytest.mark.parametrize("tasks", [None, 3])
@pytest.mark.parametrize("estimator", [Reverse(2, offload="cpu"), Truncated(4, 1, offload="disk")], ids=str)
def test_offload_changes_no_number(estimator: Any, tasks: int | None) -> None:
    """On any device; here on the CPU."""
    kept = type(estimator)(**{**vars(estimator), "offload": False})
    for a, b in zip(hypergradient(estimator, "cpu", tasks), hypergradient(kept, "cpu", tasks), strict=True):
        assert torch.equal(a, b)


@cuda
def test_offloaded_states_do_not_stay_on_the_gpu() -> None:
    def held(offload: Any) -> int:
        w = torch.ones(1_000_000, device="cuda", requires_grad=True)
        before = torch.cuda.memory_allocated()
        options = {"optimizer": diffopt.SGD(0.1), "steps": 20, "estimator": Reverse(1, offload=offload)}
        solution = diffopt.solve(lambda w: (w**2).mean(), w, **options)
        assert solution.kept.bytes == 20 * 4_000_000
        return torch.cuda.memory_allocated() - before

    assert max(held("cpu"), held("disk")) < held(False) / 5


@cuda
def test_dropout_draws_the_same_numbers_again() -> None:
    w, x = torch.ones(50, device="cuda", requires_grad=True), torch.rand(20, 50, device="cuda")

    def loss(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x @ w, 0.5).square().mean()

    found = []
    for estimator in (Reverse("graph"), Reverse(1), Reverse(2, offload=True)):
        torch.manual_seed(0)
        end = diffopt.solve(loss, w, x, optimizer=diffopt.SGD(0.01), steps=5, estimator=estimator).params
        found.append(torch.autograd.grad(end.sum(), w)[0])
    assert relative_error(found[1:2], found[:1]) < 1e-4
    assert relative_error(found[2:], found[:1]) < 1e-4


@cuda
def test_es_directions_from_a_generator_of_the_cpu() -> None:
    estimator = ESJacobian(4, 0.1, generator=torch.Generator().manual_seed(0))
    assert all(bool(x.isfinite().all()) for x in hypergradient(estimator, "cuda"))
