r"""Data hyper-cleaning: half of MNIST's training labels are redrawn, and a weight per example finds out which.

The inner problem fits softmax regression to the weighted examples by SGD with momentum, the outer one minimises the
loss on clean validation images over the weights. Every estimator that reaches what the loss reads learns the weights,
by the same number of outer steps; then the model is fitted anew with them, for longer, and tested.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import final

import torch
from torch import Tensor

import diffopt
from diffopt.estimators import (
    Binomial,
    ESJacobian,
    Estimator,
    FirstOrder,
    Implicit,
    Krylov,
    MultiStep,
    Reverse,
    Truncated,
)
from diffopt.experiments.framework.experiment import Row, Unit, starts
from diffopt.experiments.framework.options import listed, one_of, option, real, whole
from diffopt.experiments.framework.outer_loop import FAILED, train
from diffopt.experiments.framework.texts import described
from diffopt.experiments.framework.unit_context import Work
from diffopt.experiments.hyper_cleaning_report import pictures, summary
from diffopt.linear_solve import ConjugateGradient
from diffopt.tasks import HyperCleaning
from diffopt.tasks.hyper_cleaning import redrawn

FRACTION = 0.5
"""Of the labels that are drawn again."""


@final
@dataclass(frozen=True)
class Settings:
    """What is learned."""

    problem: str = option("mnist", "mnist, or clusters (no data)", one_of("mnist", "clusters"))
    samples: int = option(5000, "training images", whole(10))
    validation: int = option(5000, "validation images, with right labels", whole(10))
    steps: int = option(50, "inner steps T", whole(1))
    lr: float = option(0.1, "inner step size", real(0))
    momentum: float = option(0.9, "of the inner SGD", real(0, above=False))
    iterations: int = option(20, "outer iterations", whole(1))
    outer_lr: float = option(0.5, "step size of the outer Adam", real(0))
    fit_steps: int = option(200, "steps of the fit that is tested", whole(1))
    truncated: int = option(10, "steps that truncated back-propagation keeps", whole(1))
    orders: tuple[int, ...] = option((1, 2), "orders of the binomial estimator", listed(whole(1)))
    krylov: int = option(5, "order of the Krylov estimator", whole(1))
    windows: tuple[int, ...] = option((2, 5), "windows of multi-step estimation", listed(whole(1)))
    products: int = option(10, "products of conjugate gradients", whole(1))
    directions: int = option(2, "directions of the ES Jacobian", whole(1))
    seeds: int = option(3, "starts: other images and other wrong labels", whole(1))


def units(settings: Settings) -> list[Unit]:
    """The plain fits, the errors at the first step, and one per estimator; all that for every start."""
    work = settings.iterations * settings.steps

    def of_one_start() -> list[Unit]:
        return [
            Unit("baselines", partial(baselines, settings), 2.0 * settings.fit_steps, keys={"part": "baselines"}),
            Unit("errors", partial(measure, settings), 20.0 * settings.steps, keys={"part": "errors"}),
            *(
                Unit(
                    f"learn, {name}",
                    partial(learn, settings, name),
                    4.0 * work,
                    resumable=True,
                    keys={"part": "learn", "method": name},
                )
                for name, estimator in estimators(settings, Work(0)).items()
                if not isinstance(estimator, FirstOrder)
            ),
        ]

    return starts(settings.seeds, of_one_start)


def estimators(settings: Settings, work: Work) -> dict[str, Estimator]:
    """The estimators by name. First order is there for its error only: it does not reach what the loss reads."""
    source = work.generator("directions")
    solver = ConjugateGradient(max_iterations=settings.products, throw=False)
    return {
        "exact": Reverse("graph"),
        f"truncated {settings.truncated}": Truncated(settings.truncated, "graph"),
        **{f"binomial {order}": Binomial(order) for order in settings.orders},
        f"krylov {settings.krylov}": Krylov(settings.krylov),
        **{f"multi-step {window}": MultiStep(window, Reverse("graph")) for window in settings.windows},
        f"implicit, {settings.products} CG": Implicit(solver),
        f"ES Jacobian, Q={settings.directions}": ESJacobian(settings.directions, 0.01, "gaussian", generator=source),
        "first-order": FirstOrder(),
    }


def load(settings: Settings, work: Work) -> HyperCleaning:
    """The problem, the same for every unit.

    ``clusters`` are three blurred points in six dimensions, for tests.

    Raises:
        DataError: MNIST is not there.
    """
    generator = work.generator("problem")
    sizes = (settings.samples, settings.validation)
    if settings.problem == "mnist":
        return HyperCleaning.mnist(
            work.data_dir, generator=generator, samples=sizes[0], validation_samples=sizes[1], fraction=FRACTION
        )
    centres = torch.randn(3, 6, generator=generator)
    labels = [torch.randint(3, (size,), generator=generator) for size in (*sizes, 200)]
    inputs = [centres[chosen] + 0.5 * torch.randn(len(chosen), 6, generator=generator) for chosen in labels]
    noisy = redrawn(labels[0], 3, FRACTION, generator)
    logits = torch.zeros(sizes[0], requires_grad=True)
    sides = (inputs[1], labels[1], inputs[2], labels[2])
    return HyperCleaning(inputs[0], noisy, labels[0], *sides, classes=3, logits=logits)


def fitted_accuracy(settings: Settings, problem: HyperCleaning, weights: Tensor) -> float:
    """Test accuracy in per cent of a long fit from zero under fixed weights."""
    optimizer = diffopt.SGD(settings.lr, momentum=settings.momentum)
    with torch.no_grad():
        found = diffopt.solve(
            problem.weighted_loss, problem.start(), weights, optimizer=optimizer, steps=settings.fit_steps
        )
    return 100 * problem.accuracy(found.params)


def baselines(settings: Settings, work: Work) -> Row:
    """Plain fits: to the labels as they are, to the right ones only, and to the validation images alone."""
    problem = load(settings, work)
    checked = problem.validation_labels
    alone = replace(
        problem,
        inputs=problem.validation_inputs,
        labels=checked,
        true_labels=checked,
        logits=torch.zeros(len(checked), requires_grad=True),
    )
    return {
        "noisy": fitted_accuracy(settings, problem, torch.ones_like(problem.clean())),
        "oracle": fitted_accuracy(settings, problem, problem.clean()),
        "validation images only": fitted_accuracy(settings, alone, torch.ones(len(checked))),
        "wrong": float(1 - problem.clean().mean()),
    }


def outer_loss(
    settings: Settings, problem: HyperCleaning, logits: Tensor, estimator: Estimator
) -> tuple[Tensor, float]:
    """The loss on the validation set after the inner steps, and the test accuracy in per cent."""
    found = diffopt.solve(
        problem.loss,
        problem.start(),
        logits,
        optimizer=diffopt.SGD(settings.lr, momentum=settings.momentum),
        steps=settings.steps,
        estimator=estimator,
    )
    return problem.outer_loss(found.params), 100 * problem.accuracy(found.params)


def measure(settings: Settings, work: Work) -> Row:
    """Error, cosine, cost and memory of every estimator's first hypergradient, and ``T * lr * curvature``."""
    problem, chosen = load(settings, work), estimators(settings, work)
    compared = diffopt.compare(
        lambda estimator: outer_loss(settings, problem, problem.logits, estimator)[0], list(chosen.values()), repeats=1
    )
    kept = ("relative_error", "cosine", "gradients", "products", "depth", "megabytes")
    rows = zip(chosen, compared.complete(), strict=True)
    table = {name: {key: getattr(row, key) for key in kept} for name, row in rows}
    return {"rules": table, "curvature": compared.curvature, "hyperparameters": problem.logits.numel()}


