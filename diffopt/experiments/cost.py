r"""What one meta-gradient costs: time, peak memory, products (HVPs) and depth over levels and over inner steps.

One task of few-shot classification with the four-block convolutional network; the images are noise, for their content
costs nothing. Times are processor times of forward and backward pass together, each beside exact backpropagation
through the stored graphs of all steps (MAML as it is usually written), measured in the same breath; intervals are
over the starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import TypeAlias, final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import diffopt
from diffopt.estimators import (
    Binomial,
    Estimator,
    FirstOrder,
    Implicit,
    Krylov,
    MultiStep,
    Reptile,
    Reverse,
    Truncated,
)
from diffopt.experiments.cost_report import pictures, summary
from diffopt.experiments.framework.experiment import Row, Unit, starts
from diffopt.experiments.framework.options import listed, option, real, whole
from diffopt.experiments.framework.texts import described
from diffopt.experiments.framework.unit_context import Work
from diffopt.linear_solve import ConjugateGradient
from diffopt.tasks import Conv4, functional

Problem: TypeAlias = Callable[[Estimator], Tensor]


@final
@dataclass(frozen=True)
class Settings:
    """What is measured."""

    levels_steps: int = option(5, "inner steps K of the comparison over levels", whole(2))
    steps: tuple[int, ...] = option((1, 2, 4, 8, 16, 32), "numbers of inner steps of the other one", listed(whole(1)))
    seeds: int = option(3, "starts: rounds in which everything is measured, on other images", whole(1))
    repeats: int = option(3, "runs of each estimator in a start, of which the median time counts", whole(1))
    way: int = option(5, "classes", whole(2))
    shot: int = option(1, "support images per class", whole(1))
    queries: int = option(5, "query images per class", whole(1))
    filters: int = option(32, "channels of the network", whole(1))
    image_size: int = option(28, "height and width of the images", whole(16))
    lr: float = option(0.01, "inner step size", real(0))


def units(settings: Settings) -> list[Unit]:
    """The starts one after the other, so that slow minutes of the machine hit every setting alike."""

    def of_one_start() -> list[Unit]:
        most = settings.levels_steps
        run = partial(measure, settings, 0.0, most, level_estimators(most))
        found = [Unit(f"levels K={most}", run, 4 * most, keys={"over": "levels", "K": most})]
        for steps in settings.steps:
            run = partial(measure, settings, 0.9, steps, step_estimators(steps))
            found.append(Unit(f"steps K={steps}", run, 4 + steps, keys={"over": "steps", "K": steps}))
        return found

    return starts(settings.seeds, of_one_start)


def level_estimators(steps: int) -> dict[str, Estimator]:
    """The binomial paper's Fig. 4, with Krylov and recomputation beside it; ``MAML`` is what all is measured by."""
    found: dict[str, Estimator] = {
        "MAML": Reverse("graph"),
        "MAML, recomputed": Reverse(1),
        "first-order": FirstOrder(),
    }
    for level in range(steps + 1):
        found[f"truncated {level}"] = Truncated(level)
        found[f"binomial {level}"] = Binomial(level)
        if 0 < level < steps:
            found[f"binomial, one by one {level}"] = Binomial(level, chunk_size=1)
            found[f"krylov {level}"] = Krylov(level)
    return found


def step_estimators(steps: int) -> dict[str, Estimator]:
    """The multi-step paper's Fig. 2 and 5, the memory-reduced paper's Fig. 2."""
    solver = ConjugateGradient(max_iterations=5, throw=False)
    found: dict[str, Estimator] = {"MAML": Reverse("graph"), "MAML, sqrt checkpoints": Reverse("sqrt")}
    found |= {f"multi-step {window}": MultiStep(window, Reverse("graph")) for window in (2, 4, 8) if window <= steps}
    return {**found, "first-order": FirstOrder(), "reptile": Reptile(), "implicit, 5 CG": Implicit(solver)}


def measure(settings: Settings, momentum: float, steps: int, estimators: dict[str, Estimator], work: Work) -> Row:
    """The cost of every estimator; it depends on nothing random but the machine."""
    generator = work.generator("problem")
    network = Conv4(1, settings.way, settings.filters, settings.image_size, generator=generator)
    apply, params = functional(network)

    def images(count: int) -> tuple[Tensor, Tensor]:
        shape = (count * settings.way, 1, settings.image_size, settings.image_size)
        labels = torch.arange(settings.way).repeat(count)
        return torch.rand(shape, generator=generator).to(work.device), labels.to(work.device)

    support, query = images(settings.shot), images(settings.queries)
    params = {name: value.detach().to(work.device).requires_grad_() for name, value in params.items()}

    def loss(params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(apply(params, data[0]), data[1])

    def problem(estimator: Estimator) -> Tensor:
        # an implicit estimator knows the start only as the center of a proximal term: that is iMAML
        proximal = diffopt.ProximalGD(settings.lr, strength=1.0)
        optimizer = proximal if isinstance(estimator, Implicit) else diffopt.SGD(settings.lr, momentum=momentum)
        adapted = diffopt.solve(loss, params, support, optimizer=optimizer, steps=steps, estimator=estimator)
        return loss(adapted.params, query)

    began = time.process_time()
    rows = diffopt.compare(problem, list(estimators.values()), repeats=settings.repeats).complete()
    measured = {}
    for name, row in zip(estimators, rows, strict=True):
        kept = asdict(row)
        measured[name] = {key: kept[key] for key in ("gradients", "products", "depth", "seconds", "megabytes")}
    return {"rules": measured, "processor seconds": round(time.process_time() - began, 1)}


EXPERIMENT = described(
    "cost",
    quick=Settings(2, (2, 8), 2, 1, way=2, queries=1, filters=4, image_size=16),
    standard=Settings(),
    full=Settings(seeds=5, queries=15, image_size=84),
    units=units,
    summary=summary,
    pictures=pictures,
)
