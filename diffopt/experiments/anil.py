r"""Convergence of ANIL against the number ``N`` of inner steps: one adapted layer beside several.

ANIL adapts the last layers of a network to a task and keeps the body; the outer loop trains both. With the last layer
alone and an L2 term the inner loss is strongly convex, with more layers it is not convex. For both, the outer training
loss is followed over iterations and over processor time, at several inner step sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import diffopt
from diffopt.estimators import Estimator, Reverse
from diffopt.experiments.anil_report import adapted, pictures, summary
from diffopt.experiments.framework import small_images
from diffopt.experiments.framework.experiment import Row, Unit
from diffopt.experiments.framework.options import listed, one_of, option, real, whole
from diffopt.experiments.framework.outer_loop import FAILED, train
from diffopt.experiments.framework.texts import described
from diffopt.experiments.framework.unit_context import Work
from diffopt.tasks import Episodes, sample_episodes


@final
@dataclass(frozen=True)
class Settings:
    """What is trained."""

    problem: str = option("omniglot", "omniglot, or clusters (no data)", one_of(*small_images.PROBLEMS))
    layers: tuple[int, ...] = option((1, 3), "how many of the three layers are adapted", listed(whole(1)))
    rates: tuple[float, ...] = option((0.1, 0.3, 1.0, 4.0), "inner step sizes", listed(real(0)))
    steps: tuple[int, ...] = option((1, 3, 5, 10), "numbers of inner steps N", listed(whole(1)))
    seeds: int = option(3, "runs of each, from different starts on different tasks", whole(1))
    iterations: int = option(200, "outer iterations", whole(2))
    meta_lr: float = option(0.002, "step size of the outer Adam", real(0))
    decay: float = option(0.01, "weight of the L2 term of the inner loss", real(0, above=False))
    tasks: int = option(8, "tasks per outer iteration", whole(1))
    way: int = option(5, "classes per task", whole(2))
    shot: int = option(5, "support images per class", whole(1))
    queries: int = option(5, "query images per class", whole(1))
    width: int = option(64, "width of the two hidden layers", whole(1))
    target: float = option(1.0, "outer loss to be reached", real(0))


def units(settings: Settings) -> list[Unit]:
    """One per run."""
    return [
        Unit(
            f"layers={layers} lr={rate:g} N={steps} seed={seed}",
            partial(run, settings, layers, rate, steps, seed),
            3 + steps,
            resumable=True,
            keys={"seed": seed, "layers": layers, "lr": rate, "N": steps, "adapted": adapted(layers)},
        )
        for seed in range(settings.seeds)
        for layers in settings.layers
        for rate in settings.rates
        for steps in settings.steps
    ]


def run(settings: Settings, layers: int, rate: float, steps: int, seed: int, work: Work) -> Row:
    """Meta-train by the exact hypergradient; every setting sees the same start and the same tasks.

    Returns:
        The outer losses and times, and ``lr`` times the inner loss's largest curvature at the end, the worst of eight
        tasks: above 2, gradient descent on a convex inner loss is unstable.
    """
    images = small_images.load(settings.problem, work).to(work.device)
    apply, params, moved = small_images.network(settings.width, settings.way, layers, f"start {seed}", work)
    tasks = work.generator(f"tasks {seed}")
    outer = torch.optim.Adam(params.values(), lr=settings.meta_lr)

    def loss(head: dict[str, Tensor], body: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        penalty = sum((value.square().sum() for value in head.values()), torch.zeros((), device=inputs.device))
        return cross_entropy(apply({**body, **head}, inputs.flatten(1)), labels) + settings.decay / 2 * penalty

    def outer_loss(estimator: Estimator, inputs: Tensor, labels: Tensor, queries: Tensor, wanted: Tensor) -> Tensor:
        head = {name: params[name] for name in moved}
        body = {name: value for name, value in params.items() if name not in head}
        optimizer = diffopt.SGD(rate)
        found = diffopt.solve(loss, head, body, inputs, labels, optimizer=optimizer, steps=steps, estimator=estimator)
        return cross_entropy(apply({**body, **found.params}, queries.flatten(1)), wanted)

    def mean_loss(estimator: Estimator, episodes: Episodes) -> Tensor:
        losses: Tensor = torch.func.vmap(partial(outer_loss, estimator))(*episodes)
        return losses.mean()

    def sample() -> Episodes:
        shape = {"way": settings.way, "shot": settings.shot, "query": settings.queries, "tasks": settings.tasks}
        return sample_episodes(images, **shape, generator=tasks)

    def iterate(iteration: int) -> float:
        mean = mean_loss(Reverse(), sample())
        torch.autograd.backward(mean)
        return mean.item()

    try:
        losses, seconds = train(work, params, outer, {"tasks": tasks}, settings.iterations, iterate)
    except FAILED as error:
        return {"diverged": type(error).__name__}
    episodes = sample()
    number = diffopt.compare(lambda estimator: mean_loss(estimator, episodes), []).curvature
    return {"losses": losses, "seconds": seconds, "curvature": None if number is None else number / steps}


EXPERIMENT = described(
    "anil",
    quick=Settings("clusters", (1, 3), (1.0,), (1, 3), 2, iterations=10, tasks=2, width=8),
    standard=Settings(),
    full=Settings(layers=(1, 2, 3), rates=(0.1, 0.3, 1.0, 2.0, 4.0), steps=(1, 3, 5, 7, 10), seeds=5, iterations=2000),
    units=units,
    summary=summary,
    pictures=pictures,
)
