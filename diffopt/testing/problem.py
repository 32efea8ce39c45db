"""The inner problem that estimators are checked on, and its answer by hand: a plain loop under plain autograd.

The loop shares no code with the library: no :class:`~diffopt.Optimizer`, no ``Leaves``, no ``torch.func``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor

from diffopt.adjoint.claims import ALL_INPUTS, KINDS, Kind
from diffopt.adjoint.estimator import Estimator
from diffopt.optimizers import SGD, Adam
from diffopt.optimizers.base import Optimizer, Schedule
from diffopt.rollout.field import VectorField
from diffopt.solve import Solution, solve

Point: TypeAlias = Mapping[Kind, tuple[Tensor, ...]]
"""Every input of the problem that can have a hypergradient; or such a hypergradient."""

FIXED = {"order": torch.tensor([2, 0, 1]), "targets": torch.tensor([[0.5, -1.0], [1.5, 0.2], [-0.7, 0.9]])}
"""An argument of the loss whose derivative nobody asks for: the example that each weight belongs to; the targets."""

_HYPERPARAMETERS = {
    "momentum": {"lr": 0.3, "momentum": 0.5, "weight_decay": 0.05},
    "adam": {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "eps": 0.1},
}


def regression(params: Sequence[Tensor], weights: Tensor, idle: Tensor, fixed: Any, inputs: Tensor) -> Tensor:
    """Weighted log-cosh errors of a linear model, and a penalty: strongly convex, its curvature changes with the step.

    ``params`` are a bias, a shift of all outputs and a matrix; ``idle`` is not read.
    """
    return weighted(params, weights, fixed, errors(params, fixed, inputs))


def errors(params: Sequence[Tensor], fixed: Any, inputs: Tensor) -> Tensor:
    """The model's errors on three examples."""
    bias, shift, matrix = params
    found: Tensor = inputs @ matrix + bias + shift - fixed["targets"].to(inputs.dtype)
    return found


def weighted(params: Sequence[Tensor], weights: Tensor, fixed: Any, z: Tensor) -> Tensor:
    """The loss, given the errors."""
    log_cosh = (z + torch.nn.functional.softplus(-2 * z)).sum(-1)
    penalty = torch.stack([p.square().sum() for p in params]).sum()
    return (torch.sigmoid(weights)[fixed["order"]] * log_cosh).mean() + 0.15 * penalty


