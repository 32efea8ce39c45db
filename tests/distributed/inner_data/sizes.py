"""Data of other sizes on other ranks: they keep as much, communicate as often, and refuse together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beside import numbers, same
from torch import Tensor, distributed

import diffopt
from diffopt.distributed import copied, summed
from diffopt.estimators import Reverse, Truncated


def check_unequal_data_goes_the_same_way_on_all_ranks() -> None:
    """Graphs of other sizes: what is stored, and so how often ranks communicate, is decided by the largest."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    size = 4 + 400 * rank
    ends = [sum(4 + 400 * r for r in range(q)) for q in range(world + 1)]
    x, start = numbers(ends[-1], 6, seed=1), numbers(6, seed=2)
    for estimator in (Reverse("sqrt"), Reverse(2), Reverse(memory=400_000), Truncated(3, "sqrt")):
        found = []
        for mine in (True, False):
            w = start.clone().requires_grad_()
            data = x[ends[rank] : ends[rank] + size] if mine else x

            def loss(w: Tensor, data: Tensor, mine: bool = mine) -> Tensor:
                value = (data @ (copied(w) if mine else w)).tanh().square().sum() / len(x)
                return summed(value) if mine else value

            solution = diffopt.solve(loss, w, data, optimizer=diffopt.SGD(0.1), steps=9, estimator=estimator)
            found.append(torch.autograd.grad(solution.params.pow(3).sum(), w)[0])
        same(found[:1], found[1:])


def check_own_weights_of_other_sizes_leave_as_many_slots() -> None:
    """What is wanted beside the states is each rank's own, too; and ranks refuse together."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    counts = [20 + 380 * (r == 1) for r in range(world)]
    x, weights = numbers(counts[rank], 3, seed=rank), torch.ones(counts[rank], dtype=torch.float64)
    for memory, fits in ((60_000, True), (20_000, False)):

        def slots(memory: int = memory) -> int | None:
            own = weights.clone().requires_grad_()
            solution = diffopt.solve(
                lambda w, own, x: summed((own * (x @ copied(w) - 1).square()).sum() / sum(counts)),
                numbers(3, seed=7),
                own,
                x,
                optimizer=diffopt.SGD(0.1),
                steps=40,
                estimator=Reverse(memory=memory),
            )
            assert torch.autograd.grad(solution.params.pow(3).sum(), own)[0].isfinite().all()
            return solution.kept.slots

        if fits:
            found = slots()
            assert found is not None
            every: list[Any] = [None] * world
            distributed.all_gather_object(every, found)
            assert set(every) == {found}
        else:
            with pytest.raises(diffopt.HyperparameterError, match="memory is 20000 bytes"):
                slots()
