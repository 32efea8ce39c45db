"""What the tests of lifted optimizers share: the classes with their options, a loss, and the usual loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import diffopt

# Adam-like rules get a large eps: with the usual 1e-8 their first step is a sign step, whose derivative is round-off.
ADAM = {"lr": 0.05, "betas": (0.8, 0.9), "eps": 0.05, "weight_decay": 0.03}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.02, "momentum": 0.7, "nesterov": True, "maximize": True}),
    ("Adam", ADAM),
    ("Adam", {**ADAM, "amsgrad": True, "maximize": True}),
    ("AdamW", ADAM),
    ("NAdam", {**ADAM, "momentum_decay": 0.02}),
    ("NAdam", {**ADAM, "decoupled_weight_decay": True, "maximize": True}),
    ("RAdam", ADAM),
    ("Adamax", ADAM),
    ("Adadelta", {"lr": 0.7, "rho": 0.8, "eps": 0.05, "weight_decay": 0.03}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.3, "weight_decay": 0.1, "initial_accumulator_value": 0.2, "eps": 0.05}),
    ("RMSprop", {"lr": 0.02, "alpha": 0.7, "eps": 0.05, "weight_decay": 0.1}),
    ("RMSprop", {"lr": 0.02, "alpha": 0.7, "eps": 0.1, "centered": True, "momentum": 0.6, "maximize": True}),
    ("ASGD", {"lr": 0.05, "lambd": 0.02, "alpha": 0.6, "weight_decay": 0.03}),
    ("ASGD", {"lr": 0.05, "t0": 2.0}),
    ("Rprop", {"lr": 0.02, "etas": (0.4, 1.3), "step_sizes": (1e-3, 0.3)}),
    ("Adafactor", {"lr": 0.05, "beta2_decay": -0.7, "eps": (None, 0.02), "d": 1.2, "weight_decay": 0.03}),
]
NATIVE = ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"]
REFUSED = ["LBFGS", "SparseAdam", "Muon"]
SHAPES = [(3, 2), (4,), ()]


def by_case(value: Any) -> str:
    return value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items() if k != "betas")


every_case = pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (i % 2)) for i, case in enumerate(CASES)],
    ids=by_case,
)


def classes() -> list[str]:
    """Every optimizer class that this torch has."""
    found = [k for k, v in vars(torch.optim).items() if inspect.isclass(v) and issubclass(v, torch.optim.Optimizer)]
    return sorted(set(found) - {"Optimizer"})


def tensors(shapes: Sequence[tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def wavy(params: Sequence[Tensor], target: Tensor) -> Tensor:
    """A loss whose gradient changes sign on the way."""
    return sum(((p - target).square().mul(0.5).add((3 * p).cos()).sum() for p in params), target.new_zeros(()))


def trained(
    kind: Any, options: dict[str, Any], start: list[Tensor], target: Tensor, steps: int, losses: Any = None
) -> list[Tensor]:
    """The class itself, in the usual loop, which adds the losses to a list."""
    params = [torch.nn.Parameter(p.detach().clone()) for p in start]
    optimizer = kind(params, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = wavy(params, target)
        loss.backward()
        optimizer.step()
        if losses is not None:
            losses.append(loss.detach())
    return [p.detach() for p in params]


def off_by(function: Callable[[float], float], derivative: float) -> float:
    """How far a derivative at zero is off differences of five points, relative to one plus its size.

    Truncation is ``h**4 = 2e-15`` and cancellation ``1e-16 / h = 1e-12``, times higher derivatives. The smaller step is
    for Adamax, where a maximum has its kink within the larger one.
    """
    errors = []
    for h in (2e-4, 1e-5):
        near, far = (function(x) - function(-x) for x in (h, 2 * h))
        difference = (8 * near - far) / (12 * h)
        errors.append(abs(derivative - difference) / (1 + abs(difference)))
    return min(errors)


def numbers(options: dict[str, Any]) -> list[Tensor]:
    """The tensors among the options."""
    return [x for v in options.values() for x in (v if isinstance(v, tuple) else (v,)) if isinstance(x, Tensor)]


def assert_as_by_differences(lift: Any, train: Any, options: dict[str, Any], learned: Any, steps: int) -> None:
    """A lift's derivatives by the start, the target and every number of the learned options, against differences.

    ``lift(options)`` is the lifted optimizer, ``train(options, start, target, steps)`` what was lifted in its own loop.
    """
    start, direction, weights = (tensors(SHAPES, seed) for seed in (0, 1, 2))
    every = [((k, i), x) for k, v in options.items() for i, x in enumerate(v if isinstance(v, tuple) else (v,))]
    point = {"start": 0.0, "target": 0.7, **{key: x for key, x in every if key[0] in learned and isinstance(x, float)}}

    def outer(final: Sequence[Tensor]) -> Tensor:
        return torch.stack([(w * p).sum() + p.square().sum() for w, p in zip(weights, final, strict=True)]).sum()

    def made(values: dict[Any, Any]) -> tuple[dict[str, Any], list[Tensor], Any]:
        now = {
            k: tuple(values.get((k, i), x) for i, x in enumerate(v)) if isinstance(v, tuple) else values.get((k, 0), v)
            for k, v in options.items()
        }
        return now, [p + values["start"] * d for p, d in zip(start, direction, strict=True)], values["target"]

    def value(key: Any, x: float) -> float:
        now, moved, target = made({**point, key: point[key] + x})
        return float(outer(train(now, moved, torch.tensor(target), steps)))

    leaves = {key: torch.tensor(x, requires_grad=True) for key, x in point.items()}
    now, moved, target = made(leaves)
    end = outer(diffopt.solve(wavy, moved, target, optimizer=lift(now), steps=steps).params)
    found = torch.autograd.grad(end, list(leaves.values()), allow_unused=True, materialize_grads=True)
    for key, derivative in zip(point, found, strict=True):
        assert off_by(partial(value, key), float(derivative)) < 1e-8, key


def with_a_dead_feature(optimizer: Any, estimator: Any, *learned: Tensor) -> tuple[Tensor, ...]:
    """Hypergradients of a start, and of more, where one coordinate's gradient is exactly zero at every step."""
    inputs = torch.tensor([[0.0, 1.0], [0.0, -2.0], [0.0, 0.5]], dtype=torch.float64)
    start = torch.tensor([0.0, 0.4], dtype=torch.float64, requires_grad=True)
    options = {"optimizer": optimizer, "steps": 4, "estimator": estimator}
    end = diffopt.solve(lambda w, x: (x @ w - 1).square().mean(), start, inputs, **options).params
    return torch.autograd.grad(end.sum(), [start, *learned])


def as_tensor(value: Any) -> Any:
    """Every float in it as a tensor that is learned."""
    if isinstance(value, tuple):
        return tuple(map(as_tensor, value))
    return torch.tensor(value, dtype=torch.float64, requires_grad=True) if isinstance(value, float) else value


class Doing(torch.optim.Optimizer):
    """An optimizer that does something unusual in its step; subclasses say what."""

    def __init__(self, params, lr=0.1, factor=0.9):
        super().__init__(params, {"lr": lr, "factor": factor})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.one(p, p.grad, self.state[p], group)
