r"""Errors of meta-gradients on sine-wave regression, without meta-training: the binomial paper's Fig. 3.

The network and the inner problem are MAML's: an MLP 1-40-40-1 with ReLU, ten points, ``K`` steps of gradient descent.
An estimator's error on a task is the norm of its meta-gradient minus the exact one; it is averaged over the tasks of a
batch. Every estimator sees the same tasks from the same start.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, final

import torch
from torch import Tensor

import diffopt
from diffopt.estimators import Binomial, Estimator, FirstOrder, Krylov, Reverse, Truncated
from diffopt.experiments.framework.experiment import Row, Unit, starts
from diffopt.experiments.framework.options import listed, option, real, whole
from diffopt.experiments.framework.texts import described
from diffopt.experiments.framework.unit_context import Work
from diffopt.experiments.sinusoid_report import pictures, summary
from diffopt.tasks import MLP, Episodes, Sinusoid, functional

Problem: TypeAlias = Callable[[Estimator], Tensor]


@final
@dataclass(frozen=True)
class Settings:
    """What is measured."""

    steps: tuple[int, ...] = option((5, 10, 20), "numbers of inner steps K", listed(whole(2)))
    rates: tuple[float, ...] = option((0.001, 0.002, 0.005, 0.01, 0.02), "inner step sizes", listed(real(0)))
    batches: int = option(10, "batches of tasks", whole(1))
    tasks: int = option(5, "tasks per batch", whole(1))
    hidden: int = option(40, "width of the two hidden layers", whole(1))
    seeds: int = option(3, "starts: other weights and other tasks", whole(1))


def units(settings: Settings) -> list[Unit]:
    """One per start, number of steps and step size."""

    def of_one_start() -> list[Unit]:
        return [
            Unit(f"K={k} lr={rate:g}", partial(measure, settings, k, rate), k**2, keys={"K": k, "lr": rate})
            for k in settings.steps
            for rate in settings.rates
        ]

    return starts(settings.seeds, of_one_start)


def levels(steps: int) -> list[int]:
    """The levels that are measured: all up to 4, then fewer and fewer, up to ``K - 1``."""
    chosen = [*range(5), 6, 8, 10, 12, 16, steps - 1]
    return sorted({level for level in chosen if level < steps})


def estimators(steps: int, level: int) -> dict[str, Estimator]:
    """What is compared at one level."""
    window = hybrid_window(steps)
    found: dict[str, Estimator] = {
        "truncated": Truncated(level),
        "binomial": Binomial(level),
        "binomial, scale L/K": Binomial(level, scale=level / steps),
        "krylov": Krylov(level),
    }
    if level <= window:
        found["hybrid"] = Binomial(level, window=window)
    return found


def hybrid_window(steps: int) -> int:
    """The window of the hybrid estimator, ``C``: four fifths of the steps, 4 of 5 as in the paper's Table 2."""
    return math.ceil(0.8 * steps)


def measure(settings: Settings, steps: int, rate: float, work: Work) -> Row:
    """Mean errors per batch of every estimator at every level, and the curvature number of every batch."""
    generator = work.generator("start")
    apply, params = functional(MLP((1, settings.hidden, settings.hidden, 1), generator=generator).double())
    start = {name: value.detach() for name, value in params.items()}
    generator = work.generator("tasks")
    waves = [Sinusoid().sample(settings.tasks, generator, dtype=torch.float64) for _ in range(settings.batches)]

    def loss(params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        errors: Tensor = apply(params, inputs) - targets
        return errors.square().mean()

    def outer_loss(estimator: Estimator, params: dict[str, Tensor], *wave: Tensor) -> Tensor:
        inputs, targets, query_inputs, query_targets = wave
        optimizer = diffopt.SGD(rate)
        adapted = diffopt.solve(loss, params, inputs, targets, optimizer=optimizer, steps=steps, estimator=estimator)
        return loss(adapted.params, query_inputs, query_targets)

    def gradients(estimator: Estimator, batch: Episodes) -> Tensor:
        of_each = torch.func.vmap(torch.func.grad(partial(outer_loss, estimator)), in_dims=(None, 0, 0, 0, 0))
        return torch.cat([leaf.flatten(1) for leaf in of_each(start, *batch).values()], dim=1)

    exact = [gradients(Reverse(), batch) for batch in waves]  # [tasks, parameters] each

    def errors(estimator: Estimator) -> list[float]:
        pairs = zip(waves, exact, strict=True)
        return [float((gradients(estimator, batch) - right).norm(dim=1).mean()) for batch, right in pairs]

    found: dict[str, dict[str, list[float]]] = {"first-order": {"0": errors(FirstOrder())}}
    for level in levels(steps)[1:]:
        for name, estimator in estimators(steps, level).items():
            found.setdefault(name, {})[str(level)] = errors(estimator)
    return {
        "curvature": [curvature(partial(_mean, outer_loss, params, batch)) for batch in waves],
        "norm": [float(right.norm(dim=1).mean()) for right in exact],
        "errors": found,
    }


def _mean(
    outer_loss: Callable[..., Tensor], params: dict[str, Tensor], batch: Episodes, estimator: Estimator
) -> Tensor:
    losses: Tensor = torch.func.vmap(partial(outer_loss, estimator), in_dims=(None, 0, 0, 0, 0))(params, *batch)
    return losses.mean()


def curvature(problem: Problem) -> float:
    """``K * lr * lambda_max`` of a problem, the worst task's, as :func:`diffopt.compare` finds it."""
    found = diffopt.compare(problem, []).curvature
    assert found is not None  # the loss draws no random numbers
    return found


EXPERIMENT = described(
    "sinusoid",
    quick=Settings((5,), (0.002, 0.02), batches=2, tasks=2, hidden=10, seeds=2),
    standard=Settings(),
    full=Settings((5, 10, 20, 50), (0.001, 0.002, 0.005, 0.01, 0.02), batches=50, tasks=25, seeds=5),
    units=units,
    summary=summary,
    pictures=pictures,
)
