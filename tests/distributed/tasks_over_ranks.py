"""Checks of the recipes of docs/large/ranks.md: tasks over ranks, each beside all tasks in one process."""

from __future__ import annotations

from typing import Any

import torch
from beside import numbers, same
from torch import Tensor, distributed, nn

import diffopt

TASKS = 8


def inner(params: Any, x: Tensor, y: Tensor) -> Tensor:
    return (torch.tanh(x @ params["w"]) - y).square().mean()


class Adapted(nn.Module):
    """A start that is learned, and the outer loss after three steps from it: a model whose ``forward`` solves."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.log_lr = nn.Parameter(numbers(3, seed=1)), nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        def of_task(w: Tensor, log_lr: Tensor, x: Tensor, y: Tensor) -> Tensor:
            optimizer = diffopt.SGD(log_lr.exp())
            solution = diffopt.solve(inner, {"w": w}, x[:4], y[:4], optimizer=optimizer, steps=3)
            return inner(solution.params, x[4:], y[4:])

        return torch.func.vmap(of_task, in_dims=(None, None, 0, 0))(self.w, self.log_lr, x, y).mean()


def data() -> tuple[Tensor, Tensor]:
    return numbers(TASKS, 8, 3, seed=2), numbers(TASKS, 8, seed=3)


def mine(x: Tensor) -> Tensor:
    return x[distributed.get_rank() :: distributed.get_world_size()]


def learned(model: nn.Module, batches: Any, between: Any = lambda: None) -> list[Tensor]:
    """The parameters after three outer steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(*batches).backward()
        between()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def check_hypergradients_are_averaged_by_all_reduce() -> None:
    model = Adapted()

    def average() -> None:
        for p in model.parameters():
            distributed.all_reduce(p.grad)
            p.grad /= distributed.get_world_size()

    same(learned(model, [mine(x) for x in data()], average), learned(Adapted(), data()))


def check_data_parallel_around_a_model_that_solves() -> None:
    model = nn.parallel.DistributedDataParallel(Adapted())
    same(learned(model, [mine(x) for x in data()]), learned(Adapted(), data()))


def check_mean_over_tasks_of_each_rank() -> None:
    def hypergradient(x: Tensor, y: Tensor) -> Tensor:
        w = numbers(3, seed=1).requires_grad_()

        def of_task(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return inner(diffopt.solve(inner, {"w": w}, x, y, optimizer=diffopt.SGD(0.3), steps=3).params, x, y)

        diffopt.mean_over_tasks(of_task, w, x, y, in_dims=(None, 0, 0), task_chunk=1).backward()
        return w.grad

    own = hypergradient(*(mine(x) for x in data())) / distributed.get_world_size()
    distributed.all_reduce(own)
    same([own], [hypergradient(*data())])
