r"""Few-shot classification by every estimator of the papers, all by the same number of outer iterations.

Two groups, each with an exact estimator of its own to be compared with: plain gradient descent of ``K`` steps (binomial
paper, tables 1 and 2), and SGD with momentum of ``T`` steps (multi-step paper, tables 4 and 5). All see the same start
and the same episodes; the parameters that do best on validation episodes are tested, as in the papers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import final

from diffopt.experiments.few_shot_methods import in_tests, keys_of, methods, outer_optimizer, turn, work_of
from diffopt.experiments.few_shot_papers import OMNIGLOT
from diffopt.experiments.few_shot_report import pictures, summary
from diffopt.experiments.few_shot_reptile import in_batches
from diffopt.experiments.few_shot_training import Validation, trained_and_tested, validated_and_tested
from diffopt.experiments.framework import image_sets
from diffopt.experiments.framework.experiment import Row, Unit, starts
from diffopt.experiments.framework.few_shot_problem import (
    FewShot,
    meta_gradient,
)
from diffopt.experiments.framework.options import listed, one_of, option, real, whole, yes_or_no
from diffopt.experiments.framework.texts import described
from diffopt.experiments.framework.unit_context import Work
from diffopt.tasks import Conv4


@final
@dataclass(frozen=True)
class Settings:
    """What is trained."""

    dataset: str = option("omniglot-vinyals", f"one of {', '.join(image_sets.SETS)}", one_of(*image_sets.SETS))
    ways: tuple[int, ...] = option((5,), "classes per task", listed(whole(2)))
    shots: tuple[int, ...] = option((1,), "support images per class", listed(whole(1)))
    anil: bool = option(False, "yes: adapt the head alone, the body is shared (ANIL)", yes_or_no)
    levels: tuple[int, ...] = option((1, 2), "levels L of truncated, binomial, Krylov, iMAML", listed(whole(1)))
    windows: tuple[int, ...] = option((2, 4, 8), "windows of multi-step estimation", listed(whole(1)))
    steps: int = option(5, "inner steps K of the first group", whole(2))
    test_steps: int = option(10, "inner steps of the first group in tests", whole(1))
    lr: float = option(0.1, "inner step size of the first group", real(0))
    pull: float = option(2.0, "strength of iMAML's proximal term", real(0))
    momentum_steps: int = option(8, "inner steps T of the second group", whole(2))
    momentum_lr: float = option(0.015, "inner step size of the second group; momentum is 0.9, decay 1e-4", real(0))
    side: int = option(16, "pixels each way that Omniglot is averaged down to; 0: 28", whole(0))
    filters: int = option(16, "channels of the network", whole(1))
    tasks: int = option(4, "tasks per outer iteration", whole(1))
    queries: int = option(5, "query images per class in training", whole(1))
    iterations: int = option(1600, "outer iterations", whole(1))
    meta_lr: float = option(0.003, "step size of the outer Adam, at the beginning", real(0))
    decay: bool = option(True, "yes: outer step sizes fall to 0 along half a cosine", yes_or_no)
    checkpoints: int = option(4, "how often validation looks for the best parameters", whole(1))
    validation: int = option(80, "episodes of a validation", whole(2))
    episodes: int = option(400, "episodes of the test", whole(2))
    seeds: int = option(5, "starts: other weights and other training episodes", whole(1))
    scale: str = option(
        "one", "of binomial and hybrid: one, or paper (L/K in the backward pass)", one_of("one", "paper")
    )
    first_order_lr: float = option(0.05, "inner step size of first order in the second group", real(0))
    reptile_steps: int = option(10, "inner steps of Reptile, each on a batch of its own", whole(1))
    reptile_batch: int = option(10, "images of such a batch, of support and query images together", whole(1))
    reptile_lr: float = option(0.1, "inner step size of Reptile", real(0))
    reptile_meta_lr: float = option(1.0, "step of Reptile towards the mean solution, at the beginning", real(0))
    reptile_test_steps: int = option(10, "inner steps of Reptile in tests", whole(1))
    wide_tasks: int = option(4, "tasks per outer iteration of more than 10 ways", whole(1))


def units(settings: Settings) -> list[Unit]:
    """One per start and method: every start of the main methods, then of the others, see :func:`turn`."""

    def of_one_start() -> list[Unit]:
        return [
            Unit(
                f"{way}-way {shot}-shot, {name}",
                partial(learn, settings, name, way, shot),
                way * (shot + settings.queries) * work_of(name, adaptation),
                resumable=True,
                keys={"way": way, "shot": shot, "method": name, **keys_of(name)},
            )
            for way in settings.ways
            for shot in settings.shots
            for name, adaptation in methods(settings).items()
        ]

    return sorted(starts(settings.seeds, of_one_start), key=lambda unit: turn(unit.keys))


def problem(settings: Settings, way: int, shot: int, work: Work) -> tuple[FewShot, FewShot]:
    """The problem with validation episodes for its evaluation, and with test episodes.

    Raises:
        DataError: the files are not there.
    """
    kind = image_sets.SETS[settings.dataset]
    images = [
        image_sets.load(settings.dataset, side, work.data_dir, work.device, rotations=True)
        for side in ("train", "validation", "test")
    ]
    size = kind.size
    if settings.dataset in OMNIGLOT and 0 < settings.side < size:
        size = settings.side
        images = [image_sets.shrunk(part, size) for part in images]
    generator = work.generator(f"start {way} {shot}")
    network = Conv4(kind.channels, way, settings.filters, size, generator=generator)
    return validated_and_tested(kind.title, network, images, settings, way, shot, work.device)


def learn(settings: Settings, name: str, way: int, shot: int, work: Work) -> Row:
    """Meta-train by one method and test the best parameters, see :func:`trained_and_tested`."""
    validated, tested = problem(settings, way, shot, work)
    params, adaptation = validated.params, methods(settings)[name]
    if settings.anil:
        adaptation = replace(adaptation, adapted=frozenset(key for key in params if key.startswith("head.")))
    testing = in_tests(settings, name, adaptation)
    tasks = settings.tasks if way <= 10 else settings.wide_tasks
    outer = outer_optimizer(settings, name, params, tasks)
    rate, validation = outer.param_groups[0]["lr"], Validation(validated, testing, settings.validation)
    episodes, shuffles = work.generator(f"episodes {way} {shot}"), work.generator("shuffles")

    def iterate(iteration: int) -> float:
        share = iteration / settings.iterations if settings.decay else 0.0
        outer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * share)) / 2
        batch = validated.training(tasks, episodes)
        if adaptation.batched:
            batch = in_batches(batch, settings.reptile_steps, settings.reptile_batch, shuffles)
        return meta_gradient(validated, params, adaptation, batch)[0]

    held = {"episodes": episodes, "shuffles": shuffles}
    return trained_and_tested(work, settings, outer, held, iterate, validation, tested, choose=True)


QUICK = Settings("clusters", (3,), (1,), False, (1,), (2,), 3, 3, momentum_steps=2, filters=2, tasks=2, queries=1)
QUICK = replace(QUICK, iterations=2, checkpoints=1, validation=2, episodes=4, seeds=2)
FULL = Settings(ways=(5, 20), shots=(1, 5), levels=(1, 2, 3, 4), filters=64, queries=15, tasks=32, wide_tasks=16)
FULL = replace(FULL, momentum_lr=0.4, first_order_lr=0.1, iterations=60_000)
FULL = replace(FULL, side=0, episodes=600, meta_lr=0.001, decay=False, checkpoints=20, validation=600)


EXPERIMENT = described(
    "few-shot",
    quick=QUICK,
    standard=Settings(),
    full=FULL,
    units=units,
    summary=summary,
    pictures=pictures,
)
