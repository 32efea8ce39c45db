"""What each task has of its own and what tasks share, under vmap.

All sizes are the same (tasks, coordinates, steps), so that a tensor taken for another kind would broadcast without an
error. The oracle is a loop over the tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from stateless import Stateless
from torch import Tensor
from torch.func import vmap

import diffopt
from diffopt import Leaves, Schedule
from diffopt.estimators import Binomial, ForwardMode, MultiStep, Reverse, Unrolled

SIZE = 3
ESTIMATORS: dict[str, Any] = {
    "graph": Reverse("graph"),
    "states": Reverse(1),
    "forward": ForwardMode(),
    "unrolled": Unrolled(),
    "orders": Binomial(2),
    "windows": MultiStep(2),
}


@dataclass(frozen=True)
class Normalised(Stateless):
    """An update that mixes coordinates, and so runs under the vmaps itself."""

    lr: Any

    def update(self, params: Leaves, grads: Leaves, buffers: Any, step: int) -> Any:
        return params - self.lr * grads.map(lambda g: g / (1 + g.square().sum())), buffers


def numbers(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.1 + 0.2 * torch.rand(shape, generator=generator, dtype=torch.float64)


# a learning rate of one task: its shape, and what the optimizer is given
RATES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Any]]] = {
    "one_number": ((), lambda lr: lr),
    "one_per_coordinate": ((SIZE,), lambda lr: lr),
    "one_per_step": ((SIZE,), Schedule),
    "one_per_step_and_coordinate": ((SIZE, SIZE), Schedule),
}
UPDATES: dict[str, Callable[[Any], Any]] = {"elementwise": diffopt.SGD, "mixing": Normalised}


def distance(w: Tensor, scale: Tensor, target: Tensor) -> Tensor:
    return (scale * (w - target).pow(4)).sum() + w.prod()


def assert_like_a_loop(run: Callable[..., Tensor], inputs: list[Tensor], dims: list[int | None]) -> None:
    """Solutions and hypergradients of ``vmap(run)`` are those of its tasks one by one."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    ends = vmap(run, tuple(dims))(*leaves)
    rows = [[x if dim is None else x.select(dim, i) for x, dim in zip(leaves, dims, strict=True)] for i in range(SIZE)]
    expected = torch.stack([run(*row) for row in rows])
    torch.testing.assert_close(ends, expected, rtol=1e-12, atol=1e-14)  # rounding
    got, wanted = (torch.autograd.grad(x.pow(2).sum(), leaves) for x in (ends, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-13)  # rounding, over the sums of the tasks


@pytest.mark.parametrize("dim", [None, 0, -1], ids=["shared", "own", "own_along_the_last_axis"])
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_learning_rate_is_each_tasks_own_or_shared(estimator: str, update: str, rate: str, dim: int | None) -> None:
    shape, given = RATES[rate]

    def run(w: Tensor, lr: Tensor, scale: Tensor, target: Tensor) -> Tensor:
        optimizer = UPDATES[update](given(lr))
        return diffopt.solve(
            distance, w, scale, target, optimizer=optimizer, steps=SIZE, estimator=ESTIMATORS[estimator]
        ).params

    lr = numbers(1, *shape) if dim is None else numbers(1, SIZE, *shape)
    dims = [0, dim, None, 0]
    assert_like_a_loop(run, [numbers(2, SIZE, SIZE), lr, numbers(3, SIZE), numbers(4, SIZE, SIZE)], dims)


@pytest.mark.parametrize("dims", [(0, None), (None, 0), (0, 0), (1, 2), (-1, 1)], ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_arguments_and_batches_are_each_tasks_own_or_shared(
    estimator: str, dims: tuple[int | None, int | None]
) -> None:
    def run(w: Tensor, scale: Tensor, batches: Tensor) -> Tensor:
        options = {"batches": batches, "optimizer": diffopt.SGD(0.1), "steps": SIZE, "estimator": ESTIMATORS[estimator]}
        return diffopt.solve(distance, w, scale, **options).params

    scale = numbers(1, *[SIZE] * (1 + (dims[0] is not None)))
    batches = numbers(2, *[SIZE] * (2 + (dims[1] is not None)))
    assert_like_a_loop(run, [numbers(3, SIZE), scale, batches], [None, *dims])


@pytest.mark.parametrize("learned", ["inner", "outer"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_of_two_vmaps_either_may_have_the_learning_rate(estimator: str, learned: str) -> None:
    w, inner, outer = numbers(1, SIZE), numbers(2, SIZE, SIZE), numbers(3, SIZE, SIZE)

    def run(inner: Tensor, outer: Tensor) -> Tensor:
        lr, target = (inner, outer) if learned == "inner" else (outer, inner)
        options = {"optimizer": diffopt.SGD(lr), "steps": SIZE, "estimator": ESTIMATORS[estimator]}
        return diffopt.solve(distance, w, w, target, **options).params

    leaves = [inner.requires_grad_(), outer.requires_grad_()]
    ends = vmap(vmap(run, (0, None)), (None, 0))(*leaves)
    expected = torch.stack([torch.stack([run(x, y) for x in inner]) for y in outer])
    torch.testing.assert_close(ends, expected, rtol=1e-12, atol=1e-14)  # rounding
    got, wanted = (torch.autograd.grad(x.pow(2).sum(), leaves) for x in (ends, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-13)  # rounding, over the sums of the tasks


def test_what_no_task_has_of_its_own_comes_out_shared() -> None:
    w = numbers(1, SIZE)

    def run(index: Tensor) -> Tensor:
        end = diffopt.solve(lambda w: w.square().sum(), w, optimizer=diffopt.SGD(0.1), steps=2).params
        return index * end

    torch.testing.assert_close(vmap(run)(torch.arange(2.0, dtype=w.dtype)), torch.stack([0 * w, 0.64 * w]))


@pytest.mark.parametrize("estimator", [Reverse(), Unrolled()], ids=str)
def test_a_vmap_goes_on_after_an_error_in_one_of_its_solves(estimator: Any) -> None:
    w = numbers(1, SIZE, SIZE)

    def broken(w: Tensor) -> Tensor:
        raise ZeroDivisionError

    def run(w: Tensor) -> Tensor:
        def end(loss: Any) -> Tensor:
            return diffopt.solve(loss, w, optimizer=diffopt.SGD(0.1), steps=2, estimator=estimator).params

        with pytest.raises(ZeroDivisionError):
            end(broken)
        return end(lambda w: w.square().sum()) + w

    torch.testing.assert_close(vmap(run)(w), 1.64 * w)
