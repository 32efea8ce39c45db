"""What a call should give in its mode: plain loops, task by task and row by row."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
from fuzz.calls import TASK_MODES, Call
from fuzz.loop import expected, loop
from fuzz.modes import Found, Named, autocast, ready, second_of
from torch import Tensor


def oracle(call: Call) -> Found | None:
    """The same by plain loops; ``None`` where no identity of the estimator is known."""
    bases = {name: x.to(_wide(x)) for name, x in call.bases().items()} if call.mode != "autocast" else call.bases()
    with autocast() if call.mode == "autocast" else nullcontext():
        if call.mode in TASK_MODES:
            return _all_tasks(call, bases)
        if call.mode in ("jacrev", "batched_grads"):
            return _rows(call, bases)
        return _one(call, ready(call, bases))


def _wide(x: Tensor) -> torch.dtype:
    return torch.complex128 if x.is_complex() else torch.float64


def _one(call: Call, bases: Named) -> Found | None:
    torch.manual_seed(call.seed)
    window = call.estimator.get("window") if call.estimator.name == "MultiStep" else 1
    end = loop(call, bases, window=window)
    leaves = [x.detach() for x in end.leaves]
    if call.mode == "second":
        return Found(second_of(call, bases, call.outer(end.leaves, end.buffers if call.reads_buffers else ())))
    if call.mode in ("no_grad", "inference"):
        return Found([], leaves, end.losses)
    grads = _seeded(call, bases)
    return None if grads is None else Found(grads, leaves, end.losses)


def _seeded(call: Call, bases: Named) -> list[Tensor] | None:
    torch.manual_seed(call.seed)
    return expected(call, bases)


def _rows(call: Call, bases: Named) -> Found | None:
    if call.estimator.name == "Reptile" or call.estimator.get("adjoint") == "Reptile":
        return None  # not linear: every row is the way that the parameters went
    rows = [_seeded(replace(call, row=i, reads_buffers=False), ready(call, bases)) for i in range(call.width)]
    if any(row is None for row in rows):
        return None
    return Found([torch.stack(column) for column in zip(*rows, strict=True)])


def _all_tasks(call: Call, bases: Named) -> Found | None:
    names, each = call.wanted(bases), []
    for task in range(call.tasks):
        one = {name: x[task] if name in call.own else x for name, x in bases.items()}
        found = _seeded(call, ready(call, one))
        if found is None:
            return None
        each.append(found)
    if call.mode == "vmap_grad":
        return Found([torch.stack(column) for column in zip(*each, strict=True)])
    reptile = "Reptile" in (
        call.estimator.name,
        call.estimator.get("adjoint"),
    )  # the outer loss's factor is nothing to it
    scale = 1 / call.tasks if call.mode == "mean_over_tasks" and not reptile else 1.0
    stacked = [torch.stack(column) for column in zip(*each, strict=True)]
    return Found([scale * (x if name in call.own else x.sum(0)) for name, x in zip(names, stacked, strict=True)])
