"""Modules that spread, or average, by hooks: the bare one is called."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from beside import numbers
from sharded.layouts import ROWS, WHOLE, Layout, full, same
from torch import Tensor, nn

import diffopt


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def check_fully_sharded_modules() -> None:
    from torch.distributed.fsdp import fully_shard

    module, at = network(), Layout(ROWS, WHOLE)
    bare = copy.deepcopy(module)
    fully_shard(module)
    with pytest.raises(diffopt.RanksError, match="functional was given a module within fully_shard"):
        diffopt.functional(module)
    x, y = numbers(12, 6, seed=4), numbers(12, 4, seed=5)
    whole_data = at.spread(x, WHOLE), at.spread(y, WHOLE)
    for data, error in (((x, y), diffopt.RanksError), (whole_data, diffopt.DeviceError)):
        fresh = network()  # whose hooks have not run yet
        fully_shard(fresh)
        with pytest.raises(error, match=r"own parameters in the(ir)? place.* functional\(bare\)"):
            diffopt.solve(
                lambda p, x, y, fresh=fresh: (torch.func.functional_call(fresh, p, (x,)) - y).square().mean(),
                {name: p.detach() for name, p in fresh.named_parameters()},
                *data,
                optimizer=diffopt.SGD(0.1),
                steps=1,
            )
    function, whole = diffopt.functional(bare)

    def hypergradient(params: Any, x: Tensor, y: Tensor) -> list[Tensor]:
        start = {name: p.detach().requires_grad_() for name, p in params.items()}
        options = {"optimizer": diffopt.Adam(0.01), "steps": 3}
        solution = diffopt.solve(lambda p, x, y: (function(p, x) - y).square().mean(), start, x, y, **options)
        outer = sum(p.pow(3).sum() for p in solution.params.values())
        return [full(g) for g in torch.autograd.grad(outer, list(start.values()))]

    spread = hypergradient(dict(module.named_parameters()), *whole_data)
    same(spread, hypergradient(whole, x, y), "the bare module")


def check_modules_in_data_parallel() -> None:
    wrapped = nn.parallel.DistributedDataParallel(network())
    for module in (wrapped, nn.Sequential(wrapped, nn.Tanh())):
        with pytest.raises(diffopt.RanksError, match=r"write functional\(wrapped.module\)"):
            diffopt.functional(module)
    _, params = diffopt.functional(wrapped.module)
    assert len(params) == 4
