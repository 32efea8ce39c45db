r"""What is said of MAML itself: on its inner step size, its batch sizes, ANIL beside it, first order at more ways.

Few-shot classification of small images by a network of three layers. Every run sees the same start and, where its sizes
agree, the same tasks; it is judged by the same tasks of its training classes, on which the outer loss and the squared
norm of its gradient are taken, and by tasks of classes that it has not seen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import diffopt
from diffopt.estimators import Estimator, FirstOrder, Reverse
from diffopt.experiments.framework import small_images
from diffopt.experiments.framework.experiment import Row, Unit
from diffopt.experiments.framework.options import listed, one_of, option, real, whole
from diffopt.experiments.framework.outer_loop import FAILED, train
from diffopt.experiments.framework.texts import described
from diffopt.experiments.framework.unit_context import Work
from diffopt.experiments.maml_report import pictures, summary
from diffopt.tasks import Episodes, sample_episodes

LAYERS = small_images.LAYERS
TRAINED = 0.8
"""The share of the classes that is trained on; the others are for tests."""


@final
@dataclass(frozen=True)
class Settings:
    """What is trained."""

    problem: str = option("omniglot", "omniglot, or clusters (no data)", one_of(*small_images.PROBLEMS))
    rates: tuple[float, ...] = option((0.1, 0.4, 1.6, 6.4), "inner step sizes", listed(real(0)))
    rate: float = option(0.4, "inner step size where another thing is varied", real(0))
    tasks: tuple[int, ...] = option((1, 4, 16), "tasks per outer iteration; the middle one elsewhere", listed(whole(1)))
    batches: tuple[int, ...] = option((2, 8), "support images per inner gradient, all elsewhere", listed(whole(1)))
    ways: tuple[int, ...] = option((5, 20), "classes per task; the first one elsewhere", listed(whole(2)))
    seeds: int = option(3, "runs of each, from different starts on different tasks", whole(1))
    iterations: int = option(150, "outer iterations", whole(2))
    meta_lr: float = option(0.002, "step size of the outer Adam", real(0))
    steps: int = option(5, "inner steps", whole(1))
    shot: int = option(5, "support images per class", whole(1))
    queries: int = option(5, "query images per class", whole(1))
    width: int = option(64, "width of the two hidden layers", whole(1))
    judged: int = option(64, "tasks by which a run is judged", whole(1))


@final
@dataclass(frozen=True)
class Run:
    """One run: what is varied, and the seed."""

    rate: float
    tasks: int
    way: int
    seed: int
    batch: int | None = None
    adapted: int = LAYERS
    first_order: bool = False

    def keys(self) -> dict[str, Any]:
        """Of its unit."""
        method = "FOMAML" if self.first_order else "MAML" if self.adapted == LAYERS else "ANIL"
        batch = "all" if self.batch is None else str(self.batch)
        sizes = {"lr": self.rate, "tasks": self.tasks, "batch": batch, "way": self.way}
        return {"method": method, **sizes, "seed": self.seed}

    def name(self) -> str:
        """Of its unit."""
        method, *sizes = self.keys().items()
        words = (f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in sizes)
        return " ".join([method[1], *words])


def runs(s: Settings) -> list[Run]:
    """Each thing varied by itself, at every seed; what two of them share is run once."""
    found: list[Run] = []
    for seed in range(s.seeds):
        base = Run(s.rate, s.tasks[len(s.tasks) // 2], s.ways[0], seed)
        found += [replace(base, rate=rate) for rate in (*s.rates, s.rate)]
        found += [replace(base, rate=rate, adapted=1) for rate in (*s.rates, s.rate)]
        found += [replace(base, tasks=tasks) for tasks in s.tasks]
        found += [replace(base, batch=batch) for batch in s.batches]
        found += [replace(base, way=way, first_order=first) for way in s.ways for first in (False, True)]
    return list(dict.fromkeys(found))


def units(settings: Settings) -> list[Unit]:
    """One per run."""
    return [
        Unit(run.name(), partial(learn, settings, run), run.tasks * run.way + 20.0, True, run.keys())
        for run in runs(settings)
    ]


def learn(settings: Settings, run: Run, work: Work) -> Row:
    """Meta-train, and judge what was learned.

    Returns:
        The outer losses and processor seconds over the iterations; after them, on tasks of the training classes, the
        ``loss`` and the squared norm of its gradient, ``slope``; on tasks of other classes the ``accuracy`` in per
        cent.
    """
    images = small_images.load(settings.problem, work).to(work.device)
    seen = int(TRAINED * len(images))
    start = f"start {run.seed} {run.way}"
    apply, params, adapted = small_images.network(settings.width, run.way, run.adapted, start, work)
    tasks, drawn = work.generator(f"tasks {run.seed}"), work.generator(f"batches {run.seed}")
    outer = torch.optim.Adam(params.values(), lr=settings.meta_lr)
    support = run.way * settings.shot
    everything = torch.arange(support).expand(settings.steps, support)

    def loss(
        head: dict[str, Tensor], body: dict[str, Tensor], inputs: Tensor, labels: Tensor, chosen: Tensor
    ) -> Tensor:
        return cross_entropy(apply({**body, **head}, inputs[chosen].flatten(1)), labels[chosen])

    def answers(estimator: Estimator, batches: Tensor, inputs: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        head = {name: params[name] for name in adapted}
        body = {name: value for name, value in params.items() if name not in head}
        found = diffopt.solve(
            loss, head, body, inputs, labels,
            optimizer=diffopt.SGD(run.rate), steps=settings.steps, batches=batches, estimator=estimator,
        )  # fmt: skip
        scores: Tensor = apply({**body, **found.params}, queries.flatten(1))
        return scores

    def each(estimator: Estimator, episodes: Episodes, batches: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.func.vmap(partial(answers, estimator, batches))(*episodes[:3])
        return cross_entropy(scores.flatten(0, 1), episodes[3].flatten()), scores

    def sample(images: Tensor, count: int, generator: torch.Generator) -> Episodes:
        shape = {"way": run.way, "shot": settings.shot, "query": settings.queries, "tasks": count}
        return sample_episodes(images, **shape, generator=generator)

    def iterate(iteration: int) -> float:
        batches = everything
        if run.batch is not None:
            orders = [torch.randperm(support, generator=drawn) for _ in range(settings.steps)]
            batches = torch.stack(orders)[:, : run.batch]
        estimator = FirstOrder() if run.first_order else Reverse()
        mean, _ = each(estimator, sample(images[:seen], run.tasks, tasks), batches)
        torch.autograd.backward(mean)
        return mean.item()

    try:
        held = {"tasks": tasks, "batches": drawn}
        losses, seconds = train(work, params, outer, held, settings.iterations, iterate)
        mean, _ = each(Reverse(), sample(images[:seen], settings.judged, work.generator("judged")), everything)
        slopes = torch.autograd.grad(mean, list(params.values()))
        unseen = sample(images[seen:], settings.judged, work.generator("unseen"))
        _, scores = each(FirstOrder(), unseen, everything)
    except FAILED as error:
        return {"diverged": type(error).__name__}
    right = (scores.argmax(-1) == unseen[3]).float().mean()
    slope = sum(float(x.square().sum()) for x in slopes)
    return {"losses": losses, "seconds": seconds, "loss": mean.item(), "slope": slope, "accuracy": 100 * float(right)}


EXPERIMENT = described(
    "maml",
    quick=Settings(
        "clusters",
        (0.2, 50.0),
        0.8,
        (1, 2),
        (2,),
        (2, 4),
        1,
        iterations=3,
        steps=2,
        shot=2,
        queries=1,
        width=4,
        judged=3,
    ),
    standard=Settings(),
    full=Settings(seeds=5, iterations=2000, tasks=(1, 4, 16, 64)),
    units=units,
    summary=summary,
    pictures=pictures,
)
