"""Sparse tensors beside a solve: constants that a loss reads, cotangents of an outer loss, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import relative_error
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional as F  # noqa: N812  (its usual name)

import diffopt
from diffopt import SGD, Adam, solve
from diffopt.estimators import Binomial, FirstOrder, ForwardMode, Krylov, Reverse, Truncated, Unrolled

ROWS = torch.tensor([[1.0, 0, 2], [0, 0, 0.5], [0.3, 1, 0], [0, 2, 0]], dtype=torch.float64)
START = torch.tensor([0.2, -0.4, 0.6], dtype=torch.float64)
pytestmark = pytest.mark.filterwarnings("ignore:Sparse:UserWarning", "ignore:.*jit.script.*:DeprecationWarning")


def loss(w: Tensor, rows: Tensor) -> Tensor:
    return (torch.mv(rows, w) - 1).square().sum() + w.pow(4).sum()


def end(w: Tensor, rows: Tensor, estimator: Any) -> Tensor:
    return solve(loss, w, rows, optimizer=SGD(0.05), steps=3, estimator=estimator).params


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Tensor]] = {
    "grad": lambda function: grad(lambda w: function(w).square().sum())(START),
    "vmap": lambda function: vmap(function)(torch.stack([START, 2 * START])),
}


@pytest.mark.parametrize("estimator", [Reverse(), Reverse(1), Unrolled()], ids=repr)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_sparse_constant_under_transforms(transform: str, estimator: Any) -> None:
    sparse, dense = (
        TRANSFORMS[transform](lambda w, rows=rows: end(w, rows, estimator)) for rows in (ROWS.to_sparse(), ROWS)
    )
    assert relative_error([sparse], [dense]) < 1e-12


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_a_sparse_constant_of_implicit_gradients_has_none(layout: str) -> None:
    """It would be dense, and nobody has asked for it."""

    def quadratic(w: Tensor, matrix: Tensor, aim: Tensor) -> Tensor:
        return w.dot(torch.mv(matrix, w)) / 2 - w.dot(aim)

    matrix = ROWS.T @ ROWS + torch.eye(3, dtype=torch.float64)
    w = torch.linalg.solve(matrix, START)
    options = {"cotangent": START, "solver": diffopt.linear_solve.Dense()}
    found, by_aim = diffopt.implicit_gradients(quadratic, w, getattr(matrix, layout)(), START, **options).args
    assert found is None
    assert relative_error([by_aim], [w]) < 1e-12


def embedded(table: Tensor, sparse: bool) -> Tensor:
    return F.embedding(torch.tensor([0, 2, 2]), table, sparse=sparse)


@pytest.mark.parametrize(
    "estimator", [Reverse(), Reverse(1), Truncated(2), FirstOrder(), ForwardMode(), Binomial(3), Krylov(3)], ids=repr
)
def test_a_sparse_cotangent_of_the_outer_loss(estimator: Any) -> None:
    """That of an embedding with ``sparse=True``."""
    found = []
    for sparse in (True, False):
        table = ROWS.clone().requires_grad_()
        trained = solve(lambda w: w.pow(4).sum(), table, optimizer=Adam(0.1), steps=3, estimator=estimator).params
        found += torch.autograd.grad(embedded(trained, sparse).square().sum(), table)
    assert found[0].layout is torch.strided
    assert relative_error(found[:1], found[1:]) < 1e-12


REQUIRED = r"args\[0\] is .* requires grad.*expected a dense one.*values\(\)"


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.parametrize("estimator", [Reverse(), Unrolled(), ForwardMode(), Krylov(2)], ids=repr)
def test_a_sparse_tensor_to_be_learned_is_refused(layout: str, estimator: Any) -> None:
    with pytest.raises(diffopt.LeafError, match=REQUIRED):
        end(START, getattr(ROWS, layout)().requires_grad_(), estimator)
    with pytest.raises(diffopt.LeafError, match=REQUIRED):
        end(START, getattr(ROWS.clone().requires_grad_(), layout)(), estimator)


def test_what_the_refusal_advises_is_right() -> None:
    places, values = ROWS.to_sparse().indices(), ROWS.to_sparse().values().requires_grad_()

    def of_values(w: Tensor, values: Tensor) -> Tensor:
        return loss(w, torch.sparse_coo_tensor(places, values, (4, 3), check_invariants=True))

    trained = solve(of_values, START, values, optimizer=SGD(0.05), steps=3, estimator=Reverse(1)).params
    (found,) = torch.autograd.grad(trained.sum(), values)
    dense = ROWS.clone().requires_grad_()
    (expected,) = torch.autograd.grad(end(START, dense, Reverse(1)).sum(), dense)
    assert relative_error([found], [expected[tuple(places)]]) < 1e-12


def by_embedding(optimizer: Any, estimator: Any, *, sparse: bool = True) -> Any:
    def loss(p: dict[str, Tensor]) -> Tensor:
        return embedded(p["w"], sparse=sparse).square().sum()

    w = ROWS.clone().requires_grad_()
    return w, solve(loss, {"w": w}, optimizer=optimizer, steps=3, estimator=estimator).params["w"]


@pytest.mark.parametrize("estimator", [Reverse(), Reverse(1), Unrolled()], ids=repr)
@pytest.mark.parametrize("optimizer", [SGD(0.1), diffopt.Adagrad(0.1)], ids=repr)
def test_a_sparse_inner_gradient_that_is_differentiated_is_refused_at_once(optimizer: Any, estimator: Any) -> None:
    with pytest.raises(diffopt.MissingDerivativeError, match=r"by params\['w'\] is sparse.*write sparse=False"):
        by_embedding(optimizer, estimator)


@pytest.mark.parametrize("optimizer", [SGD(0.1, weight_decay=0.1), Adam(0.1), diffopt.Adagrad(0.1)], ids=repr)
def test_a_sparse_inner_gradient_that_nobody_differentiates_is_a_dense_one(optimizer: Any) -> None:
    found = [by_embedding(optimizer, FirstOrder(), sparse=sparse) for sparse in (True, False)]
    (by_sparse,), (by_dense,) = (torch.autograd.grad(end.square().sum(), w) for w, end in found)
    assert relative_error([found[0][1], by_sparse], [found[1][1], by_dense]) < 1e-12
    with torch.no_grad():
        ends = [by_embedding(optimizer, Unrolled(), sparse=sparse)[1] for sparse in (True, False)]
    assert relative_error(ends[:1], ends[1:]) < 1e-12
