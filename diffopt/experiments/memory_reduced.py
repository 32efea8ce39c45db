r"""The memory-reduced algorithm against MAML, ANIL and ITD-BiO: accuracy, time, and peak memory over inner steps.

The upper level is an embedding, the lower level one linear head per task with an L2 term, so that the inner loss is
strongly convex. MAML adapts the embedding too. The training tasks are finitely many, as warm starts want it. In the
deterministic case every task is used in every iteration, and the true gradient says how far a stationary point is.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import final

import torch

from diffopt.experiments.framework import image_sets
from diffopt.experiments.framework.experiment import Row, Unit, of_start
from diffopt.experiments.framework.few_shot_problem import interval
from diffopt.experiments.framework.options import listed, one_of, option, real, whole
from diffopt.experiments.framework.outer_loop import train
from diffopt.experiments.framework.texts import described
from diffopt.experiments.framework.unit_context import Work
from diffopt.experiments.memory_reduced_deterministic import descend
from diffopt.experiments.memory_reduced_problem import FORMS, METHODS, Shared, Warm
from diffopt.experiments.memory_reduced_report import pictures, summary
from diffopt.tensors.memory import peak_bytes


@final
@dataclass(frozen=True)
class Settings:
    """What is trained and measured."""

    dataset: str = option("omniglot", f"one of {', '.join(image_sets.SETS)}", one_of(*image_sets.SETS))
    way: int = option(5, "classes per task", whole(2))
    shot: int = option(5, "support images per class", whole(1))
    queries: int = option(5, "query images per class", whole(1))
    filters: int = option(16, "channels of the network", whole(1))
    steps: int = option(5, "inner steps K in training", whole(1))
    products: int = option(5, "iterations N of conjugate gradients", whole(1))
    lr: float = option(0.1, "inner step size of a head", real(0))
    maml_lr: float = option(0.1, "inner step size of MAML, which adapts all layers", real(0))
    decay: float = option(0.2, "weight of the L2 term of a head", real(0))
    tasks: int = option(64, "training tasks", whole(1))
    batch: int = option(4, "tasks per outer iteration", whole(1))
    iterations: int = option(240, "outer iterations", whole(1))
    meta_lr: float = option(0.002, "step size of the outer Adam", real(0))
    seeds: int = option(3, "starts: runs of each method", whole(1))
    evaluations: int = option(3, "how often the accuracy is measured", whole(1))
    test_tasks: int = option(100, "tasks of unseen classes it is measured on", whole(2))
    test_steps: int = option(20, "inner steps there", whole(1))
    memory_steps: tuple[int, ...] = option(
        (1, 2, 4, 8, 16, 32), "inner steps K whose memory is measured", listed(whole(1))
    )
    repeats: int = option(3, "measurements, of which the median time counts", whole(1))
    descents: int = option(500, "iterations of the deterministic case", whole(1))


def units(settings: Settings) -> list[Unit]:
    """Memory for each K, once; for each start the deterministic case, and one per run."""
    found = [
        Unit(
            f"memory K={steps}",
            partial(measure, settings, steps),
            2.0 * (3 + steps) * settings.repeats,
            keys={"part": "memory", "K": steps},
        )
        for steps in settings.memory_steps
    ]
    real = settings.dataset != "clusters"
    for seed in range(settings.seeds):
        for start in ("warm", "cold"):
            descent = of_start(partial(descend, settings.descents, real, start == "warm"), seed)
            keys = {"part": "deterministic", "seed": seed, "estimator": start}
            cost = settings.descents / 2
            found.append(Unit(f"deterministic, {start}, seed {seed}", descent, cost, resumable=True, keys=keys))
        for method in METHODS:
            cost = settings.iterations * settings.batch * (2.0 if method == "MAML" else 0.5)
            run = partial(learn, settings, method, seed)
            keys = {"part": "learn", "seed": seed, "estimator": method}
            found.append(Unit(f"{method}, seed {seed}", run, cost, resumable=True, keys=keys))
    return found


def measure(settings: Settings, steps: int, work: Work) -> Row:
    """Peak memory and time of one task's hypergradient, by every method, in both forms of the inner loss."""
    problem = Shared(settings, work)
    task = tuple(side[0] for side in problem.tasks)
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for form in FORMS:
        found[form] = {}
        for method in METHODS:
            if method == "ours, cold":  # costs what the warm one does
                continue
            warm = _warm(problem) if method == "ours, warm" else None

            def once(method: str = method, form: str = form, warm: Warm | None = warm) -> None:
                for value in problem.params(method).values():
                    value.grad = None
                problem.backward(method, form, steps, task, 1.0, warm)  # type: ignore[arg-type]

            once()
            seconds = []
            for _ in range(settings.repeats):
                began = time.process_time()
                once()
                seconds.append(time.process_time() - began)
            peak = peak_bytes(once)
            found[form][method] = {
                "megabytes": None if peak is None else peak / 1e6,
                "seconds": median(seconds),
            }
    return found


