"""Exact reverse through 1000 steps of 200,000 params: checkpoints against retained graphs.

Params and data of ``benchmarks.memory``: a quartic bowl with one matrix-vector product of width 447.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks import methods
from benchmarks.measure import Cell, Size
from benchmarks.problem import Data, Params, Problem

METHODS = (methods.PLAIN_LOOP, methods.HIGHER, *methods.OURS_LOOPED)


def inner(params: Params, hyper: Params, support: Data) -> Tensor:
    (inputs,) = support
    return (inputs @ params["w"]).tanh().square().mean() + hyper["log_decay"].exp() * params["w"].square().sum()


def outer(params: Params, query: Data) -> Tensor:
    (inputs,) = query
    return (inputs @ params["w"]).tanh().square().mean()


def problem(dtype: torch.dtype, device: torch.device, tasks: int, width: int, steps: int) -> Problem:
    """A matrix of ``width * width`` params, and the decay's logarithm as the hyperparameter."""
    generator = torch.Generator().manual_seed(0)
    initial = {"w": (torch.randn(width, width, generator=generator, dtype=dtype) / width**0.5).to(device)}
    data = torch.randn(1, 8, width, generator=generator, dtype=dtype).to(device)
    hyper = {"log_decay": torch.tensor(-7.0, dtype=dtype, device=device)}
    return Problem(inner, outer, initial, hyper, (data,), (data,), steps, lr=0.1)


def cells(size: Size) -> list[Cell]:
    width, steps = {Size.FULL: (447, 1000), Size.QUICK: (447, 200), Size.SMOKE: (9, 5)}[size]
    make = functools.partial(problem, width=width, steps=steps)
    return [Cell("Long", f"T={steps}, {width**2:,} params", make, METHODS, seconds=60 if size is Size.FULL else 0)]
