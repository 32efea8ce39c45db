r"""Few-shot classification by every estimator of the papers, all by the same number of outer iterations.

Two groups, each with an exact estimator of its own to be compared with: plain gradient descent of ``K`` steps (binomial
paper, tables 1 and 2), and SGD with momentum of ``T`` steps (multi-step paper, tables 4 and 5). All see the same start
and the same episodes; the parameters that do best on validation episodes are tested, as in the papers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

import diffopt
from diffopt.estimators import Binomial, FirstOrder, Implicit, Krylov, MultiStep, Reptile, Reverse, Truncated
from diffopt.experiments.few_shot_report import pictures, summary
from diffopt.experiments.framework import image_sets
from diffopt.experiments.framework.experiment import Experiment, Needs, Row, Unit, starts
from diffopt.experiments.framework.few_shot_problem import Adaptation, FewShot, classification, evaluate, meta_gradient
from diffopt.experiments.framework.options import listed, one_of, option, real, whole, yes_or_no
from diffopt.experiments.framework.outer_loop import train
from diffopt.experiments.framework.unit_context import Work
from diffopt.linear_solve import ConjugateGradient
from diffopt.tasks import Conv4

FAILED = (diffopt.DivergenceError, diffopt.NonFiniteLossError, diffopt.NonFiniteGradientError)


@final
@dataclass(frozen=True)
class Settings:
    """What is trained."""

    dataset: str = option("omniglot", f"one of {', '.join(image_sets.SETS)}", one_of(*image_sets.SETS))
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
    filters: int = option(16, "channels of the network", whole(1))
    tasks: int = option(4, "tasks per outer iteration", whole(1))
    queries: int = option(5, "query images per class in training", whole(1))
    iterations: int = option(400, "outer iterations", whole(1))
    meta_lr: float = option(0.003, "step size of the outer Adam", real(0))
    checkpoints: int = option(3, "how often validation looks for the best parameters", whole(1))
    validation: int = option(100, "episodes of a validation", whole(2))
    episodes: int = option(600, "episodes of the test", whole(2))
    seeds: int = option(5, "starts: other weights and other training episodes", whole(1))
    scale: str = option(
        "one", "of binomial and hybrid: one, or paper (L/K in the backward pass)", one_of("one", "paper")
    )
    first_order_lr: float = option(0.015, "inner step size of first order in the second group", real(0))
    wide_tasks: int = option(4, "tasks per outer iteration of more than 10 ways", whole(1))


def units(settings: Settings) -> list[Unit]:
    """One per start and method, the ways and shots one after the other."""

    def of_one_start() -> list[Unit]:
        return [
            Unit(
                f"{way}-way {shot}-shot, {name}",
                partial(learn, settings, name, way, shot),
                way * (shot + settings.queries) * _work(name, adaptation),
                resumable=True,
                keys={"way": way, "shot": shot, "method": name, **keys_of(name)},
            )
            for way in settings.ways
            for shot in settings.shots
            for name, adaptation in methods(settings).items()
        ]

    return starts(settings.seeds, of_one_start)


def keys_of(name: str) -> dict[str, Any]:
    """A method's estimator and level, and the group that it belongs to."""
    rule, _, level = name.rpartition(" ")
    numbered = level.isdecimal()
    group = "momentum" if name.startswith(("momentum", "multi-step")) else "plain"
    return {"rule": rule if numbered else name, "L": int(level) if numbered else 0, "group": group}