def _warm(problem: Shared, count: int = 0) -> Warm:
    """Zeros for one task, or stacked for ``count``."""
    shape = (count,) if count else ()
    head, multiplier = (
        {name: value.new_zeros(*shape, *value.shape) for name, value in problem.zero_head.items()} for _ in range(2)
    )
    return Warm(head, multiplier)


def learn(settings: Settings, method: str, seed: int, work: Work) -> Row:
    """Meta-train by one method; every method sees the same start and the same tasks in the same order.

    Returns:
        The outer losses and processor seconds over the iterations, evaluations left out; the accuracy on unseen
        classes in per cent with half the width of its 95 % interval, and the iterations after which it was measured;
        the accuracies on each task in the end.
    """
    problem = Shared(settings, work, seed)
    test = problem.draw("test", settings.test_tasks, work.generator("test tasks"), work)
    params, order = problem.params(method), work.generator(f"order {seed}")
    outer = torch.optim.Adam(params.values(), lr=settings.meta_lr)
    kept = _warm(problem, settings.tasks)
    stacked = {"head": kept.head, "multiplier": kept.multiplier}
    tensors = {f"{kind} {name}": x for kind, held in stacked.items() for name, x in held.items()}
    curves: dict[str, list[float]] = {"accuracy": [], "half_width": [], "after": [], "evaluating": [], "each": []}
    every = max(1, settings.iterations // settings.evaluations)

    def evaluate(after: int) -> None:
        began = time.process_time()
        accuracies = problem.accuracy(method, settings.test_steps, test)
        found = interval(accuracies)
        curves["each"][:] = accuracies.tolist()
        curves["accuracy"].append(found.mean)
        curves["half_width"].append(found.half_width)
        curves["after"].append(after)
        curves["evaluating"].append(time.process_time() - began)

    def iterate(iteration: int) -> float:
        if iteration % every == 0:
            evaluate(iteration)
        chosen = torch.randperm(settings.tasks, generator=order)[: settings.batch].tolist()
        losses = []
        for i in chosen:
            task, warm = tuple(side[i] for side in problem.tasks), None
            if method == "ours, warm":
                warm = Warm({k: x[i] for k, x in kept.head.items()}, {k: x[i] for k, x in kept.multiplier.items()})
            losses.append(problem.backward(method, FORMS[0], settings.steps, task, 1 / len(chosen), warm))  # type: ignore[arg-type]
        return sum(losses) / len(losses)

    losses, clock = train(
        work, params, outer, {"order": order}, settings.iterations, iterate, tensors=tensors, curves=curves
    )
    seconds = [t - sum(curves["evaluating"][: i // every + 1]) for i, t in enumerate(clock)]
    evaluate(settings.iterations)
    return {"losses": losses, "seconds": seconds, **curves}


QUICK = Settings("clusters", 3, 1, 1, 2, 2, 2, tasks=3, batch=2, iterations=3, seeds=2, evaluations=1, test_tasks=4)
QUICK = replace(QUICK, test_steps=2, memory_steps=(1, 4), repeats=1, descents=2)
FULL = Settings("caltech101", queries=15, filters=32, steps=10, tasks=500, iterations=5000, seeds=3, evaluations=20)
FULL = replace(FULL, test_tasks=600, descents=2000)


EXPERIMENT = described(
    "memory-reduced",
    quick=QUICK,
    standard=Settings(),
    full=FULL,
    units=units,
    summary=summary,
    pictures=pictures,
)
