"""A small network whose params and data lie on ranks in several ways, and in one process."""

from __future__ import annotations

from typing import Any

import torch
from beside import numbers
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

import diffopt

TOLERANCE = 1e-10
WHOLE, ROWS, COLUMNS = [Replicate()], [Shard(0)], [Shard(1)]


class Layout:
    """Where the params and the data of a problem lie; ``None`` for both: in one process."""

    def __init__(self, params: Any = None, data: Any = None, *, plain: bool = False) -> None:
        self.mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        self.params, self.data, self.plain = params, data, plain

    def spread(self, x: Tensor, placements: Any) -> Tensor:
        return x.clone() if placements is None else distribute_tensor(x.clone(), self.mesh, placements)

    def shared(self, x: Tensor) -> Tensor:
        return self.spread(x, None if self.params is None or self.plain else WHOLE)

    def of(self, name: str) -> Any:
        return self.params[name] if isinstance(self.params, dict) else self.params


PARAMS = {"w1": 0.5 * numbers(4, 3, seed=1), "b1": 0.1 * numbers(4, seed=2), "w2": 0.5 * numbers(4, 4, seed=3)}
PLACES = {
    "fully sharded": (ROWS, WHOLE),
    "tensor parallel": ({"w1": ROWS, "b1": ROWS, "w2": COLUMNS}, WHOLE),
    "sharded data": (WHOLE, ROWS),
    "both": (ROWS, ROWS),
}
TWO = {name: PLACES[name] for name in ("tensor parallel", "both")}


def loss(params: Any, penalty: Tensor, weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    hidden = torch.tanh(x @ params["w1"].t() + params["b1"])
    errors = (hidden @ params["w2"].t() - y).square().sum(-1)
    return (weights * errors).mean() + penalty.exp() * sum(p.pow(4).sum() for p in params.values())


def full(x: Any) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def gradients(at: Layout, optimizer: Any, *, numbers_only: bool = False, **options: Any) -> list[Tensor]:
    """The hypergradients of params, weights, penalty and learning rate; ``numbers_only``: of the last two."""
    params = {name: at.spread(x, at.of(name)) for name, x in PARAMS.items()}
    penalty, lr = (at.shared(torch.tensor(x, dtype=torch.float64)).requires_grad_() for x in (-1.0, 0.05))
    weights = at.spread(numbers(8, seed=6).exp(), at.data)
    data = at.spread(numbers(8, 3, seed=4), at.data), at.spread(numbers(8, 4, seed=5), at.data)
    inputs = [penalty, lr]
    if not numbers_only:
        inputs = [*(x.requires_grad_() for x in params.values()), weights.requires_grad_(), *inputs]
    solution = diffopt.solve(loss, params, penalty, weights, *data, optimizer=optimizer(lr), steps=3, **options)
    outer = sum((p.pow(3).sum() for p in solution.params.values()), full(solution.losses.detach()).sum() * 0)
    found = torch.autograd.grad(outer, inputs, allow_unused=True)
    return [torch.zeros_like(full(x)) if g is None else full(g) for g, x in zip(found, inputs, strict=True)]


def same(found: list[Tensor], expected: list[Tensor], what: Any) -> None:
    apart = [float((a - b).norm() / b.norm().clamp(min=1)) for a, b in zip(found, expected, strict=True)]
    assert max(apart) < TOLERANCE, (what, apart)


def sgd(lr: Tensor) -> diffopt.SGD:
    return diffopt.SGD(lr, momentum=0.5)
