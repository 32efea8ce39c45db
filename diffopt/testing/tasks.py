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
from diffopt.testing.estimator_case import DRAWS, EstimatorCase, Sample, mean
from diffopt.testing.findings import above, at_most, raises
from diffopt.testing.problem import Point, distance, flat, gradient, like

TASKS = 3
COPIES = 400
"""Tasks that are all the same, by which a random estimator is judged."""

Dims: TypeAlias = dict[Kind, tuple[int | None, ...]]
_SHARED: Dims = {"init": (None,) * 3, "args": (None,) * 2, "batches": (None,), "hyperparameters": (None,) * 3}
_FIX = "check which axes belong to tasks (layout.levels); sums and norms over all of a stacked tensor mix tasks"


def tasks(case: EstimatorCase) -> Iterator[Finding]:
    """Partly batched inputs, on any axis, vmapped once and twice, differentiated inside and outside."""
    if not case.claims.vmap:
        fix = "raise a DiffoptError where trajectory.tasks_shape is not empty, or declare vmap=True"
        point, dims = _batches_of_tasks(case)
        yield raises("refuses vmap, then backward", DiffoptError, lambda: _backward(case, point, dims), fix)
        yield raises("refuses vmap of grad", DiffoptError, lambda: _inside(case, point, [dims]), fix)
    elif case.claims.random:
        yield from _in_the_mean(case)
    else:
        yield from _as_in_a_loop(case)


def _batches_of_tasks(case: EstimatorCase) -> tuple[Point, Dims]:
    data = torch.stack([case.setting.point(seed)["batches"][0] for seed in range(TASKS)])
    return {**case.point, "batches": (data,)}, {**_SHARED, "batches": (0,)}


def _backward(case: EstimatorCase, point: Point, dims: Dims) -> Point:
    """The derivative of the sum of the tasks' outer losses."""
    estimator = case.seeded()

    def of_one_task(*x: Tensor) -> Tensor:
        return case.setting.value(estimator, like(point, x))

    def total(point: Point) -> Tensor:
        values: Tensor = torch.func.vmap(of_one_task, in_dims=_flat_dims(dims))(*flat(point))
        return values.sum()

    return gradient(total, point, case.claims.inputs)


def _inside(case: EstimatorCase, point: Point, levels: Sequence[Dims]) -> Point:
    """The derivative of each task's outer loss under a vmap for each level, the last outermost."""
    estimator = case.seeded()

    def of_one_task(*x: Tensor) -> tuple[Tensor, ...]:
        def value(*y: Tensor) -> Tensor:
            return case.setting.value(estimator, like(point, y))

        wanted = [i for i, kind in enumerate(k for k in KINDS for _ in point[k]) if kind in case.claims.inputs]
        found = dict(zip(wanted, torch.func.grad(value, argnums=tuple(wanted))(*x), strict=True))
        return tuple(found.get(i, torch.zeros_like(y)) for i, y in enumerate(x))

    batched: Callable[..., Any] = of_one_task
    for dims in levels:
        batched = torch.func.vmap(batched, in_dims=_flat_dims(dims))
    return like(point, batched(*flat(point)))


def _flat_dims(dims: Dims) -> tuple[int | None, ...]:
    return tuple(dim for kind in KINDS for dim in dims[kind])


def _as_in_a_loop(case: EstimatorCase) -> Iterator[Finding]:
    limit = case.claims.tolerance
    point, dims = _batches_of_tasks(case)
    alone = [case.gradient(point={**point, "batches": (x,)}) for x in point["batches"][0]]
    rows: Point = {kind: _stack(alone, kind) for kind in KINDS}
    together: Point = {kind: x if kind == "batches" else tuple(y.sum(0) for y in x) for kind, x in rows.items()}
    error = distance(_backward(case, point, dims), together, case.claims.inputs)
    yield at_most("vmap, then backward: as in a loop", error, limit, _FIX)
    error = distance(_inside(case, point, [dims]), rows, case.claims.inputs)
    yield at_most("vmap of grad: as in a loop", error, limit, _FIX)
    error = _nested(case, point)
    yield at_most("vmap of vmap, on other axes: as in a loop", error, limit, _FIX)


def _nested(case: EstimatorCase, point: Point) -> float:
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
    got = _inside(case, stacked, [{**_SHARED, "batches": (1,)}, outside])
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
            errors.append(distance(row, case.gradient(point=alone), case.claims.inputs))
    return max(errors)


def _in_the_mean(case: EstimatorCase) -> Iterator[Finding]:
    """Copies of one task draw for themselves, and their mean is that of a loop's draws."""
    copies: Point = {kind: tuple(x.expand(COPIES, *x.shape) for x in case.point[kind]) for kind in KINDS}
    dims: Dims = {kind: (0,) * len(case.point[kind]) for kind in KINDS}
    found = _inside(case, copies, [dims])
    batch = mean(case.point, [[x[i] for x in flat(found)] for i in range(COPIES)])
    loop = case.sampled
    limit = case.limit(Sample(loop.mean, math.hypot(batch.noise, loop.noise)), loop.mean)
    yield at_most("vmap of grad: the mean of a loop", case.error(batch, loop.mean), limit, _FIX)
    spread = batch.noise * COPIES**0.5 / (loop.noise * DRAWS**0.5)
    fix = "draw for each task, not once for all: its spread, relative to that of a loop's draws"
    yield above("vmap: every task draws for itself", spread, 0.1, fix)


def _stack(rows: Sequence[Point], kind: Kind) -> tuple[Tensor, ...]:
    return tuple(torch.stack(column) for column in zip(*(row[kind] for row in rows), strict=True))
