"""Programs that solve no problem of all ranks, or solve it wrongly, are refused on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beside import numbers, same
from inner_data.problem import Problem, gradient_of, local
from torch import Tensor, distributed
from torch.distributed.nn import functional as torchs

import diffopt
from diffopt.distributed import copied, summed
from diffopt.estimators import FirstOrder, Reverse, Truncated, Unrolled


def reduced(x: Tensor) -> Tensor:
    distributed.all_reduce(x)
    return x


def functional_reduced(x: Tensor) -> Tensor:
    from torch.distributed import _functional_collectives

    return _functional_collectives.all_reduce(x, "sum", distributed.group.WORLD)


def check_naive_collectives_are_refused() -> None:
    """At other starts, of zeros and of equal numbers too."""
    data = numbers(6, 3, seed=60 + distributed.get_rank())
    naive: dict[str, Any] = {
        "in place": lambda w, x: reduced(local(w, x)),
        "in place, of a mean": lambda w, x: reduced(local(w, x) / distributed.get_world_size()) + w.square().sum(),
        "in place, of a copy": lambda w, x: reduced(local(copied(w), x)),
        "in place, within": lambda w, x: (reduced(x @ w) - 1).square().add(1).log().mean(),
        "torch's": lambda w, x: torchs.all_reduce(local(w, x)),
        "torch's, of a copy": lambda w, x: torchs.all_reduce(local(copied(w), x)),
        "gathered": lambda w, x: torch.stack(list(torchs.all_gather(local(w, x)))).mean(),
        "not copied": lambda w, x: summed(local(w, x)),
        "not copied, and more": lambda w, x: summed(local(w, x)) + w.square().sum(),
    }
    if "autograd" in getattr(functional_reduced(torch.ones((), requires_grad=True)).grad_fn, "name", str)():
        naive["functional"] = lambda w, x: functional_reduced(local(w, x))
    for name, loss in naive.items():
        for start in (numbers(3, seed=7), torch.zeros(3, dtype=torch.float64)):
            for estimator in (Reverse(), Reverse(1), Truncated(1), Unrolled()):
                try:
                    gradient_of(loss, start, data, estimator=estimator)
                except diffopt.RanksError as error:
                    said = str(error)
                else:
                    said = f"{name} was not refused, by {estimator}"
                assert "summed(local_loss(copied(params), batch))" in said


def check_fields_that_are_not_copied_are_refused() -> None:
    """Their value is the same on all ranks, as it should be; their derivative is each rank's own."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    data = [numbers(4, 3, seed=60 + r) for r in range(world)]

    def terms(w: Tensor, x: Tensor) -> Tensor:
        return x.t() @ (x @ w).sin() + w

    def right(w: Tensor, x: Tensor) -> Tensor:
        return summed(terms(copied(w), x)) + 0.1 * w

    def wrong(w: Tensor, x: Tensor) -> Tensor:
        return summed(terms(w, x)) + 0.1 * w

    def whole(w: Tensor, x: Tensor) -> Tensor:
        return sum((terms(w, x) for x in data), 0.1 * w)

    for start in (numbers(3, seed=7), torch.zeros(3, dtype=torch.float64)):
        for estimator in (Reverse(), Reverse(1), Unrolled()):
            with pytest.raises(diffopt.RanksError, match="get the same vector field, but Jacobians") as refused:
                gradient_of(diffopt.VectorField(wrong), start, data[rank], estimator=estimator)
            assert len(str(refused.value)) < 300
            found = [
                gradient_of(diffopt.VectorField(field), start, data[rank], estimator=estimator)
                for field in (right, whole)
            ]
            same(found[:1], found[1:])
    cut = gradient_of(diffopt.VectorField(lambda w, x: right(w, x).detach() + 0 * w), numbers(3, seed=7), data[rank])
    assert cut.isfinite().all()


def check_replicas_that_differ_are_refused() -> None:
    rank = distributed.get_rank()
    data = numbers(6, 3, seed=60 + rank)
    for start in (numbers(3, seed=rank), numbers(3, seed=1) + 1e-5 * rank, numbers(3, seed=1).roll(rank)):
        for estimator in (Reverse(), Unrolled()):
            with pytest.raises(diffopt.RanksError, match="copied was given tensors that differ"):
                gradient_of(lambda w, x: summed(local(copied(w), x)), start, data, estimator=estimator)


def check_optimizers_that_differ_are_refused() -> None:
    rank = distributed.get_rank()
    data, start = numbers(6, 3, seed=60 + rank), numbers(3, seed=1)
    for estimator in (Reverse(), Unrolled()):
        for rate in (0.1 + 0.01 * rank, torch.tensor(0.1 + 0.01 * rank, dtype=torch.float64)):
            with pytest.raises(diffopt.RanksError, match="the first update leads the ranks"):
                diffopt.solve(
                    lambda w, x: summed(local(copied(w), x)),
                    start.requires_grad_(),
                    data,
                    optimizer=diffopt.SGD(rate),
                    steps=2,
                    estimator=estimator,
                )


