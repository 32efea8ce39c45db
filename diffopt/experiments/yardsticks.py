r"""Three public problems of known answer, each under every estimator that applies.

Influence balancing (Vicol et al., 2021), where truncation has the wrong sign; Shen and Chen's toy (2023), whose outer
loss has a closed form; and MNIST data cleaning as benchmark_bilevel defines it (Dagreou et al., 2022). What each is,
and by which formulas it is judged, stands in the module of its name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch

from diffopt.experiments import yardsticks_cleaning as cleaning
from diffopt.experiments import yardsticks_influence as influence
from diffopt.experiments import yardsticks_toy as toy
from diffopt.experiments.framework.experiment import Row, Unit
from diffopt.experiments.framework.options import listed, one_of, option, real, whole
from diffopt.experiments.framework.texts import described
from diffopt.experiments.framework.unit_context import Work
from diffopt.experiments.yardsticks_draw import pictures
from diffopt.experiments.yardsticks_report import summary

PARTS = ("influence", "toy", "cleaning")


@final
@dataclass(frozen=True)
class Settings:
    """What is measured."""

    parts: tuple[str, ...] = option(PARTS, f"any of {', '.join(PARTS)}", listed(one_of(*PARTS)))
    influence_steps: int = option(200, "influence balancing: steps of the system", whole(4))
    influence_iterations: int = option(100, "influence balancing: steps of descent", whole(1))
    influence_lr: float = option(0.002, "influence balancing: step size of the descent", real(0))
    toy_steps: tuple[int, ...] = option((5, 20, 50), "toy: inner steps T; the descent takes the last", listed(whole(1)))
    toy_points: int = option(61, "toy: points of the grid on which errors are measured", whole(2))
    toy_starts: int = option(1000, "toy: random starts of the descent", whole(1))
    toy_iterations: int = option(150, "toy: steps of the descent", whole(1))
    toy_lr: float = option(0.03, "toy: step size of the descent", real(0))
    problem: str = option("mnist", "cleaning: mnist, or clusters (no data)", one_of("mnist", "clusters"))
    corruptions: tuple[float, ...] = option((0.5, 0.7, 0.9), "cleaning: share of labels redrawn", listed(real(0)))
    seeds: int = option(1, "cleaning: draws of images and labels", whole(1))
    samples: int = option(20_000, "cleaning: training images", whole(10))
    validation: int = option(5000, "cleaning: validation images, with right labels", whole(10))
    steps: int = option(10, "cleaning: inner steps T", whole(2))
    lr: float = option(0.4, "cleaning: inner step size", real(0))
    fit_steps: int = option(60, "cleaning: inner steps to the solution itself", whole(1))
    iterations: int = option(15, "cleaning: outer iterations", whole(1))
    outer_lr: float = option(0.5, "cleaning: step size of the outer Adam", real(0))


def units(settings: Settings) -> list[Unit]:
    """One per estimator and problem; of cleaning also the plain fits and the first hypergradients."""
    parts = {"influence": of_influence, "toy": of_toy, "cleaning": of_cleaning}
    return [unit for part in PARTS if part in settings.parts for unit in parts[part](settings)]


def of_influence(s: Settings) -> Iterator[Unit]:
    """One per estimator."""
    cost = 4e-4 * s.influence_steps * s.influence_iterations
    for name in influence.estimators(s.influence_steps, torch.Generator()):
        run = partial(influence.measure, name, s.influence_steps, s.influence_iterations, s.influence_lr)
        yield Unit(f"influence, {name}", run, cost, keys={"part": "influence", "estimator": name})


def of_toy(s: Settings) -> Iterator[Unit]:
    """One per estimator."""
    for name in toy.estimators(s.toy_steps[-1], torch.Generator()):
        run = partial(toy.measure, name, s.toy_steps, s.toy_points, s.toy_starts, s.toy_iterations, s.toy_lr)
        cost = 8e-4 * s.toy_steps[-1] * s.toy_iterations
        yield Unit(f"toy, {name}", run, cost, keys={"part": "toy", "estimator": name})


def of_cleaning(s: Settings) -> Iterator[Unit]:
    """One per estimator, corruption and draw: what is cheap first, then one estimator after another."""
    gradient = 2e-6 * s.samples
    costs = {"baselines": gradient * 4 * s.fit_steps, "hypergradients": gradient * 50 * s.steps}
    costs |= dict.fromkeys(cleaning.learned(inner(s)), gradient * 3 * s.steps * s.iterations)
    for seed in range(s.seeds):
        for what, cost in costs.items():
            for corruption in s.corruptions:
                name, run = f"cleaning p={corruption:g} seed={seed}, {what}", partial(clean, s, corruption, seed, what)
                learns = what not in ("baselines", "hypergradients")
                keys: dict[str, Any] = {"corruption": corruption, "seed": seed}
                keys |= {"part": "learn", "estimator": what} if learns else {"part": what}
                yield Unit(name, run, cost, learns, keys)


def inner(s: Settings) -> cleaning.Inner:
    """The inner problem of cleaning."""
    return cleaning.Inner(s.steps, s.lr, s.fit_steps)


def clean(s: Settings, corruption: float, seed: int, what: str, work: Work) -> Row:
    """One unit of cleaning."""
    data = cleaning.load(s.problem, (s.samples, s.validation), corruption, seed, work)
    if what == "baselines":
        return cleaning.baselines(data, inner(s))
    if what == "hypergradients":
        return cleaning.first_hypergradients(data, inner(s), work)
    return cleaning.learn(data, what, inner(s), s.iterations, s.outer_lr, work)


EXPERIMENT = described(
    "yardsticks",
    quick=Settings(
        influence_steps=100,
        influence_iterations=1,
        toy_steps=(3, 30),
        toy_points=13,
        toy_starts=20,
        toy_iterations=5,
        problem="clusters",
        corruptions=(0.5,),
        samples=60,
        validation=60,
        steps=6,
        fit_steps=30,
        iterations=3,
    ),
    standard=Settings(),
    full=Settings(
        influence_lr=1e-4,
        influence_iterations=2000,
        toy_steps=(5, 20, 50, 200),
        toy_iterations=1000,
        seeds=3,
        steps=50,
        fit_steps=300,
        iterations=100,
    ),
    units=units,
    summary=summary,
    pictures=pictures,
)
