"""Losses that watch how they are differentiated or resist it, and an estimator that watches another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from diffopt.adjoint.estimator import Adjoint, Estimator
from diffopt.adjoint.trajectory import Cotangents, Trajectory
from diffopt.rollout.record import Keep
from diffopt.tensors import transforms
from diffopt.tensors.leaves import Leaves
from diffopt.testing.problem import errors, regression, weighted


@final
@dataclass
class Tally:
    """What a loss saw of the estimator that used it.

    Attributes:
        gradients: backward passes through the loss.
        products: double backward passes: curvature products.
        depth: how many batches the products came in.
        read: backward passes into what the loss reads besides its params.
        states: the storages of the params of every evaluation, and their bytes.
    """

    gradients: int = 0
    products: int = 0
    depth: int = 0
    read: int = 0
    states: dict[Any, int] = field(default_factory=dict)

    def loss(self, params: Sequence[Tensor], weights: Tensor, idle: Tensor, fixed: Any, inputs: Tensor) -> Tensor:
        """The problem's loss, watched."""
        if not transforms.transforms_active():
            self.remember(params)
        seen = _watch(params, twice=self._product)
        weights, inputs = _watch([weights, inputs], once=self._read)
        return _watch([regression(seen, weights, idle, fixed, inputs)], once=self._gradient)[0]

    def remember(self, tensors: Iterable[Tensor]) -> None:
        """Count these states from now on."""
        self.states |= {_reference(x): x.untyped_storage().nbytes() for x in tensors}

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Do not count the states that are these inputs."""
        for x in tensors:
            self.states.pop(_reference(x), None)

    def bytes_alive(self) -> int:
        """The bytes of all states that still exist."""
        return sum(size for storage, size in self.states.items() if not storage.expired())

    def _gradient(self, count: int) -> None:
        self.gradients += count

    def _product(self, count: int) -> None:
        self.products, self.depth = self.products + count, self.depth + 1

    def _read(self, count: int) -> None:
        self.read += count


def _reference(x: Tensor) -> Any:
    """What stands for a tensor's storage without keeping it alive."""
    return StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call]


def _ignore(count: int) -> None:
    pass


def _watch(
    tensors: Sequence[Tensor], once: Callable[[int], None] = _ignore, twice: Callable[[int], None] = _ignore
) -> tuple[Tensor, ...]:
    """The same tensors; ``once`` is told of every backward pass through them, ``twice`` of every double one."""
    seen: tuple[Tensor, ...] = transforms.apply(_Watch, (once, twice, 1), *tensors)
    return seen


@final
@dataclass(frozen=True)
class Spy(Adjoint):
    """Another estimator, whose results are looked at."""

    case: Adjoint
    seen: list[tuple[Trajectory, Cotangents]]

    def keep(self, steps: int) -> Keep:
        """What the estimator keeps."""
        return self.case.keep(steps)

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        """What the estimator returns."""
        result = self.case.pullback(trajectory, cotangent)
        self.seen.append((trajectory, result))
        return result


def spied(estimator: Estimator, seen: list[tuple[Trajectory, Cotangents]]) -> Estimator:
    """The estimator, if it is an adjoint one in a form that notes what it returns."""
    return Spy(estimator, seen) if isinstance(estimator, Adjoint) else estimator


class _Watch(torch.autograd.Function):
    """The identity; its first argument is whom to tell of once and of twice, and how many tensors it is at once."""

    @staticmethod
    def forward(listeners: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.listeners = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        now, later, count = ctx.listeners
        now(count)
        return (None, *transforms.apply(_Watch, (later, _ignore, count), *cotangents))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        (once, twice, count), *tensors = args
        return transforms.apply(_Watch, (once, twice, count * info.batch_size), *tensors), in_dims[1:]


class _Once(torch.autograd.Function):
    """The identity, which cannot be differentiated twice."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return cotangents[0].clone()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return transforms.apply(_Once, *args), in_dims[0]


def once_differentiable(params: Sequence[Tensor], weights: Tensor, idle: Tensor, fixed: Any, inputs: Tensor) -> Tensor:
    """The problem's loss, made so that it has no second derivative."""
    return weighted(params, weights, fixed, transforms.apply(_Once, errors(params, fixed, inputs)))


def noisy(params: Sequence[Tensor], weights: Tensor, idle: Tensor, fixed: Any, inputs: Tensor) -> Tensor:
    """The problem's loss, with random numbers of torch's global generator in it."""
    z = errors(params, fixed, inputs)
    return weighted(params, weights, fixed, z * torch.rand_like(z))
