"""The table that the property tests run over: optimizers beside their plain-loop oracles, and inner problems."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import oracles
import torch
from torch import Tensor

import diffopt
from diffopt.estimators import (
    Binomial,
    ESJacobian,
    Estimator,
    FirstOrder,
    ForwardMode,
    Implicit,
    Krylov,
    MultiStep,
    Reptile,
    Reverse,
    Truncated,
    Unrolled,
)
from diffopt.linear_solve import GMRES


@dataclass(frozen=True)
class OptimizerCase:
    """An optimizer and its oracle, as functions of the hyperparameters that are to be learned.

    ``learned`` are their values; every one of them is a meta-parameter in the tests. ``fixed`` go to both sides.
    """

    name: str
    make: Callable[..., diffopt.Optimizer]
    step: Callable[..., Tensor]
    learned: dict[str, float]
    fixed: dict[str, Any] = field(default_factory=dict)
    pair: bool = False
    """Whether ``beta1`` and ``beta2`` stand for ``betas``."""
    buffers: Callable[..., dict[str, Tensor]] = lambda p, **options: {}
    """The oracle's buffers at the start, where they depend on anything."""

    def optimizer(self, values: dict[str, Any]) -> diffopt.Optimizer:
        return self.make(**self.options(values))

    def options(self, values: dict[str, Any]) -> dict[str, Any]:
        values = dict(values)
        if self.pair:
            values["betas"] = (values.pop("beta1"), values.pop("beta2"))
        return {**values, **self.fixed}


# Adam-like rules get a large eps: with the usual 1e-8 their first step is a sign step, whose derivative is round-off.
_adam = {"lr": 0.05, "beta1": 0.8, "beta2": 0.9, "eps": 0.05, "weight_decay": 0.03}
_nesterov = {"lr": 0.06, "momentum": 0.7, "weight_decay": 0.02}
_rmsprop = {"lr": 0.02, "alpha": 0.8, "eps": 0.1, "weight_decay": 0.03, "momentum": 0.5}
_adagrad = {"lr": 0.1, "lr_decay": 0.2, "weight_decay": 0.03, "initial_accumulator_value": 0.3, "eps": 0.05}
_proximal = {"lr": 0.1, "strength": 0.4}


def _adamw_step(p, g, b, t, **options):
    return oracles.adam_step(p, g, b, t, decoupled=True, **options)


OPTIMIZERS = [
    OptimizerCase("gd", diffopt.SGD, oracles.sgd_step, {"lr": 0.11}),
    OptimizerCase("momentum", diffopt.SGD, oracles.sgd_step, {"lr": 0.07, "momentum": 0.8, "weight_decay": 0.04}),
    OptimizerCase("dampened", diffopt.SGD, oracles.sgd_step, {"lr": 0.07, "momentum": 0.8, "dampening": 0.3}),
    OptimizerCase("nesterov", diffopt.SGD, oracles.sgd_step, _nesterov, {"nesterov": True}),
    OptimizerCase("ascent", diffopt.SGD, oracles.sgd_step, {"lr": 0.05, "momentum": 0.5}, {"maximize": True}),
    OptimizerCase("adam", diffopt.Adam, oracles.adam_step, _adam, pair=True),
    OptimizerCase("amsgrad", diffopt.Adam, oracles.adam_step, _adam, {"amsgrad": True}, pair=True),
    OptimizerCase("adamw", diffopt.AdamW, _adamw_step, _adam, pair=True),
    OptimizerCase("rmsprop", diffopt.RMSprop, oracles.rmsprop_step, _rmsprop, {"centered": True}),
    OptimizerCase("adagrad", diffopt.Adagrad, oracles.adagrad_step, _adagrad, buffers=oracles.adagrad_buffers),
    OptimizerCase("proximal", diffopt.ProximalGD, oracles.proximal_step, _proximal, buffers=oracles.proximal_buffers),
    OptimizerCase("diagonal", diffopt.Preconditioned, oracles.preconditioned_step, {"lr": 0.1, "diagonal": 0.7}),
]

ESTIMATORS: list[Estimator] = [
    *map(Reverse, [None, "graph", 1, 3, "sqrt", "log"]),
    *(Unrolled(), ForwardMode(), FirstOrder(), Reptile()),
    *(*map(Truncated, [0, 2, 4]), Truncated(3, checkpoint=2)),
    *map(Binomial, [0, 1, 3, 4]),
    *(Binomial(2, window=3, chunk_size=2), Binomial(2, window=0), Binomial(4, scale=0.5), Binomial(2, scale=0.0)),
    *(*map(Krylov, [0, 1, 2, 4]), Krylov(3, chunk_size=2)),
    *(Implicit(), Implicit(GMRES(60, rtol=1e-10), whole_state=True)),
    *(MultiStep(1), MultiStep(2), MultiStep(3, Binomial(1)), MultiStep(2, Unrolled()), MultiStep(2, FirstOrder())),
    *(ESJacobian(8, 1e-3), ESJacobian(48, 1e-2, generator=torch.Generator()), ESJacobian(16, 1e-3, "rademacher")),
    *(ESJacobian(16, 1e-4, "gaussian", antithetic=False), ESJacobian(16, 1e-3, "sphere")),
    MultiStep(2, ESJacobian(48, 1e-3)),
]
"""Every shipped estimator, with the options that change what it claims on four steps."""


