"""A network of many small leaves: 150 layers of width 16, so 300 of them; what a leaf costs is overhead."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks import methods
from benchmarks.measure import Cell, Size
from benchmarks.problem import Data, Params, Problem

METHODS = (methods.PLAIN_LOOP, methods.HIGHER, methods.TORCHOPT_META, methods.OURS_LOOP_GRAPH)


def inner(params: Params, hyper: Params, support: Data) -> Tensor:
    return outer(params, support) * hyper["log_scale"].exp()


def outer(params: Params, query: Data) -> Tensor:
    now, targets = query
    for i in range(len(params) // 2):
        now = now + torch.tanh(now @ params[f"w{i}"] + params[f"b{i}"])
    return (now - targets).square().mean()


def problem(dtype: torch.dtype, device: torch.device, tasks: int, layers: int, steps: int) -> Problem:
    """Noise through an untrained network, and the loss's scale as the hyperparameter."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=dtype)
    initial: Params = {}
    for i in range(layers):
        initial |= {f"w{i}": draw(16, 16) / 16 / layers**0.5, f"b{i}": 0.1 * draw(16)}
    initial = {name: x.to(device) for name, x in initial.items()}
    support, query = ((draw(1, 8, 16).to(device), draw(1, 8, 16).to(device)) for _ in range(2))
    hyper = {"log_scale": torch.zeros((), dtype=dtype, device=device)}
    return Problem(inner, outer, initial, hyper, support, query, steps, lr=0.01)


def cells(size: Size) -> list[Cell]:
    layers, steps = (3, 2) if size is Size.SMOKE else (150, 6)
    seconds = {Size.FULL: 15, Size.QUICK: 10, Size.SMOKE: 0}[size]
    make = functools.partial(problem, layers=layers, steps=steps)
    return [Cell("Leaves", f"T={steps}, {2 * layers} leaves", make, METHODS, seconds=seconds)]