@final
@dataclass(frozen=True)
class Setting:
    """The problem, and the choices in which a check varies it.

    Attributes:
        steps: inner steps.
        optimizer: the inner optimizer.
        stepped: one batch per step; else ``batches`` are one batch, passed as an argument of the loss.
        loss: the inner loss; with ``field`` a vector field in its place, whose value is like the params.
        names: of the three params, whose alphabetical order decides the order of the leaves.
    """

    steps: int
    optimizer: Literal["momentum", "adam"] = "momentum"
    stepped: bool = True
    loss: Callable[..., Any] = regression
    names: tuple[str, str, str] = ("bias", "shift", "weight")
    field: bool = False

    def point(self, seed: int) -> Point:
        """Random inputs, in double precision."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        lead = (self.steps,) if self.stepped else ()
        values = _HYPERPARAMETERS[self.optimizer].values()
        return {
            "init": (normal(2), normal(), normal(2, 2)),
            "args": (normal(3), normal()),
            "batches": (normal(*lead, 3, 2),),
            "hyperparameters": tuple(torch.tensor(value, dtype=torch.float64) for value in values),
        }

    def solve(self, estimator: Estimator, point: Point) -> Solution[Any]:
        """The problem, run by the library. A hyperparameter with an axis is a schedule."""
        (weights, idle), (inputs,) = point["args"], point["batches"]
        return solve(
            VectorField(self._field) if self.field else self._loss,
            dict(zip(self.names, point["init"], strict=True)),
            weights,
            idle,
            FIXED,
            *([] if self.stepped else [inputs]),
            optimizer=self._optimizer(point),
            steps=self.steps,
            batches=inputs if self.stepped else None,
            estimator=estimator,
        )

    def _loss(self, params: Any, *args: Any) -> Any:
        return self.loss([params[name] for name in self.names], *args)

    def _field(self, params: Any, *args: Any) -> Any:
        return dict(zip(self.names, self._loss(params, *args), strict=True))

    def _optimizer(self, point: Point) -> Optimizer:
        values = [Schedule(x) if x.ndim else x for x in point["hyperparameters"]]
        if self.optimizer == "momentum":
            lr, momentum, decay = values
            return SGD(lr, momentum, weight_decay=decay)
        lr, beta1, beta2, eps = values
        return Adam(lr, betas=(beta1, beta2), eps=eps)

    def value(self, estimator: Estimator, point: Point) -> Tensor:
        """The outer loss, by the library."""
        params = self.solve(estimator, point).params
        return outer_loss([params[name] for name in self.names])

    def by_hand(self, point: Point) -> list[Tensor]:
        """The final params, by a plain loop that autograd records."""
        return self.state_by_hand(point)[0]

    def state_by_hand(self, point: Point) -> tuple[list[Tensor], list[Tensor]]:
        """The same and the final buffers, the first of every param before the second."""
        step = _momentum_step if self.optimizer == "momentum" else _adam_step
        (weights, idle), (inputs,) = point["args"], point["batches"]
        now = [p if p.requires_grad else p.detach().requires_grad_() for p in point["init"]]
        buffers: list[tuple[Tensor, ...]] = [(torch.zeros_like(p), torch.zeros_like(p)) for p in now]
        for t in range(1, self.steps + 1):
            loss = self.loss(now, weights, idle, FIXED, inputs[t - 1] if self.stepped else inputs)
            moves = loss if self.field else torch.autograd.grad(loss, now, create_graph=True)
            found = zip(now, moves, buffers, strict=True)
            numbers = [x[t - 1] if x.ndim else x for x in point["hyperparameters"]]
            rows = [step(p, g, b, t, *numbers) for p, g, b in found]
            now, buffers = [row[0] for row in rows], [row[1:] for row in rows]
        return now, [x for kind in zip(*buffers, strict=True) for x in kind]

    def state_value(self, estimator: Estimator, point: Point) -> Tensor:
        """An outer loss of the whole final state, by the library."""
        state = self.solve(estimator, point).state
        params, *buffers = ([kind[name] for name in self.names] for kind in (state.params, *state.buffers.values()))
        return state_loss(params, [x for kind in buffers for x in kind])


def outer_loss(params: Sequence[Tensor]) -> Tensor:
    """A function of the final params that is nonlinear in each of them."""
    bias, shift, matrix = params
    query = torch.linspace(-1, 1, 8, dtype=matrix.dtype).reshape(4, 2)
    return (query @ matrix + bias + shift).square().mean() + matrix.sum().sin() + bias.sum().cos()


def state_loss(params: Sequence[Tensor], buffers: Sequence[Tensor]) -> Tensor:
    """The same of the final params and buffers."""
    parts = [(1 + i) * x.sin().sum() for i, x in enumerate(buffers)]
    return outer_loss(params) + torch.stack(parts).sum()


def _momentum_step(
    p: Tensor, g: Tensor, b: tuple[Tensor, ...], t: int, lr: Tensor, momentum: Tensor, decay: Tensor
) -> tuple[Tensor, ...]:
    velocity = momentum * b[0] + g + decay * p
    return p - lr * velocity, velocity


def _adam_step(
    p: Tensor, g: Tensor, b: tuple[Tensor, ...], t: int, lr: Tensor, beta1: Tensor, beta2: Tensor, eps: Tensor
) -> tuple[Tensor, ...]:
    mean, square = beta1 * b[0] + (1 - beta1) * g, beta2 * b[1] + (1 - beta2) * g * g
    return p - lr / (1 - beta1**t) * mean / ((square / (1 - beta2**t)).sqrt() + eps), mean, square


def flat(point: Point) -> list[Tensor]:
    """All tensors of a point, in order."""
    return [x for kind in KINDS for x in point[kind]]


def like(point: Point, tensors: Sequence[Tensor]) -> Point:
    """The inverse of :func:`flat`."""
    rest = list(tensors)
    return {kind: tuple(rest.pop(0) for _ in point[kind]) for kind in KINDS}


def leaves(point: Point, kinds: frozenset[Kind]) -> Point:
    """Copies, of which those of some kinds require grad."""
    return {kind: tuple(x.detach().clone().requires_grad_(kind in kinds) for x in point[kind]) for kind in KINDS}


def gradient(value: Callable[[Point], Tensor], point: Point, kinds: frozenset[Kind] = ALL_INPUTS) -> Point:
    """The derivative of ``value`` for inputs of some kinds, by a plain backward pass; zeros for the others."""
    made = leaves(point, kinds)
    wanted = [x for x in flat(made) if x.requires_grad]
    found = iter(torch.autograd.grad(value(made), wanted, materialize_grads=True))
    return like(point, [next(found) if x.requires_grad else torch.zeros_like(x) for x in flat(made)])


def differences(value: Callable[[Point], Tensor], point: Point) -> Point:
    """The same by central differences: accurate to some 1e-9."""
    tensors = flat(point)
    vector = torch.cat([x.flatten() for x in tensors])

    def shaped(x: Tensor) -> Point:
        parts = torch.split(x, [tensor.numel() for tensor in tensors])
        return like(point, [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)])

    with torch.no_grad():
        moves = 1e-5 * torch.eye(len(vector), dtype=vector.dtype)
        slopes = [value(shaped(vector + move)) - value(shaped(vector - move)) for move in moves]
    return shaped(torch.stack(slopes) / 2e-5)


def distance(got: Point, expected: Point, kinds: frozenset[Kind] = ALL_INPUTS) -> float:
    """The largest relative error over the kinds, each in its Euclidean norm (at least 1e-4 of the largest one's)."""
    sizes = {kind: _norm(expected[kind]) for kind in kinds}
    floor = 1e-4 * max(sizes.values(), default=0.0)
    ratios = [
        _norm([g.double() - e.double() for g, e in zip(got[kind], expected[kind], strict=True)])
        / max(sizes[kind], floor, 1e-300)
        for kind in kinds
    ]
    return max((math.inf if math.isnan(r) else r for r in ratios), default=0.0)


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.cat([x.detach().double().flatten() for x in tensors]).norm())
