r"""Convergence of ANIL against the number ``N`` of inner steps: one adapted layer beside several.

ANIL adapts the last layers of a network to a task and keeps the body; the outer loop trains both. With the last layer
alone and an L2 term the inner loss is strongly convex, with more layers it is not convex. For both, the outer training
loss is followed over iterations and over processor time, at a small and at a large inner step size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import diffopt
from diffopt.commands.experiments import small_images
from diffopt.commands.experiments.anil_report import draw, summarise
from diffopt.commands.experiments.contract import Experiment, Needs, Row, Unit
from diffopt.commands.experiments.outer_loop import train
from diffopt.commands.experiments.work import Work
from diffopt.commands.options import listed, option, real, whole
from diffopt.tasks import MLP, functional, sample_episodes


@final
@dataclass(frozen=True)
class Settings:
    """What is trained."""

    problem: str = option("omniglot", "omniglot, or clusters (no data)", small_images.problem)
    layers: tuple[int, ...] = option((1, 2, 3), "how many of the three layers are adapted", listed(whole(1)))
    rates: tuple[float, ...] = option((0.4, 4.0), "inner step sizes", listed(real(0)))
    steps: tuple[int, ...] = option((1, 3, 5, 10), "numbers of inner steps N", listed(whole(1)))
    seeds: int = option(2, "runs of each, from different starts on different tasks", whole(1))
    iterations: int = option(300, "outer iterations", whole(2))
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
            cost=3 + steps,
            resumable=True,
        )
        for seed in range(settings.seeds)
        for layers in settings.layers
        for rate in settings.rates
        for steps in settings.steps
    ]


def run(settings: Settings, layers: int, rate: float, steps: int, seed: int, work: Work) -> Row:
    """Meta-train by the exact hypergradient; every setting sees the same start and the same tasks."""
    images = small_images.load(settings.problem, work).to(work.device)
    sizes = (small_images.PIXELS, settings.width, settings.width, settings.way)
    apply, params = functional(MLP(sizes, generator=work.generator(f"start {seed}")))
    params = {name: value.detach().to(work.device).requires_grad_() for name, value in params.items()}
    adapted = [name for name in params if int(name.split(".")[1]) >= 3 - layers]  # layers.0.weight ... layers.2.bias
    tasks = work.generator(f"tasks {seed}")
    outer = torch.optim.Adam(params.values(), lr=settings.meta_lr)

    def loss(head: dict[str, Tensor], body: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        penalty = sum((value.square().sum() for value in head.values()), torch.zeros((), device=inputs.device))
        return cross_entropy(apply({**body, **head}, inputs.flatten(1)), labels) + settings.decay / 2 * penalty

    def outer_loss(inputs: Tensor, labels: Tensor, query_inputs: Tensor, query_labels: Tensor) -> Tensor:
        head = {name: params[name] for name in adapted}
        body = {name: value for name, value in params.items() if name not in head}
        optimizer = diffopt.SGD(rate)
        found = diffopt.solve(loss, head, body, inputs, labels, optimizer=optimizer, steps=steps)
        return cross_entropy(apply({**body, **found.params}, query_inputs.flatten(1)), query_labels)

    def iterate(iteration: int) -> float:
        shape = {"way": settings.way, "shot": settings.shot, "query": settings.queries, "tasks": settings.tasks}
        episodes = sample_episodes(images, **shape, generator=tasks)
        mean = torch.func.vmap(outer_loss)(*episodes).mean()
        torch.autograd.backward(mean)
        return mean.item()

    try:
        losses, seconds = train(work, params, outer, {"tasks": tasks}, settings.iterations, iterate)
    except (diffopt.DivergenceError, diffopt.NonFiniteLossError, diffopt.NonFiniteGradientError) as error:
        return {"diverged": type(error).__name__}
    return {"losses": losses, "seconds": seconds}


EXPERIMENT = Experiment(
    name="anil",
    title="Convergence of ANIL against the number of inner steps, one adapted layer or several",
    paper="slides: strongly convex and non-convex ANIL",
    needs=Needs("omniglot_28.npz or images_background.zip", 6, None),
    quick=Settings("clusters", (1, 3), (0.4,), (1, 3), 1, iterations=10, tasks=2, width=8),
    standard=Settings(),
    full=Settings(steps=(1, 3, 5, 7, 10), seeds=5, iterations=2000),
    units=units,
    summarise=summarise,
    draw=draw,
)