def learn(settings: Settings, name: str, work: Work) -> Row:
    """Learn the weights by one estimator; all start from one half.

    Returns:
        The outer losses, test accuracies and F1 scores over the iterations (each before its step) and the processor
        seconds; accuracy of the long fit, F1 and the share of labels told right from wrong in the end.
    """
    problem = load(settings, work)
    estimator, logits = estimators(settings, work)[name], problem.logits
    outer = torch.optim.Adam([logits], lr=settings.outer_lr)
    generators = (
        {"directions": estimator.generator} if isinstance(estimator, ESJacobian) and estimator.generator else {}
    )
    curves: dict[str, list[float]] = {"accuracy": [], "f1": []}

    def iterate(iteration: int) -> float:
        loss, accuracy = outer_loss(settings, problem, logits, estimator)
        curves["accuracy"].append(accuracy)
        curves["f1"].append(problem.f1(logits))
        torch.autograd.backward(loss)
        return loss.item()

    try:
        losses, seconds = train(
            work, {"logits": logits}, outer, generators, settings.iterations, iterate, curves=curves
        )
    except FAILED as error:
        return {"diverged": type(error).__name__}
    began = time.process_time()
    accuracy = fitted_accuracy(settings, problem, logits.detach().sigmoid())
    told = ((logits.detach() >= 0) == problem.clean().bool()).float().mean()
    final = {"accuracy": accuracy, "f1": problem.f1(logits), "told": float(told)}
    return {"losses": losses, "seconds": seconds, **curves, "final": final, "fit": time.process_time() - began}


EXPERIMENT = described(
    "hyper-cleaning",
    quick=Settings(
        "clusters", 60, 60, 6, 0.2, 0.5, iterations=4, fit_steps=20, truncated=2, krylov=2, products=3, seeds=2
    ),
    standard=Settings(),
    full=Settings(steps=200, iterations=100, outer_lr=0.2, truncated=40, products=40, directions=100),
    units=units,
    summary=summary,
    pictures=pictures,
)