def _work(name: str, adaptation: Adaptation) -> float:
    """How long an iteration takes, about, in gradients."""
    product = 0 if name in ("FOMAML", "Reptile", "momentum: first-order") else 1
    passes = adaptation.steps
    if isinstance(adaptation.estimator, MultiStep):
        passes = -(-adaptation.steps // adaptation.estimator.window)
    return passes * (1.0 + 2 * product) + 2


def methods(settings: Settings) -> dict[str, Adaptation]:
    """The inner optimizers and estimators by name: plain gradient descent first, then momentum."""
    s, plain = settings, diffopt.SGD(settings.lr)
    heavy = diffopt.SGD(s.momentum_lr, momentum=0.9, weight_decay=1e-4)
    pulled = diffopt.ProximalGD(s.lr, strength=s.pull)

    def scaled(level: int) -> float:
        return min(level / s.steps, 1.0) if s.scale == "paper" else 1.0

    first = {"MAML": Reverse("graph"), "FOMAML": FirstOrder(), "Reptile": Reptile()}
    found = {name: Adaptation(plain, s.steps, rule) for name, rule in first.items()}
    for level in s.levels:
        solver = ConjugateGradient(max_iterations=level, rtol=0.0, throw=False)
        found[f"iMAML {level}"] = Adaptation(pulled, s.steps, Implicit(solver))
        found[f"truncated {level}"] = Adaptation(plain, s.steps, Truncated(level, "graph"))
        found[f"binomial {level}"] = Adaptation(plain, s.steps, Binomial(level, scale=scaled(level)))
        found[f"krylov {level}"] = Adaptation(plain, s.steps, Krylov(level))
    if s.steps > 2:
        found["hybrid 1"] = Adaptation(plain, s.steps, Binomial(1, window=s.steps - 1, scale=scaled(1)))
    found["momentum: MAML"] = Adaptation(heavy, s.momentum_steps, Reverse("graph"))
    found["momentum: first-order"] = Adaptation(diffopt.SGD(s.first_order_lr), s.momentum_steps, FirstOrder())
    for window in s.windows:
        found[f"multi-step {window}"] = Adaptation(heavy, s.momentum_steps, MultiStep(window, Reverse("graph")))
    return found


def in_tests(settings: Settings, name: str, adaptation: Adaptation) -> Adaptation:
    """How a method adapts in tests: as in training, by the first group's number of steps there."""
    momentum = name.startswith(("momentum", "multi-step"))
    return replace(adaptation, steps=adaptation.steps if momentum else settings.test_steps)


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
    generator = work.generator(f"start {way} {shot}")
    network = Conv4(kind.channels, way, settings.filters, kind.size, generator=generator)
    sizes = {"way": way, "shot": shot, "queries": settings.queries}
    first, second = (
        classification(kind.title, network, images[0], side, device=work.device, **sizes) for side in images[1:]
    )
    return first, replace(first, evaluation=second.evaluation)


def learn(settings: Settings, name: str, way: int, shot: int, work: Work) -> Row:
    """Meta-train by one method and test the best parameters.

    Returns:
        The outer losses and processor seconds over the iterations, validations left out; the accuracy on validation
        episodes in per cent, and after which iterations; the test accuracy, half the width of its 95 % interval over
        the episodes, and the accuracies on each of them.
    """
    validated, tested = problem(settings, way, shot, work)
    params, adaptation = validated.params, methods(settings)[name]
    if settings.anil:
        adaptation = replace(adaptation, adapted=frozenset(key for key in params if key.startswith("head.")))
    testing = in_tests(settings, name, adaptation)
    outer = torch.optim.Adam(params.values(), lr=settings.meta_lr)
    best = {key: value.detach().clone() for key, value in params.items()}
    episodes = work.generator(f"episodes {way} {shot}")
    curves: dict[str, list[float]] = {"validation": [], "after": [], "evaluating": []}
    every = -(-settings.iterations // settings.checkpoints)

    def look(after: int) -> None:
        began = time.process_time()
        accuracy = 100 * evaluate(validated, params, testing, settings.validation).after.mean
        if accuracy > max(curves["validation"], default=-1.0):
            _copy(best, params)
        curves["validation"].append(accuracy)
        curves["after"].append(after)
        curves["evaluating"].append(time.process_time() - began)

    def iterate(iteration: int) -> float:
        if iteration and iteration % every == 0:
            look(iteration)
        batch = validated.training(settings.tasks if way <= 10 else settings.wide_tasks, episodes)
        return meta_gradient(validated, params, adaptation, batch)[0]

    held = {"episodes": episodes}
    try:
        losses, clock = train(work, params, outer, held, settings.iterations, iterate, tensors=best, curves=curves)
        look(settings.iterations)
        tests = evaluate(tested, best, testing, settings.episodes)
    except FAILED as error:
        return {"diverged": type(error).__name__}
    passed = [sum(1 for after in curves["after"] if after <= i) for i in range(len(clock))]
    seconds = [t - sum(curves["evaluating"][:count]) for t, count in zip(clock, passed, strict=True)]
    figures: Row = {"accuracy": 100 * tests.after.mean, "half_width": 100 * tests.after.half_width}
    figures |= {"each": [round(100 * value, 3) for value in tests.each]}
    return {"losses": losses, "seconds": seconds, **curves, **figures}


def _copy(into: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for key, value in params.items():
            into[key].copy_(value)


QUICK = Settings("clusters", (3,), (1,), False, (1,), (2,), 3, 3, momentum_steps=2, filters=2, tasks=2, queries=1)
QUICK = replace(QUICK, iterations=2, checkpoints=1, validation=2, episodes=4, seeds=2)
FULL = Settings(ways=(5, 20), shots=(1, 5), levels=(1, 2, 3, 4), filters=64, queries=15, tasks=32, wide_tasks=16)
FULL = replace(FULL, momentum_lr=0.4, first_order_lr=0.1, iterations=60_000)
FULL = replace(FULL, meta_lr=0.001, checkpoints=20, validation=600)

PAPERS = {
    "dataset": "binomial: mini- and tieredImageNet; multi-step: Omniglot, miniImageNet",
    "ways": "5; multi-step: 20 too, on Omniglot",
    "shots": "1 and 5",
    "levels": "1 to 4",
    "windows": "2, 4, 8",
    "steps": "binomial: 5",
    "test_steps": "binomial, its code: 10",
    "lr": "binomial: 0.01 (84x84 images)",
    "scale": "binomial, its code: paper",
    "momentum_steps": "multi-step: 8",
    "momentum_lr": "multi-step: 0.4 on Omniglot; 0.01 (1 shot) and 0.04 (5 shots) on miniImageNet",
    "first_order_lr": "multi-step: the best of 0.1, 0.04, 0.01, 0.004; 0.1 (1 shot) and 0.04 (5 shots) on miniImageNet",
    "filters": "binomial, its code: 32",
    "tasks": "binomial: 4; multi-step: 32 on Omniglot, 4 on miniImageNet",
    "wide_tasks": "multi-step: 16",
    "queries": "binomial, its code: 15",
    "iterations": "binomial: 20,000; multi-step: 60,000",
    "meta_lr": "0.001",
    "checkpoints": "binomial: 20",
    "validation": "binomial: 600",
    "episodes": "600",
    "seeds": "1, as far as the texts say",
}
FILES = "omniglot_28.npz or images_background.zip and images_evaluation.zip; others by --dataset"

EXPERIMENT = Experiment(
    name="few-shot",
    title="Few-shot accuracy of every rule at an equal number of outer iterations",
    paper="binomial: tables 1 and 2; multi-step: tables 4 and 5",
    needs=Needs(FILES, 175, 175),  # on a GPU not measured: no slower
    quick=QUICK,
    standard=Settings(),
    full=FULL,
    units=units,
    summarise=lambda settings, results: summary(settings, units(settings), results),
    draw=lambda settings, results, folder: pictures(settings, units(settings), results, folder),
    papers=PAPERS,
)
