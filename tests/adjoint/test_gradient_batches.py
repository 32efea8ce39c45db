"""Batches of gradients, ``is_grads_batched`` and ``jacobian(vectorize=True)``: the numbers of a loop over them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ridge_by_hand import EXACT, assert_same, leaves, loop, loss, solved
from torch import Tensor

import diffopt
from diffopt.estimators import Binomial, ESJacobian, FirstOrder, Implicit, Krylov, Reptile, Truncated


@pytest.fixture(params=EXACT)
def exact(request: pytest.FixtureRequest) -> Any:
    return EXACT[request.param]


def by_batched_grads(end: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    rows = torch.eye(3, dtype=torch.float64)
    return list(torch.autograd.grad(end, inputs, rows, is_grads_batched=True))


def by_loop(end: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    rows = [torch.autograd.grad(end[i], inputs, retain_graph=True) for i in range(3)]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def test_gradients_in_a_batch_are_those_of_a_loop(exact: Any) -> None:
    inputs = leaves()
    assert_same(by_batched_grads(solved(*inputs, estimator=exact), inputs), by_loop(loop(*inputs), inputs))


def test_a_vectorised_jacobian_is_that_of_the_loop(exact: Any) -> None:
    inputs = tuple(x.detach() for x in leaves())
    found = torch.autograd.functional.jacobian(lambda *g: solved(*g, estimator=exact), inputs, vectorize=True)
    assert_same(found, torch.autograd.functional.jacobian(loop, inputs))


BIASED = [FirstOrder(), Reptile(), Truncated(2), Binomial(1), Krylov(1), Implicit()]


@pytest.mark.parametrize("estimator", BIASED, ids=lambda estimator: type(estimator).__name__)
def test_estimates_of_a_batch_of_gradients_are_those_of_a_loop(estimator: Any) -> None:
    inputs = leaves()
    kept = inputs[:1] if isinstance(estimator, FirstOrder | Reptile) else inputs[:2]
    found = by_batched_grads(solved(*inputs, estimator=estimator), kept)
    assert_same(found, by_loop(solved(*inputs, estimator=estimator), kept))


def test_differences_along_random_directions_have_batches_too() -> None:
    """Whose directions are other ones in every call."""
    inputs = leaves()
    found = by_batched_grads(solved(*inputs, estimator=ESJacobian(4, 1e-4)), inputs)
    assert [x.shape for x in found] == [(3, 3), (3,), (3,)]
    assert all(bool(x.isfinite().all()) for x in found)


def test_two_solves_in_a_row_have_batched_gradients_too(exact: Any) -> None:
    inputs = leaves()
    found = by_batched_grads(solved(solved(*inputs, estimator=exact), *inputs[1:], estimator=exact), inputs)
    assert_same(found, by_loop(loop(loop(*inputs), *inputs[1:]), inputs))


def test_a_batch_that_reaches_only_some_of_the_state_is_right(exact: Any) -> None:
    """The cotangents of other leaves are not batched, or none."""
    inputs = leaves()

    def of_tree(p: dict[str, Tensor], penalty: Tensor) -> Tensor:
        return loss(p["a"] + p["b"].sin(), penalty)

    def plain(w: Tensor, penalty: Tensor, lr: Tensor) -> Tensor:
        p, velocity = [1 * w, 2 * w], [torch.zeros_like(w)] * 2
        for _ in range(4):
            grads = torch.autograd.grad(of_tree(dict(zip("ab", p, strict=True)), penalty), p, create_graph=True)
            velocity = [0.6 * v + g for v, g in zip(velocity, grads, strict=True)]
            p = [q - lr * v for q, v in zip(p, velocity, strict=True)]
        return p[0]

    start = {"a": inputs[0], "b": 2 * inputs[0]}
    optimizer = diffopt.SGD(inputs[2], momentum=0.6)
    end = diffopt.solve(of_tree, start, inputs[1], optimizer=optimizer, steps=4, estimator=exact).params["a"]
    assert_same(by_batched_grads(end, inputs), by_loop(plain(*inputs), inputs))
