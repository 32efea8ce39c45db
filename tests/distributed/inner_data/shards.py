"""Features over ranks: params that are shards, each rank's own, in tensors that do not know of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beside import numbers, same
from inner_data.problem import gradient_of, local
from torch import Tensor, distributed

import diffopt
from diffopt.distributed import copied, summed
from diffopt.estimators import Binomial, ESJacobian, ForwardMode, Implicit, Krylov, Reverse, Truncated, Unrolled
from diffopt.linear_solve import GMRES, Neumann


def check_shards_of_other_sizes() -> None:
    """Features over ranks: params that are shards, of other shapes on each rank, or other numbers of them."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    sizes = [3 if r == 0 else 2 for r in range(world)]
    first = sum(sizes[:rank])
    mine, x, start = slice(first, first + sizes[rank]), numbers(6, sum(sizes), seed=61), numbers(sum(sizes), seed=62)

    def shards(w: Tensor, x: Tensor) -> Tensor:
        return (summed(x @ w) - 1).square().add(1).log().mean()

    found = gradient_of(shards, start[mine], x[:, mine])
    same([found], [gradient_of(local, start, x)[mine]])
    parts = start[mine].split(2)  # two leaves on the first rank, one on the others
    leaves = [p.clone().requires_grad_() for p in parts]
    options = {"optimizer": diffopt.SGD(0.1), "steps": 3}
    solution = diffopt.solve(lambda ps, x: shards(torch.cat(ps), x), leaves, x[:, mine], **options)
    same(torch.autograd.grad(torch.cat(solution.params).pow(3).sum(), leaves), found.split(2))
    with pytest.raises(diffopt.RanksError, match="copied was given 1 tensor") as refused:
        gradient_of(lambda w, x: shards(copied(w), x), start[mine], x[:, mine])
    assert len(str(refused.value)) < 300


def check_shards_that_start_equal_may_have_a_penalty() -> None:
    """The sum of squares of all shards is one number, and their gradients differ all the same."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    x = numbers(6, 2 * world, seed=61)
    mine = slice(2 * rank, 2 * rank + 2)

    def shards(w: Tensor, x: Tensor) -> Tensor:
        return (summed(x @ w) - 1).square().mean() + 0.3 * summed(w.square().sum())

    def whole(w: Tensor, x: Tensor) -> Tensor:
        return (x @ w - 1).square().mean() + 0.3 * w.square().sum()

    for number in (0.0, 1.0):
        start = torch.full((2 * world,), number, dtype=torch.float64)
        same([gradient_of(shards, start[mine], x[:, mine])], [gradient_of(whole, start, x)[mine]])
    with pytest.raises(diffopt.RanksError, match=r"if params are shards, check=False") as refused:  # of one example
        gradient_of(shards, torch.zeros(2, dtype=torch.float64), x[:1, mine])
    assert len(str(refused.value)) < 300


class Scaled:
    """Regression on features of which each rank holds some, whose scale and penalty all ranks share."""

    def __init__(self, sizes: list[int]) -> None:
        rank = distributed.get_rank()
        first = sum(sizes[:rank])
        self.own = slice(first, first + sizes[rank])
        self.x, self.start = numbers(6, sum(sizes), seed=61), numbers(sum(sizes), seed=62)

    def shards(self, w: Tensor, scale: Tensor, x: Tensor) -> Tensor:
        scale = copied(scale)
        ends, penalty = summed((x @ (scale.exp() * w), scale.square() * w.pow(4).sum()))
        return (ends - 1).square().add(1).log().mean() + penalty

    def whole(self, w: Tensor, scale: Tensor, x: Tensor) -> Tensor:
        return (x @ (scale.exp() * w) - 1).square().add(1).log().mean() + scale.square() * w.pow(4).sum()

    def solved(self, loss: Any, own: slice, estimator: Any) -> tuple[Tensor, list[Tensor]]:
        """A function of the solution, each rank's own, and what is learned: the scale, and the start."""
        w, scale = self.start[own].clone(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        given = [scale] if isinstance(estimator, Implicit) else [scale, w.requires_grad_()]
        solution = diffopt.solve(
            loss, w, scale, self.x[:, own], optimizer=diffopt.SGD(0.05), steps=4, estimator=estimator
        )
        return solution.params.pow(3).sum(), given


def check_shards_may_share_an_argument() -> None:
    """It is copied where each rank uses it beside its own params, which may be of other sizes."""
    world = distributed.get_world_size()
    for sizes in ([2] * world, [3, *[2] * (world - 1)]):
        problem = Scaled(sizes)
        for estimator in (Reverse(), Reverse(1), Reverse("sqrt"), Truncated(2), Binomial(order=2), Unrolled()):
            found = torch.autograd.grad(*problem.solved(problem.shards, problem.own, estimator))
            scale, start = torch.autograd.grad(*problem.solved(problem.whole, slice(None), estimator))
            same(found, [scale, start[problem.own]])


def check_rules_that_take_inner_products_refuse_shards() -> None:
    """Those of a rank's own part are not those of the params."""
    problem = Scaled([2] * distributed.get_world_size())
    es = ESJacobian(1, 1e-4, generator=torch.Generator().manual_seed(3))
    for estimator in (ForwardMode(), es, Krylov(order=2), *map(Implicit, (None, GMRES(), Neumann()))):
        end, given = problem.solved(problem.shards, problem.own, estimator)
        for _ in range(2):
            with pytest.raises(diffopt.EstimatorError, match="with params that each rank holds for itself"):
                torch.autograd.grad(end, given, retain_graph=True)
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    own = problem.own
    attached = diffopt.implicit(problem.shards, problem.start[own], scale, problem.x[:, own], stationarity=None)
    with pytest.raises(diffopt.EstimatorError, match="with params that each rank holds for itself"):
        attached.sum().backward()


def check_shards_that_start_equal_and_share_an_argument_are_refused() -> None:
    """They look like params that were not copied, and it is said what to do if they are shards."""
    problem = Scaled([2] * distributed.get_world_size())
    problem.start = torch.ones_like(problem.start)
    for estimator in (Reverse(), Unrolled()):
        with pytest.raises(diffopt.RanksError, match="if params are shards that start equal, check=False") as refused:
            problem.solved(problem.shards, problem.own, estimator)
        assert len(str(refused.value)) < 400
