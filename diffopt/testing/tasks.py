"""What an estimator claims of batches of tasks: under vmap it gives the numbers of a loop, or refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from diffopt.adjoint.claims import KINDS, Kind
from diffopt.errors import DiffoptError
from diffopt.reports import Finding
from diffopt.testing.estimator_case import DRAWS, Rule, Sample, mean
from diffopt.testing.findings import above, at_most, raises
from diffopt.testing.problem import Point, distance, flat, gradient, like

TASKS = 3
COPIES = 400
"""Tasks that are all the same, by which a random rule is judged."""

Dims: TypeAlias = dict[Kind, tuple[int | None, ...]]
_SHARED: Dims = {"init": (None,) * 3, "args": (None,) * 2, "batches": (None,), "hyperparameters": (None,) * 3}
_FIX = "check which axes belong to tasks (layout.levels); sums and norms over all of a stacked tensor mix tasks"


def tasks(rule: Rule) -> Iterator[Finding]:
    """Partly batched inputs, on any axis, vmapped once and twice, differentiated inside and outside."""
    if not rule.claims.vmap:
        fix = "raise a DiffoptError where trajectory.tasks_shape is not empty, or declare vmap=True"
        point, dims = _batches_of_tasks(rule)
        yield raises("refuses vmap, then backward", DiffoptError, lambda: _backward(rule, point, dims), fix)
        yield raises("refuses vmap of grad", DiffoptError, lambda: _inside(rule, point, [dims]), fix)
    elif rule.claims.random:
        yield from _in_the_mean(rule)
    else:
        yield from _as_in_a_loop(rule)


def _batches_of_tasks(rule: Rule) -> tuple[Point, Dims]:
    data = torch.stack([rule.setting.point(seed)["batches"][0] for seed in range(TASKS)])
    return {**rule.point, "batches": (data,)}, {**_SHARED, "batches": (0,)}


def _backward(rule: Rule, point: Point, dims: Dims) -> Point:
    """The derivative of the sum of the tasks' outer losses."""
    estimator = rule.seeded()

    def of_one_task(*x: Tensor) -> Tensor:
        return rule.setting.value(estimator, like(point, x))

    def total(point: Point) -> Tensor:
        values: Tensor = torch.func.vmap(of_one_task, in_dims=_flat_dims(dims))(*flat(point))
        return values.sum()

    return gradient(total, point, rule.claims.inputs)


def _inside(rule: Rule, point: Point, levels: Sequence[Dims]) -> Point:
    """The derivative of each task's outer loss under a vmap for each level, the last outermost."""
    estimator = rule.seeded()

    def of_one_task(*x: Tensor) -> tuple[Tensor, ...]:
        def value(*y: Tensor) -> Tensor:
            return rule.setting.value(estimator, like(point, y))

        wanted = [i for i, kind in enumerate(k for k in KINDS for _ in point[k]) if kind in rule.claims.inputs]
        found = dict(zip(wanted, torch.func.grad(value, argnums=tuple(wanted))(*x), strict=True))
        return tuple(found.get(i, torch.zeros_like(y)) for i, y in enumerate(x))

    batched: Callable[..., Any] = of_one_task
    for dims in levels:
        batched = torch.func.vmap(batched, in_dims=_flat_dims(dims))
    return like(point, batched(*flat(point)))


def _flat_dims(dims: Dims) -> tuple[int | None, ...]:
    return tuple(dim for kind in KINDS for dim in dims[kind])


def _as_in_a_loop(rule: Rule) -> Iterator[Finding]:
    limit = rule.claims.tolerance
    point, dims = _batches_of_tasks(rule)
    alone = [rule.gradient(point={**point, "batches": (x,)}) for x in point["batches"][0]]
    rows: Point = {kind: _stack(alone, kind) for kind in KINDS}
    together: Point = {kind: x if kind == "batches" else tuple(y.sum(0) for y in x) for kind, x in rows.items()}
    error = distance(_backward(rule, point, dims), together, rule.claims.inputs)
    yield at_most("vmap, then backward: as in a loop", error, limit, _FIX)
    error = distance(_inside(rule, point, [dims]), rows, rule.claims.inputs)
    yield at_most("vmap of grad: as in a loop", error, limit, _FIX)
    error = _nested(rule, point)
    yield at_most("vmap of vmap, on other axes: as in a loop", error, limit, _FIX)


def _nested(rule: Rule, point: Point) -> float:
    """Tasks inside, on the axis behind the steps; outside two step sizes and two values of one leaf, on its last."""
    bias, shift, matrix = point["init"]
    lr, *others = point["hyperparameters"]
    two = {"lr": torch.stack([lr, 0.5 * lr]), "matrix": torch.stack([matrix, -matrix], dim=-1)}
    stacked: Point = {
        **point,
        "init": (bias, shift, two["matrix"]),
        "hyperparameters": (two["lr"], *others),
        "batches": (point["batches"][0].movedim(0, 1),),
    }
    outside: Dims = {**_SHARED, "init": (None, None, -1), "hyperparameters": (0, *(None for _ in others))}
    got = _inside(rule, stacked, [{**_SHARED, "batches": (1,)}, outside])
    errors = []
    for i in range(2):
        for j, data in enumerate(point["batches"][0]):
            alone: Point = {
                **point,
                "init": (bias, shift, two["matrix"][..., i]),
                "hyperparameters": (two["lr"][i], *others),
                "batches": (data,),
            }
            row: Point = {kind: tuple(x[i, j] for x in got[kind]) for kind in KINDS}
            errors.append(distance(row, rule.gradient(point=alone), rule.claims.inputs))
    return max(errors)


def _in_the_mean(rule: Rule) -> Iterator[Finding]:
    """Copies of one task draw for themselves, and their mean is that of a loop's draws."""
    copies: Point = {kind: tuple(x.expand(COPIES, *x.shape) for x in rule.point[kind]) for kind in KINDS}
    dims: Dims = {kind: (0,) * len(rule.point[kind]) for kind in KINDS}
    found = _inside(rule, copies, [dims])
    batch = mean(rule.point, [[x[i] for x in flat(found)] for i in range(COPIES)])
    loop = rule.sampled
    limit = rule.limit(Sample(loop.mean, math.hypot(batch.noise, loop.noise)), loop.mean)
    yield at_most("vmap of grad: the mean of a loop", rule.error(batch, loop.mean), limit, _FIX)
    spread = batch.noise * COPIES**0.5 / (loop.noise * DRAWS**0.5)
    fix = "draw for each task, not once for all: its spread, relative to that of a loop's draws"
    yield above("vmap: every task draws for itself", spread, 0.1, fix)


def _stack(rows: Sequence[Point], kind: Kind) -> tuple[Tensor, ...]:
    return tuple(torch.stack(column) for column in zip(*(row[kind] for row in rows), strict=True))
