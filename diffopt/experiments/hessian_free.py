r"""HF-MAML, GGS-MAML and ES-MAML beside MAML: errors of one meta-gradient, and accuracy in equal time.

All three replace the products with the inner Hessian by differences: of gradients along the vector itself, of gradients
along random directions, of losses along random directions. The problem is few-shot classification of small images by a
network of three layers. Every method sees the same start and the same episodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

import diffopt
from diffopt.estimators import ESJacobian, Estimator, FirstOrder, Reverse
from diffopt.experiments.few_shot_training import Validation, trained_and_tested, validated_and_tested
from diffopt.experiments.framework import image_sets
from diffopt.experiments.framework.experiment import Row, Unit, starts
from diffopt.experiments.framework.few_shot_problem import (
    Adaptation,
    FewShot,
    Params,
    meta_gradient,
)
from diffopt.experiments.framework.options import listed, one_of, option, real, whole
from diffopt.experiments.framework.texts import described
from diffopt.experiments.framework.unit_context import Work
from diffopt.experiments.hessian_free_estimators import ESMAML, GGSMAML, HFMAML
from diffopt.experiments.hessian_free_report import pictures, split, summary
from diffopt.tasks import MLP, Episodes

SIDE = 14
SETS = ("omniglot-vinyals", "omniglot", "clusters")


@final
@dataclass(frozen=True)
class Settings:
    """What is trained."""

    dataset: str = option("omniglot-vinyals", f"one of {', '.join(SETS)}", one_of(*SETS))
    steps: int = option(5, "inner steps K in training", whole(1))
    measured_steps: tuple[int, ...] = option((1, 5), "inner steps K at which errors are measured", listed(whole(1)))
    lr: float = option(0.4, "inner step size", real(0))
    directions: tuple[int, ...] = option((1, 10), "directions Q in training", listed(whole(1)))
    measured: tuple[int, ...] = option((1, 10, 100), "directions Q whose error is measured", listed(whole(1)))
    radius: float = option(0.01, "length of HF-MAML's difference", real(0))
    gradient_radius: float = option(0.001, "length of an entry of GGS-MAML's differences, and of ESJ's", real(0))
    loss_radius: float = option(0.01, "length of an entry of ES-MAML's differences", real(0))
    warm: int = option(100, "outer iterations of MAML before errors are measured", whole(0))
    draws: int = option(3, "sets of directions whose errors are averaged", whole(1))
    way: int = option(5, "classes per task", whole(2))
    shot: int = option(1, "support images per class", whole(1))
    queries: int = option(5, "query images per class", whole(1))
    width: int = option(64, "width of the two hidden layers", whole(1))
    tasks: int = option(4, "tasks per outer iteration", whole(1))
    iterations: int = option(300, "outer iterations", whole(1))
    meta_lr: float = option(0.002, "step size of the outer Adam", real(0))
    checkpoints: int = option(6, "how often the accuracy is looked at", whole(1))
    validation: int = option(100, "episodes of such a look", whole(2))
    episodes: int = option(300, "episodes of the test", whole(2))
    seeds: int = option(3, "starts: other weights and other training episodes", whole(1))


def units(settings: Settings) -> list[Unit]:
    """For each start the errors by number of steps, then one run for each method."""

    def of_one_start() -> list[Unit]:
        found = [
            Unit(f"errors, K={steps}", partial(measure, settings, steps), 100.0 * steps, keys={"K": steps})
            for steps in settings.measured_steps
        ]
        for name in estimators(settings, settings.directions, Work(0)):
            cost = settings.iterations * (2.0 + split(name)["Q"])
            run = partial(learn, settings, name)
            found.append(Unit(name, run, cost, resumable=True, keys={"estimator": name, "K": settings.steps}))
        return found

    return starts(settings.seeds, of_one_start)


def estimators(settings: Settings, directions: tuple[int, ...], work: Work) -> dict[str, Estimator]:
    """The methods by name, those that draw directions with so many."""
    source = work.generator("directions")
    found: dict[str, Estimator] = {"MAML": Reverse("graph"), "FOMAML": FirstOrder(), "HF-MAML": HFMAML(settings.radius)}
    for q in directions:
        found[f"GGS-MAML, Q={q}"] = GGSMAML(q, settings.gradient_radius, source)
        found[f"ES-MAML, Q={q}"] = ESMAML(q, settings.loss_radius, source)
        found[f"ESJ, Q={q}"] = ESJacobian(q, settings.gradient_radius, "gaussian", generator=source)
    return found


def problem(settings: Settings, work: Work) -> tuple[FewShot, FewShot]:
    """The problem with validation episodes for its evaluation, and with test episodes.

    Raises:
        DataError: the files are not there.
    """
    images = [
        image_sets.shrunk(image_sets.load(settings.dataset, side, work.data_dir, work.device, rotations=True), SIDE)
        for side in ("train", "validation", "test")
    ]
    sizes = (SIDE * SIDE, settings.width, settings.width, settings.way)
    network = nn.Sequential(nn.Flatten(), MLP(sizes, torch.tanh, generator=work.generator("start")))
    title = image_sets.SETS[settings.dataset].title
    return validated_and_tested(title, network, images, settings, settings.way, settings.shot, work.device)


def outer(settings: Settings, params: Params) -> torch.optim.Optimizer:
    """The outer optimizer."""
    return torch.optim.Adam(params.values(), lr=settings.meta_lr)


def measure(settings: Settings, steps: int, work: Work) -> Row:
    """Relative error and cosine of every method's meta-gradient, after some iterations of MAML, for each episode.

    Averaged over the episodes of one outer iteration by the mean square, and so over sets of directions.
    """
    validated, _ = problem(settings, work)
    params, episodes = validated.params, work.generator("episodes")
    optimizer, sgd = outer(settings, params), diffopt.SGD(settings.lr)
    for _ in range(settings.warm):
        meta_gradient(
            validated, params, Adaptation(sgd, steps, Reverse("graph")), validated.training(settings.tasks, episodes)
        )
        optimizer.step()
    batch = validated.training(settings.tasks, episodes)

    def gradients(estimator: Estimator) -> Tensor:
        return torch.stack(
            [_gradient(validated, Adaptation(sgd, steps, estimator), batch, i) for i in range(len(batch[0]))]
        )

    exact, found = gradients(Reverse("graph")), {}
    for name, estimator in estimators(settings, settings.measured, work).items():
        if name == "MAML":
            continue
        draws = [gradients(estimator) for _ in range(settings.draws if "Q=" in name else 1)]
        squares = [((draw - exact).norm(dim=1) / exact.norm(dim=1)).square().mean() for draw in draws]
        cosines = [torch.cosine_similarity(draw, exact, dim=1).mean() for draw in draws]
        found[name] = {
            "error": float(torch.stack(squares).mean().sqrt()),
            "cosine": float(torch.stack(cosines).mean()),
        }
    return {"parameters": sum(value.numel() for value in params.values()), "rules": found}


def _gradient(problem: FewShot, adaptation: Adaptation, batch: Episodes, index: int) -> Tensor:
    """The meta-gradient of one episode, as one vector."""
    one = Episodes(*(part[index : index + 1] for part in batch))
    meta_gradient(problem, problem.params, adaptation, one)
    grads = [value.grad for value in problem.params.values()]
    return torch.cat([grad.flatten() for grad in grads if grad is not None])


def learn(settings: Settings, name: str, work: Work) -> Row:
    """Meta-train by one method and test the parameters at the end, see :func:`trained_and_tested`."""
    validated, tested = problem(settings, work)
    params = validated.params
    estimator = estimators(settings, settings.directions, work)[name]
    adaptation = Adaptation(diffopt.SGD(settings.lr), settings.steps, estimator)
    testing = Adaptation(diffopt.SGD(settings.lr), settings.steps)
    validation = Validation(validated, testing, settings.validation)
    held: dict[str, Any] = {"episodes": work.generator("episodes")}
    if (source := getattr(estimator, "generator", None)) is not None:
        held["directions"] = source

    def iterate(iteration: int) -> float:
        return meta_gradient(validated, params, adaptation, validated.training(settings.tasks, held["episodes"]))[0]

    return trained_and_tested(work, settings, outer(settings, params), held, iterate, validation, tested, choose=False)


EXPERIMENT = described(
    "hessian-free",
    quick=Settings(
        "clusters",
        2,
        (1, 2),
        0.4,
        (1,),
        (1, 4),
        warm=1,
        draws=2,
        way=3,
        queries=1,
        width=4,
        tasks=2,
        iterations=2,
        checkpoints=1,
        validation=2,
        episodes=4,
        seeds=2,
    ),
    standard=Settings(),
    full=Settings(iterations=20_000, checkpoints=20, validation=600, episodes=600, seeds=5),
    units=units,
    summary=summary,
    pictures=pictures,
)