@dataclass(frozen=True)
class InnerProblem:
    """A small inner problem with a meta-parameter in the loss, one batch per step, and an outer loss."""

    params: list[Tensor]
    weights: Tensor
    batches: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]

    @staticmethod
    def predict(params: list[Tensor], inputs: Tensor) -> Tensor:
        return torch.tanh(inputs @ params[0] + params[1]) @ params[2]

    @classmethod
    def loss(cls, params: list[Tensor], weights: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Squared error with learned example weights; its curvature changes with the step and its batch."""
        errors = (cls.predict(params, batch[0]) - batch[1]).square().sum(-1)
        return (torch.sigmoid(weights) * errors).mean() + 0.05 * sum(p.square().sum() for p in params)

    def outer_loss(self, params: list[Tensor]) -> Tensor:
        return (self.predict(params, self.query[0]) - self.query[1]).square().mean()

    def double(self) -> InnerProblem:
        """The same numbers in float64."""

        def wide(tensors: Any) -> Any:
            return type(tensors)(x.double() for x in tensors)

        return InnerProblem(wide(self.params), self.weights.double(), wide(self.batches), wide(self.query))


def small_network(seed: int, steps: int, dtype: torch.dtype = torch.float64) -> InnerProblem:
    """A 13-parameter network with per-step batches of data."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    params, weights = [normal(2, 3), normal(3), normal(3, 1)], normal(4)
    return InnerProblem(params, weights, (normal(steps, 4, 2), normal(steps, 4, 1)), (normal(5, 2), normal(5, 1)))


@dataclass(frozen=True)
class MetaParameters:
    """Everything a hypergradient is taken of, as leaves: initial params, a loss argument, data, hyperparameters."""

    params: list[Tensor]
    weights: Tensor
    inputs: Tensor
    targets: Tensor
    hyperparameters: dict[str, Tensor]

    @classmethod
    def of(cls, problem: InnerProblem, case: OptimizerCase) -> MetaParameters:
        def leaf(x: Tensor) -> Tensor:
            return x.detach().clone().requires_grad_()

        values = {k: leaf(torch.tensor(x, dtype=problem.weights.dtype)) for k, x in case.learned.items()}
        return cls([*map(leaf, problem.params)], leaf(problem.weights), *map(leaf, problem.batches), values)

    def leaves(self) -> list[Tensor]:
        return [*self.params, self.weights, self.inputs, self.targets, *self.hyperparameters.values()]

    def given(self) -> dict[str, Any]:
        """What :func:`solved` is given."""
        batches = (self.inputs, self.targets)
        return {"params": self.params, "weights": self.weights, "values": self.hyperparameters, "batches": batches}


def solved(problem: Any, case: OptimizerCase, steps: int, estimator: Any, **changed: Any) -> diffopt.Solution[Any]:
    """Solve it; the params, weights and batches that are not given are the problem's own, the values the case's."""
    own = {"params": problem.params, "weights": problem.weights, "batches": problem.batches, "values": case.learned}
    params, weights, batches, values = ({**own, **changed}[name] for name in own)
    options = {"optimizer": case.optimizer(values), "steps": steps, "batches": batches, "estimator": estimator}
    more = {name: value for name, value in changed.items() if name not in own}
    return diffopt.solve(problem.loss, params, weights, **options, **more)


def hypergradient(problem: InnerProblem, case: OptimizerCase, steps: int, estimator: Any) -> list[Tensor]:
    """The hypergradient by the library, for every meta-parameter; zeros where there is none."""
    meta = MetaParameters.of(problem, case)
    solution = solved(problem, case, steps, estimator, **meta.given())
    # Autograd through a loop does not reach what no step has used, such as the dampening of a single step.
    outer = problem.outer_loss(solution.params)
    return list(torch.autograd.grad(outer, meta.leaves(), allow_unused=True, materialize_grads=True))


def expected_hypergradient(
    problem: InnerProblem,
    case: OptimizerCase,
    steps: int,
    detach_until: int = 0,
    curvature: Callable[[int], float] = lambda t: 1.0,
    window: int = 1,
) -> list[Tensor]:
    """The same by plain autograd through the oracle's loop."""
    meta = MetaParameters.of(problem, case)

    def loss(p: list[Tensor], *batch: Tensor) -> Tensor:
        return problem.loss(p, meta.weights, batch)

    options = {"detach_until": detach_until, "curvature": curvature, "initial_buffers": case.buffers, "window": window}
    options["batch"] = lambda t: (meta.inputs[t - 1], meta.targets[t - 1])
    final = oracles.unrolled(case.step, loss, meta.params, steps, case.options(meta.hyperparameters), **options)
    outer = problem.outer_loss(final)
    return list(torch.autograd.grad(outer, meta.leaves(), allow_unused=True, materialize_grads=True))
