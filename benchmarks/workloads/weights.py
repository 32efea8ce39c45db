"""W5: example weights learned by a weight network; the inner problem is an MLP 784-128-10, batch 128, momentum.

Each example's weight is a small network's function of its loss, as in Shu et al. (2019), "Meta-Weight-Net"; the
weight is part of the inner loss, so that the hypergradient is the derivative of what is run.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import methods
from benchmarks.measure import Cell, Size
from benchmarks.peers import jax_losses
from benchmarks.problem import Data, Params, Problem

METHODS = (
    methods.PLAIN_LOOP,
    methods.HIGHER,
    methods.TORCHOPT_META,
    methods.TORCHOPT_FUNCTIONAL,
    *methods.by_jax(jax_losses.Weights()),
    *methods.OURS_LOOPED,
)


def losses(params: Params, data: Data) -> Tensor:
    """The cross entropy of every example."""
    inputs, labels = data
    logits = torch.relu(inputs @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
    return functional.cross_entropy(logits, labels, reduction="none")


def inner(params: Params, hyper: Params, support: Data) -> Tensor:
    each = losses(params, support)
    hidden = torch.relu(each[:, None] @ hyper["v1"] + hyper["c1"])
    weights = torch.sigmoid(hidden @ hyper["v2"] + hyper["c2"]).squeeze(1)
    return (weights * each).mean()


def outer(params: Params, query: Data) -> Tensor:
    return losses(params, query).mean()


def problem(dtype: torch.dtype, device: torch.device, tasks: int, steps: int, batch: int, width: int) -> Problem:
    """Noise images with random labels."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, dtype=dtype)
    initial = {
        "w1": draw(784, width) / 28,
        "b1": 0.1 * draw(width),
        "w2": draw(width, 10) / width**0.5,
        "b2": 0.1 * draw(10),
    }
    hyper = {"v1": draw(1, 100), "c1": 0.1 * draw(100), "v2": 0.1 * draw(100, 1), "c2": 0.1 * draw(1)}
    initial, hyper = ({name: x.to(device) for name, x in params.items()} for params in (initial, hyper))
    labels = [torch.randint(10, (1, batch), generator=generator) for _ in range(2)]
    support, query = ((draw(1, batch, 784).to(device), y.to(device)) for y in labels)
    return Problem(inner, outer, initial, hyper, support, query, steps, lr=0.05, momentum=0.9)


def cells(size: Size) -> list[Cell]:
    batch, width = (4, 5) if size is Size.SMOKE else (128, 128)
    settings = {Size.FULL: ((10, 25), (50, 50)), Size.QUICK: ((10, 10), (50, 20)), Size.SMOKE: ((3, 0),)}[size]
    ways = METHODS if size is Size.SMOKE else (*METHODS, methods.PROGRAM, methods.LOOP_COMPILED)
    return [
        Cell("W5", f"T={steps}", functools.partial(problem, steps=steps, batch=batch, width=width), ways, seconds=s)
        for steps, s in settings
    ]
