"""W1: MAML on sine waves, MLP 1-40-40-1, 10 support and 10 query points. Tiny: overhead decides."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import methods
from benchmarks.measure import Cell, Method, Size
from benchmarks.peers import jax_losses
from benchmarks.problem import Data, Params, Problem
from diffopt.tasks import Sinusoid

LAYERS = ((1, 40), (40, 40), (40, 1))


def network(params: Params, inputs: Tensor) -> Tensor:
    hidden = torch.relu(inputs @ params["w1"] + params["b1"])
    hidden = torch.relu(hidden @ params["w2"] + params["b2"])
    return hidden @ params["w3"] + params["b3"]


def inner(params: Params, hyper: Params, support: Data) -> Tensor:
    return outer(params, support)


def outer(params: Params, query: Data) -> Tensor:
    inputs, targets = query
    return (network(params, inputs) - targets).square().mean()


def problem(dtype: torch.dtype, device: torch.device, tasks: int, steps: int, lr: float = 0.01) -> Problem:
    """Sine waves and an untrained network."""
    generator = torch.Generator().manual_seed(0)
    initial = {}
    for i, (rows, columns) in enumerate(LAYERS, 1):
        initial[f"w{i}"] = torch.randn(rows, columns, generator=generator, dtype=dtype) / rows**0.5
        initial[f"b{i}"] = 0.1 * torch.randn(columns, generator=generator, dtype=dtype)
    initial = {name: x.to(device) for name, x in initial.items()}
    waves = [x.to(device) for x in Sinusoid().sample(tasks, generator, dtype)]
    return Problem(inner, outer, initial, {}, (waves[0], waves[1]), (waves[2], waves[3]), steps, lr)


JAX = methods.by_jax(jax_losses.Waves())
PROGRAMS = (methods.PROGRAM, methods.COMPILED)


def cell(steps: int, tasks: int, rivals: Sequence[Method], seconds: float, own: Sequence[Method] = ()) -> Cell:
    """One setting; the plain loop comes first, as the reference of every answer."""
    make = functools.partial(problem, steps=steps)
    everyone = (methods.PLAIN_LOOP, *(rival for rival in rivals if rival is not methods.PLAIN_LOOP))
    everything = (*everyone, methods.STACKED, methods.PRODUCTS, *methods.OURS_VMAPPED, *own)
    return Cell("W1", f"T={steps} B={tasks}", make, everything, tasks, seconds=seconds)


def cells(size: Size) -> list[Cell]:
    vectorised = (methods.FUNCTORCH, methods.FUNCTORCH_INSIDE, *JAX)
    everyone = (*methods.LOOP_PEERS, *vectorised)
    if size is Size.SMOKE:
        return [cell(3, 2, everyone, 0)]
    checkpoints = (*PROGRAMS, methods.COMPILED_SQRT)
    once = cell(1, 4, (*methods.LOOP_PEERS, *vectorised), 10)
    settings = [(steps, tasks) for steps in (5, 20) for tasks in (4, 25, 100)]
    if size is Size.QUICK:
        few = (methods.FUNCTORCH, *JAX)
        return [
            once,
            *(cell(steps, tasks, few, 15, PROGRAMS) for steps, tasks in settings),
            cell(100, 25, few, 15, checkpoints),
        ]
    many = [cell(steps, tasks, everyone, 15 + tasks / 4, PROGRAMS) for steps, tasks in settings]
    return [once, *many, cell(100, 25, vectorised, 20, checkpoints)]
