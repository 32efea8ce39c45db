r"""Attribution: does the derivative with respect to an example's weight predict what the training does without it?

A network is trained on digits; its attributions are the derivatives of test losses with respect to the weight of every
training example, many losses by one replay of the training. They are compared with what trainings without random parts
of the examples measure (the linear datamodeling score), with trainings without the most and least helpful examples, and
with influence functions and gradient products. Then a tenth of the labels is changed, and is to be found.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from diffopt.experiments.attribution_baselines import every_score
from diffopt.experiments.attribution_problem import (
    Problem,
    Training,
    accuracy,
    changed_labels,
    digits,
    losses,
    mnist,
    network,
)
from diffopt.experiments.attribution_report import WORST, pictures, summary
from diffopt.experiments.framework.experiment import Row, Unit, starts
from diffopt.experiments.framework.options import listed, one_of, option, real, whole
from diffopt.experiments.framework.texts import described
from diffopt.experiments.framework.unit_context import Work
from diffopt.retraining.score import scored
from diffopt.retraining.trainings import random_subsets, retrain

CONFIDENCE = 0.95


@final
@dataclass(frozen=True)
class Settings:
    """What is trained, and how often."""

    images: str = option("mnist", "mnist, or digits (no data) in its place", one_of("mnist", "digits"))
    digits: int = option(1500, "scikit-learn's digits to train with, of 1,797", whole(10, 1787))
    samples: int = option(5000, "MNIST's images to train with", whole(10))
    validation: int = option(10000, "images with right labels, to find changed ones by", whole(10))
    tests: int = option(1000, "test images", whole(10))
    hidden: int = option(32, "width of the hidden layer", whole(1))
    steps: int = option(100, "steps of SGD", whole(1))
    batch: int = option(1000, "MNIST's images in a batch (digits: all)", whole(1))
    lr: float = option(0.05, "step size", real(0))
    momentum: float = option(0.9, "of SGD", real(0, above=False))
    penalty: float = option(0.0, "times the sum of squared weights, on MNIST", real(0, above=False))
    digits_penalty: float = option(0.001, "the same on digits", real(0, above=False))
    queries: int = option(10, "test images whose losses are attributed, one by one", whole(1))
    fraction: float = option(0.01, "share of the examples left out", real(0))
    subsets: int = option(100, "trainings without random examples", whole(3))
    shares: tuple[float, ...] = option(
        (0.005, 0.01, 0.02, 0.05, 0.1), "shares left out of the most and least helpful", listed(real(0))
    )
    draws: int = option(3, "random draws beside each of them", whole(1))
    dampings: tuple[float, ...] = option((0.01, 0.1, 1.0), "of influence functions", listed(real(0)))
    products: int = option(20, "products of conjugate gradients", whole(1))
    changed: float = option(0.1, "share of labels that are changed", real(0))
    seeds: int = option(3, "starts: another network, other examples and other ones left out", whole(1))


def units(settings: Settings) -> list[Unit]:
    """Predicted and measured changes on two sets of images, and the search for changed labels, for every start."""

    def of_one_start() -> list[Unit]:
        return [
            *(
                Unit(name, partial(compare, settings, name), cost, True, {"part": "scores", "images": name})
                for name, cost in (("digits", 1.0), ("mnist", 2.0))
            ),
            Unit("labels", partial(find, settings), keys={"part": "labels"}),
        ]

    return starts(settings.seeds, of_one_start)


def training(settings: Settings, images: str) -> Training:
    """How the network is trained on a set of images."""
    batch, penalty = (0, settings.digits_penalty) if images == "digits" else (settings.batch, settings.penalty)
    return Training(settings.hidden, settings.steps, batch, settings.lr, settings.momentum, penalty)


def load(settings: Settings, images: str, work: Work) -> Problem:
    """The problem on a set of images; ``images=digits`` puts them in the place of MNIST's.

    Raises:
        DataError: MNIST is not there.
    """
    if images == "digits" or settings.images == "digits":
        examples, others = digits(settings.digits, work)
        tests = (others[0][: settings.tests], others[1][: settings.tests])
    else:
        examples, tests = mnist("train", settings.samples, work), mnist("test", settings.tests, work)
    start = network(examples[0].shape[1], settings.hidden, work.generator("network"))
    queries = (tests[0][: settings.queries], tests[1][: settings.queries])
    return Problem(training(settings, images), examples, queries, tests, start)


def helpful(scores: Tensor, shares: tuple[float, ...], *, most: bool) -> list[Tensor]:
    """The most (or least) helpful examples for a loss, so large shares of them: a negative score is a helpful one."""
    order = scores.argsort(descending=not most, stable=True)
    return [order[: max(1, round(share * len(scores)))] for share in shares]


def removals(settings: Settings, scores: dict[str, Tensor], work: Work) -> dict[str, list[Tensor]]:
    """What is left out for the curves: by the last metric, the mean loss of the tests."""
    last = {name: values[-1] for name, values in scores.items()}
    found = {f"{name}, most": helpful(values, settings.shares, most=True) for name, values in last.items()}
    found |= {f"{name}, least": helpful(values, settings.shares, most=False) for name, values in last.items()}
    generator, count = work.generator("removals"), len(last["exact"])
    for draw_number in range(settings.draws):
        order = torch.randperm(count, generator=generator)
        sizes = [max(1, round(share * count)) for share in settings.shares]
        found[f"random {draw_number}"] = [order[:size] for size in sizes]
    return found


def compare(settings: Settings, images: str, work: Work) -> Row:
    """Attributions and what training again measures.

    Returns:
        For every method its linear datamodeling score, interval, scores by query and processor seconds; predicted and
        measured changes of the queries by the exact method; the change of the mean test loss without the most and least
        helpful examples by each method, and without random ones.
    """
    problem, saved = load(settings, images, work), work.saved() or {}
    if not saved:
        scores, seconds = every_score(problem, problem.metric, settings.dampings, settings.products)
        saved = {"scores": scores, "seconds": seconds, "known": {}}
    scores, known = saved["scores"], saved["known"]
    ones = problem.ones
    size = min(max(1, round(settings.fraction * len(ones))), len(ones) - 1)
    subsets = random_subsets(len(ones), size, settings.subsets, work.seed)
    curves = removals(settings, scores, work)
    nothing = torch.zeros(0, dtype=torch.int64)
    left_out = [nothing, *subsets, *(chosen for each in curves.values() for chosen in each)]
    for number, found in retrain(problem.train, problem.metric, ones, left_out, known):
        known[number] = found
        work.step(len(known), len(left_out), f"training {len(known)} of {len(left_out)}", lambda: saved)
    measured = torch.stack([known[number] for number in range(len(left_out))])
    changes = measured[1:] - measured[0]
    return {
        "accuracy": accuracy(problem.train(ones), problem.tests),
        "examples": len(ones),
        "left out": size,
        "methods": _judged(scores, changes[: settings.subsets, :-1], subsets, ones, work.seed),
        "seconds": saved["seconds"],
        "measured": changes[: settings.subsets, :-1].tolist(),
        "loss": float(measured[0, -1]),
        "curves": _by_curve(curves, changes[settings.subsets :, -1].tolist()),
    }


def _judged(scores: dict[str, Tensor], measured: Tensor, subsets: Tensor, ones: Tensor, seed: int) -> Row:
    """The linear datamodeling score of every method, over the queries."""
    rows: Row = {}
    for name, values in scores.items():
        found = scored(values[:-1], measured, subsets, 0.0, ones, CONFIDENCE, seed)
        rows[name] = {"score": found.score, "interval": list(found.interval), "each": found.per_metric.tolist()}
        if name == "exact":
            rows[name]["predicted"] = found.predicted.tolist()
    return rows


def _by_curve(curves: dict[str, list[Tensor]], changes: list[float]) -> dict[str, list[float]]:
    values = iter(changes)
    return {name: [next(values) for _ in sets] for name, sets in curves.items()}


def find(settings: Settings, work: Work) -> Row:
    """Change some labels, and look for them where more weight increases the loss of images with right labels.

    Returns:
        The share of the changed labels among the worst 1, 2, ... 100 % by each method; test accuracies with all
        examples, without the worst 15 % by each method, and without the changed ones.
    """
    problem = load(settings, "mnist", work)
    inputs, right = problem.examples
    given, wrong = changed_labels(right, settings.changed, work.generator("labels"))
    small = settings.images == "digits"
    checked = problem.tests if small else mnist("validation", settings.validation, work)
    noisy = Problem(problem.training, (inputs, given), checked, checked, problem.start)

    def metric(params: dict[str, Tensor]) -> Tensor:
        return noisy.mean_loss(params)[None]

    scores, seconds = every_score(noisy, metric, settings.dampings, settings.products)
    worst = {name: values[0] for name, values in scores.items()}
    params = noisy.train(noisy.ones)
    worst["own loss"] = losses(params, noisy.examples).detach()

    def accuracy_without(chosen: Any) -> float:
        weights = noisy.ones
        weights[chosen] = 0
        return accuracy(noisy.train(weights), problem.tests)

    orders = {name: values.argsort(descending=True, stable=True) for name, values in worst.items()}
    last = round(WORST * len(right) / 100)
    return {
        "changed": int(wrong.sum()),
        "found": {name: shares_found(wrong[order]) for name, order in orders.items()},
        "accuracy": {
            "all": accuracy(params, problem.tests),
            "without the changed": accuracy_without(wrong),
            **{name: accuracy_without(order[:last]) for name, order in orders.items()},
        },
        "seconds": seconds,
    }


def shares_found(wrong: Tensor) -> list[float]:
    """The share of all that is true among the first 1, 2, ... 100 %."""
    total = wrong.sum()
    return [float(wrong[: round(part * len(wrong) / 100)].sum() / total) for part in range(1, 101)]


EXPERIMENT = described(
    "attribution",
    quick=Settings(
        "digits",
        digits=60,
        tests=60,
        hidden=6,
        steps=8,
        batch=20,
        queries=3,
        fraction=0.1,
        subsets=6,
        shares=(0.05, 0.2),
        draws=1,
        dampings=(0.1, 1.0),
        products=5,
        seeds=2,
    ),
    standard=Settings(),
    full=Settings(samples=20000, tests=10000, hidden=128, steps=400, queries=50, subsets=400, products=100),
    units=units,
    summary=summary,
    pictures=pictures,
)