def check_outer_losses_that_differ_are_refused() -> None:
    data = numbers(6, 3, seed=60 + distributed.get_rank())
    held_out, world = numbers(6, 3, seed=80 + distributed.get_rank()), distributed.get_world_size()
    every = torch.cat([numbers(6, 3, seed=60 + r) for r in range(world)])
    beyond = torch.cat([numbers(6, 3, seed=80 + r) for r in range(world)])

    def shared(w: Tensor, x: Tensor) -> Tensor:
        return summed(local(copied(w), x))

    for estimator in (Reverse(), Reverse(1), Unrolled(), FirstOrder()):
        with pytest.raises(diffopt.RanksError, match="the gradients of their outer losses"):
            gradient_of(shared, numbers(3, seed=7), data, lambda w: local(w, held_out), estimator=estimator)
        whole = gradient_of(shared, numbers(3, seed=7), data, lambda w: shared(w, held_out), estimator=estimator)
        expected = gradient_of(
            lambda w, x: world * local(w, x),
            numbers(3, seed=7),
            every,
            lambda w: world * local(w, beyond),
            estimator=estimator,
        )
        same([whole], [expected])


def check_outer_losses_of_other_results_are_refused() -> None:
    """Of other leaves, which is to make no rank wait in vain, and of what is handed out along the way."""
    problem = Problem()
    rank = problem.rank
    outers: dict[str, Any] = {
        "a leaf": lambda s: s.params["w"].sum() + (s.params["b"].sum() if rank == 0 else 0),
        "other leaves": lambda s: s.params["w"].sum() if rank == 0 else s.params["b"].sum(),
        "losses": lambda s: s.losses.sum() * (1 + rank),
        "losses of one rank": lambda s: s.losses.sum() if rank == 0 else s.params["w"].sum(),
        "observed": lambda s: s.observed.sum() * (1 + rank),
    }
    for name, of_all in outers.items():
        for estimator in (Reverse(), Unrolled()):
            penalty = problem.penalty.clone().requires_grad_()
            args = problem.weights[problem.own], penalty, problem.x[problem.own], problem.y[problem.own]
            options: dict[str, Any] = {"observe": lambda p, *_: p["w"].square().sum()}
            given = {"optimizer": diffopt.SGD(0.05), "steps": 3, "estimator": estimator, **options}
            solution = diffopt.solve(problem.spread, problem.start, *args, **given)
            try:
                torch.autograd.grad(of_all(solution), penalty)
            except diffopt.RanksError as error:
                said = str(error)
            else:
                said = f"{name} was not refused, by {estimator}"
            assert "the gradients of their outer losses" in said, said


def check_losses_that_do_not_depend_on_params_are_refused() -> None:
    data = numbers(6, 3, seed=60 + distributed.get_rank())
    for estimator in (Reverse(), Unrolled()):
        with pytest.raises(diffopt.DisconnectedError):
            gradient_of(
                lambda w, x: summed(x.square().sum()) + 0 * x.sum().requires_grad_(),
                numbers(3, seed=7),
                data,
                estimator=estimator,
            )


def check_what_is_observed_is_the_same_on_all_ranks() -> None:
    """Predictions for a rank's own examples are not; a sum over all is, and has the derivative of one process."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    data = [numbers(4 + r, 3, seed=60 + r) for r in range(world)]
    every, start = torch.cat(data), numbers(3, seed=7)

    def shared(w: Tensor, x: Tensor) -> Tensor:
        return summed((copied(w) * x).sin().sum() / len(every))

    def whole(w: Tensor, x: Tensor) -> Tensor:
        return (w * x).sin().sum() / len(every)

    def gradient(loss: Any, x: Tensor, observe: Any, estimator: Any) -> Tensor:
        w = start.clone().requires_grad_()
        options: dict[str, Any] = {
            "optimizer": diffopt.SGD(0.1),
            "steps": 3,
            "observe": observe,
            "estimator": estimator,
        }
        return torch.autograd.grad(diffopt.solve(loss, w, x, **options).observed.pow(3).sum(), w)[0]

    def squares(w: Tensor, x: Tensor) -> Tensor:
        return (x @ w).square().sum()

    for estimator in (Reverse(), Unrolled()):
        with pytest.raises(
            diffopt.RanksError, match=r"observe a sum: summed\(f\(copied\(params\), data\)\)"
        ) as refused:
            gradient(shared, data[rank], lambda w, x: x @ copied(w), estimator)
        assert len(str(refused.value)) < 300
        found = gradient(shared, data[rank], lambda w, x: summed(squares(copied(w), x)), estimator)
        same([found], [gradient(whole, every, squares, estimator)])
