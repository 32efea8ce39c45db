"""One bilevel problem as plain functions and tensors, so that every library is given exactly the same one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

Params: TypeAlias = dict[str, Tensor]
Data: TypeAlias = tuple[Tensor, ...]
Gradients: TypeAlias = tuple[Tensor, ...]


@final
@dataclass(frozen=True)
class Problem:
    """Tasks whose params take ``steps`` steps of SGD on ``inner``; wanted: the gradient of the mean ``outer`` loss.

    It is wanted for ``hyper``, or, where that is empty, for ``initial`` (few-shot learning).

    Attributes:
        inner: ``inner(params, hyper, support)``, the inner loss of one task.
        outer: ``outer(params, query)``, the outer loss of one task.
        initial: where the params start; the tasks share it.
        hyper: the hyperparameters, shared too.
        support: each tensor has a leading axis of tasks.
        query: likewise.
        steps: number of inner steps.
        lr: of SGD.
        momentum: of SGD.
    """

    inner: Callable[[Params, Params, Data], Tensor]
    outer: Callable[[Params, Data], Tensor]
    initial: Params
    hyper: Params
    support: Data
    query: Data
    steps: int
    lr: float
    momentum: float = 0.0

    @property
    def count(self) -> int:
        """The number of tasks."""
        return len(self.query[0])

    def fresh(self) -> tuple[Params, Params, list[Tensor]]:
        """``initial`` and ``hyper`` as new leaves, and those of them whose gradient is wanted."""
        initial, hyper = (
            {name: x.detach().requires_grad_() for name, x in params.items()} for params in (self.initial, self.hyper)
        )
        return initial, hyper, list((hyper or initial).values())

    def tasks(self) -> Iterator[tuple[Data, Data]]:
        """The support and query of one task after the other."""
        for i in range(self.count):
            yield tuple(x[i] for x in self.support), tuple(x[i] for x in self.query)


class MeanGradient:
    """The mean over ``count`` losses of their gradients, each loss's graph freed before the next."""

    def __init__(self, leaves: Sequence[Tensor], count: int) -> None:
        self._leaves, self._count, self._total = list(leaves), count, [torch.zeros_like(x) for x in leaves]

    def add(self, loss: Tensor) -> None:
        """Count one loss in."""
        torch._foreach_add_(self._total, torch.autograd.grad(loss, self._leaves), alpha=1 / self._count)

    def result(self) -> Gradients:
        """The mean of what was added."""
        return tuple(self._total)
