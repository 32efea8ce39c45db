"""Right programs that share other things than a sum over examples are not refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beside import numbers, same
from inner_data.problem import PER_RANK, Problem, gradient_of, local, outer
from torch import Tensor, distributed
from torch.distributed.nn import functional as torchs

import diffopt
from diffopt.distributed import copied, summed


def check_right_programs_are_not_refused() -> None:
    rank, world = distributed.get_rank(), distributed.get_world_size()
    data, start = numbers(6, 3, seed=60 + rank), numbers(3, seed=7)
    alone = gradient_of(local, start, data)

    def logs(w: Tensor, x: Tensor) -> Tensor:
        value = local(w, x)
        distributed.all_reduce(value.detach().clone())
        return value

    same([gradient_of(logs, start, data)], [alone])  # tasks over ranks
    every = torch.cat([numbers(6, 3, seed=60 + r) for r in range(world)])

    def normed(w: Tensor, x: Tensor, mean: Tensor) -> Tensor:
        return ((x @ w) - mean).square().add(1).log().sum()

    def own_statistics(w: Tensor, x: Tensor) -> Tensor:
        w = copied(w)
        return summed(normed(w, x, torchs.all_reduce((x @ w).sum()) / len(every)))

    def all_statistics(w: Tensor, x: Tensor) -> Tensor:
        return normed(w, x, (x @ w).mean())

    same([gradient_of(own_statistics, start, data)], [gradient_of(all_statistics, start, every)])
    for zero in (start, torch.zeros(3, dtype=torch.float64)):  # features over ranks: params are shards
        shards = torch.cat([zero + (r if zero.any() else 0) for r in range(world)])
        mine = slice(3 * rank, 3 * rank + 3)
        x = numbers(6, 3 * world, seed=61)
        found = gradient_of(lambda w, x: (summed(x @ w) - 1).square().add(1).log().mean(), shards[mine], x[:, mine])
        same([found], [gradient_of(local, shards, x)[mine]])
    naive = gradient_of(lambda w, x: summed(local(w, x)), start, data, check=False)
    assert naive.isfinite().all()  # what is not checked is not refused


def check_what_tasks_share_is_copied_outside_of_the_loss() -> None:
    problem = Problem()

    def gradient(loss: Any, outside: Any, own: slice) -> Tensor:
        penalty = problem.penalty.clone().requires_grad_()
        given = outside(penalty), problem.x[own], problem.y[own]
        solution = diffopt.solve(loss, problem.start, *given, optimizer=diffopt.SGD(0.05), steps=3)
        return torch.autograd.grad(outer(solution.params), penalty)[0]

    def of_task(p: Any, penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return penalty.exp() * (x @ p["w"] + p["b"] - y).square().add(1).log().mean()

    every = [gradient(of_task, lambda x: x, slice(PER_RANK * r, PER_RANK * (r + 1))) for r in range(problem.world)]
    same([gradient(of_task, copied, problem.own)], [sum(every)])
    with pytest.raises(diffopt.RanksError, match=r"solve\(loss, params, copied\(penalty\)\)") as refused:
        gradient(lambda p, penalty, x, y: of_task(p, copied(penalty), x, y), lambda x: x, problem.own)
    assert len(str(refused.value)) < 300
