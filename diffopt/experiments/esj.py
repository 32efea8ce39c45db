r"""The evolution-strategies Jacobian against AID, ITD, ANIL and MAML where tasks share an embedding.

Each task fits a linear head of its own, from zero, on embedded images (an L2 term makes that strongly convex); the
outer loss trains the embedding. Its hypergradient has a direct part, through the embedding of the query images, and a
response, through the heads. The estimators differ in the response: none of it, back-propagation (ITD), implicit
differentiation (AID), or finite differences along random directions (ESJ). Where the features of the support images
are computed once, outside of the inner problem, the response is that to the features: autograd takes it to the
embedding, and ESJ perturbs so many fewer numbers. ANIL learns the head's start too, MAML adapts the embedding as well.
Of a ResNet-12, which is the slides' network, one outer step is measured.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import final

import torch
from torch import Tensor

from diffopt.estimators import ESJacobian, FirstOrder, Reverse
from diffopt.experiments.esj_problem import DEEP, SIZES, Embedding, Method, methods, of_one_step
from diffopt.experiments.esj_report import pictures, summary
from diffopt.experiments.framework import small_images
from diffopt.experiments.framework.experiment import Row, Unit
from diffopt.experiments.framework.options import listed, one_of, option, real, whole
from diffopt.experiments.framework.outer_loop import train
from diffopt.experiments.framework.texts import described
from diffopt.experiments.framework.unit_context import Work
from diffopt.tensors.memory import peak_bytes


@final
@dataclass(frozen=True)
class Settings:
    """What is trained."""

    problem: str = option("omniglot", "omniglot, or clusters (no data)", one_of(*small_images.PROBLEMS))
    directions: tuple[int, ...] = option((1, 10), "directions Q of ESJ in training", listed(whole(1)))
    measured: tuple[int, ...] = option((1, 10, 100), "directions Q whose error is measured", listed(whole(1)))
    radius: float = option(0.01, "length of a perturbation's entries", real(0))
    draws: int = option(5, "sets of directions whose errors are averaged", whole(1))
    seeds: int = option(3, "runs of each method, from different starts on different tasks", whole(1))
    iterations: int = option(200, "outer iterations", whole(2))
    meta_lr: float = option(0.002, "step size of the outer Adam", real(0))
    steps: int = option(20, "inner steps", whole(1))
    lr: float = option(0.4, "inner step size; momentum is 0.9", real(0))
    decay: float = option(0.05, "weight of the L2 term of the inner loss", real(0, above=False))
    tasks: int = option(8, "tasks per outer iteration", whole(1))
    way: int = option(5, "classes per task", whole(2))
    shot: int = option(1, "support images per class", whole(1))
    queries: int = option(5, "query images per class", whole(1))
    target: float = option(1.1, "outer loss to be reached", real(0))
    maml_lr: float = option(0.1, "inner step size of MAML, which has no momentum", real(0))
    deep_side: int = option(32, "pixels each way of what a ResNet-12 takes one outer step on; 0: it does not", whole(0))
    deep_filters: tuple[int, ...] = option((64, 160, 320, 640), "channels of its four blocks", listed(whole(1)))


def units(settings: Settings) -> list[Unit]:
    """One for the errors at the start, and one per run, for each size of embedding; one per step of the ResNet-12."""
    found = []
    for seed in range(settings.seeds):
        for size in SIZES:
            keys = {"seed": seed, "embedding": size}
            run = partial(measure, settings, size, seed)
            found.append(Unit(f"errors, {size}, seed {seed}", run, 20.0 * settings.draws, keys=keys))
            for name in methods(settings, Work(0)):
                run = partial(learn, settings, size, name, seed)
                cost = settings.iterations * (3.0 if name.startswith("ESJ") else 1.0)
                unit = f"{size}, {name}, seed {seed}"
                found.append(Unit(unit, run, cost, resumable=True, keys={**keys, "estimator": name}))
        for name in of_one_step(settings) if settings.deep_side else ():
            run = partial(step, settings, name, seed)
            keys = {"seed": seed, "embedding": DEEP, "estimator": name}
            found.append(Unit(f"{DEEP}, {name}, seed {seed}", run, 100.0, keys=keys))
    return found


def measure(settings: Settings, size: str, seed: int, work: Work) -> Row:
    """Relative error and cosine of every estimator's hypergradient at the start, beside the exact one (ITD)."""
    problem = Embedding(settings, size, seed, work)
    episodes = problem.sample()

    def hypergradient(method: Method) -> Tensor:
        found = torch.autograd.grad(problem.outer_loss(method, episodes), list(problem.params.values()))
        return torch.cat([leaf.flatten() for leaf in found])

    exact, direct = hypergradient(Method(Reverse("graph"))), hypergradient(Method(FirstOrder()))
    every = replace(settings, directions=tuple(dict.fromkeys((*settings.directions, *settings.measured))))
    chosen = {name: method for name, method in methods(every, work).items() if not method.learned}  # another outer loss
    response = float((exact - direct).norm() / exact.norm())
    found = {}
    for name, method in chosen.items():
        draws = [hypergradient(method) for _ in range(settings.draws if name.startswith("ESJ") else 1)]
        squares = [float(((draw - exact).norm() / exact.norm()) ** 2) for draw in draws]
        cosines = [float(torch.cosine_similarity(draw, exact, dim=0)) for draw in draws]
        found[name] = {"error": (sum(squares) / len(draws)) ** 0.5, "cosine": sum(cosines) / len(draws)}
    return {"parameters": problem.count, "response": response, "rules": found}


def learn(settings: Settings, size: str, name: str, seed: int, work: Work) -> Row:
    """Train the embedding; every estimator sees the same start and the same tasks."""
    problem = Embedding(settings, size, seed, work)
    method = methods(settings, work)[name]
    leaves = problem.leaves(method)
    outer = torch.optim.Adam(leaves.values(), lr=settings.meta_lr)
    generators = {"tasks": problem.generator}
    if isinstance(method.estimator, ESJacobian) and method.estimator.generator is not None:
        generators["directions"] = method.estimator.generator

    def iterate(iteration: int) -> float:
        loss = problem.outer_loss(method, problem.sample())
        torch.autograd.backward(loss)
        return loss.item()

    losses, seconds = train(work, leaves, outer, generators, settings.iterations, iterate)
    return {"losses": losses, "seconds": seconds}


def step(settings: Settings, name: str, seed: int, work: Work) -> Row:
    """Memory at the peak of one outer step of the ResNet-12, and the processor seconds of a second one.

    One step: the loss and its hypergradient of one task.
    """
    problem, method = Embedding(settings, DEEP, seed, work), methods(settings, work)[name]
    episodes, leaves = problem.sample(), list(problem.leaves(method).values())

    def once() -> None:
        torch.autograd.grad(problem.outer_loss(method, episodes), leaves)

    peak = peak_bytes(once)
    began = time.process_time()
    once()
    seconds = time.process_time() - began
    return {"parameters": problem.count, "step": seconds, "megabytes": None if peak is None else peak / 1e6}


EXPERIMENT = described(
    "esj",
    quick=Settings(
        "clusters", (1,), (1, 4), draws=2, seeds=2, iterations=4, steps=3, tasks=2, deep_side=16, deep_filters=(2,) * 4
    ),
    standard=Settings(),
    full=Settings(directions=(1, 10, 100), seeds=5, iterations=2000, deep_side=84),
    units=units,
    summary=summary,
    pictures=pictures,
)
