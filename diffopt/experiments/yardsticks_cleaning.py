r"""MNIST data cleaning as benchmark_bilevel defines it: linear softmax without a bias, ridge, labels redrawn.

.. math:: \min_x\ \frac1m\sum_j \ell(z^\top v_j, y'_j),\qquad
          z = \arg\min_z\ \frac1n\sum_i \sigma(x_i)\,\ell(z^\top u_i, y_i) + 0.2\,\lVert z\rVert^2

20,000 training images, each label redrawn with a probability of 0.5, 0.7 or 0.9, 5,000 validation images with right
labels; the images are standardised; ``x`` starts at -2 and ``z`` at 0.

Reference: Dagreou, Ablin, Vaiter and Moreau (2022), "A Framework for Bilevel Optimization that Enables Stochastic and
Global Variance Reduction Algorithms", and the code of benchmark_bilevel.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import diffopt
from diffopt.estimators import Binomial, ESJacobian, Estimator, FirstOrder, Implicit, Krylov, MultiStep, Reverse
from diffopt.estimators import Truncated as TruncatedRule
from diffopt.experiments.framework.experiment import Row
from diffopt.experiments.framework.outer_loop import FAILED, train
from diffopt.experiments.framework.unit_context import Work
from diffopt.linear_solve import ConjugateGradient, Neumann, Nystrom
from diffopt.tasks import HyperCleaning
from diffopt.tasks.hyper_cleaning import redrawn

RIDGE, START = 0.2, -2.0


@final
@dataclass(frozen=True)
class Inner:
    """How the inner problem is solved: full gradient descent from zero.

    Attributes:
        steps: under an estimator.
        lr: the step size.
        fit_steps: where the solution itself is wanted.
    """

    steps: int
    lr: float
    fit_steps: int


@final
@dataclass(frozen=True, eq=False)
class Cleaning:
    """The data, standardised by the training images."""

    inputs: Tensor
    labels: Tensor
    clean: Tensor
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int

    def start(self) -> Tensor:
        """``z`` at zero, ``[features, classes]``."""
        return self.inputs.new_zeros(self.inputs.shape[1], self.classes)

    def weighted_loss(self, z: Tensor, weights: Tensor) -> Tensor:
        """The inner loss under given weights."""
        each = cross_entropy(self.inputs @ z, self.labels, reduction="none")
        return (weights * each).mean() + RIDGE * z.square().sum()

    def loss(self, z: Tensor, x: Tensor) -> Tensor:
        """The inner loss."""
        return self.weighted_loss(z, x.sigmoid())

    def outer_loss(self, z: Tensor) -> Tensor:
        """On the validation images."""
        return cross_entropy(self.validation[0] @ z, self.validation[1])

    def test_error(self, z: Tensor) -> float:
        """In per cent."""
        with torch.no_grad():
            return 100 * float(((self.test[0] @ z).argmax(1) != self.test[1]).float().mean())

    def told_apart(self, x: Tensor) -> float:
        """The probability that a right label weighs more than a wrong one (area under the curve; ties count half)."""
        right, wrong = x.detach()[self.clean], x.detach()[~self.clean].sort().values
        below, up_to = (torch.searchsorted(wrong, right, right=side).double() for side in (False, True))
        return float((below + up_to).mean() / 2 / len(wrong)) if len(wrong) and len(right) else 0.5


def load(problem: str, sizes: tuple[int, int], corruption: float, seed: int, work: Work) -> Cleaning:
    """MNIST, or three blurred points in six dimensions for tests; the same images of a seed at every corruption.

    Raises:
        DataError: MNIST is not there.
    """
    images, generator = work.generator(f"images {seed}"), work.generator(f"labels {corruption:g} {seed}")
    if problem == "mnist":
        samples, checked = sizes
        data = HyperCleaning.mnist(
            work.data_dir, generator=images, samples=samples, validation_samples=checked, fraction=0.0
        )
        pairs = [
            (data.inputs, data.true_labels),
            (data.validation_inputs, data.validation_labels),
            (data.test_inputs, data.test_labels),
        ]
    else:
        centres = torch.randn(3, 6, generator=images)
        labels = [torch.randint(3, (size,), generator=images) for size in (*sizes, 200)]
        pairs = [(centres[y] + 0.7 * torch.randn(len(y), 6, generator=images), y) for y in labels]
    classes = 10 if problem == "mnist" else 3
    mean, deviation = pairs[0][0].mean(0), pairs[0][0].std(0, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1)  # pixels that are the same everywhere
    inputs, validation, test = (((u - mean) / deviation, y) for u, y in pairs)
    noisy = redrawn(inputs[1], classes, corruption, generator)
    return Cleaning(inputs[0], noisy, noisy == inputs[1], validation, test, classes)


def estimators(inner: Inner, source: torch.Generator) -> dict[str, Estimator]:
    """The estimators by their names. Of the last two only the first hypergradient is shown."""
    series: list[tuple[str, Callable[[int], Estimator], int]] = [
        ("truncated", lambda kept: TruncatedRule(kept, "graph"), 3),
        ("binomial", Binomial, 2),
        ("krylov", Krylov, 3),
        ("multi-step", lambda window: MultiStep(window, Reverse("graph")), 2),
    ]
    found: dict[str, Estimator] = {"exact": Reverse("graph")}
    found |= {f"{kind} {min(n, inner.steps)}": make(min(n, inner.steps)) for kind, make, n in series}
    found["implicit, 5 CG"] = Implicit(ConjugateGradient(5, 0.0, throw=False))
    found["implicit, 5 Neumann"] = Implicit(Neumann(5, 1.0, None, throw=False))
    # the ridge's share of I - J is lr * 2 * 0.2 times the identity: that is the damping, the columns are the rest
    found["implicit, Nystrom 10"] = Implicit(Nystrom(10, 2 * RIDGE * inner.lr, throw=False))
    found["ES Jacobian, Q=2"] = ESJacobian(2, 0.01, "gaussian", generator=source)
    found["first-order"] = FirstOrder()
    return found


LEARNED = ("exact", "truncated", "binomial", "krylov", "multi-step", "implicit", "ES Jacobian")
"""First order is left out: it does not reach what the inner loss reads."""


def learned(inner: Inner) -> list[str]:
    """The names of the estimators that learn weights."""
    return [name for name in estimators(inner, torch.Generator()) if name.startswith(LEARNED)]


def after_steps(data: Cleaning, x: Tensor, inner: Inner, estimator: Estimator) -> Tensor:
    """``z`` after the inner steps, differentiable by an estimator."""
    optimizer = diffopt.SGD(inner.lr)
    return diffopt.solve(data.loss, data.start(), x, optimizer=optimizer, steps=inner.steps, estimator=estimator).params


def fitted(data: Cleaning, weights: Tensor, inner: Inner) -> Tensor:
    """The solution itself under fixed weights."""
    optimizer = diffopt.SGD(inner.lr)
    with torch.no_grad():
        return diffopt.solve(
            data.weighted_loss, data.start(), weights, optimizer=optimizer, steps=inner.fit_steps
        ).params


def baselines(data: Cleaning, inner: Inner) -> Row:
    """Test errors in per cent of plain fits, with weights of one and of the start, and of the right labels alone."""
    ones = torch.ones(len(data.labels))
    weights = {"noisy": ones, "start": ones * torch.tensor(START).sigmoid(), "oracle": data.clean.float()}
    found = {name: data.test_error(fitted(data, each, inner)) for name, each in weights.items()}
    return {**found, "wrong": float((~data.clean).float().mean())}


def first_hypergradients(data: Cleaning, inner: Inner, work: Work) -> Row:
    """Every estimator's first hypergradient beside that of the bilevel problem: its relative error and cosine.

    The latter is the implicit one at the solution, by conjugate gradients until they have converged.
    """
    x = torch.full((len(data.labels),), START, requires_grad=True)
    at = fitted(data, x.detach().sigmoid(), inner)
    point = diffopt.implicit(data.loss, at, x, solver=ConjugateGradient(200, 1e-5))
    true = torch.autograd.grad(data.outer_loss(point), x)[0]
    found = {}
    for name, estimator in estimators(inner, work.generator("directions")).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", diffopt.EstimateWarning)
            z = after_steps(data, x, inner, estimator)
            ours = torch.autograd.grad(data.outer_loss(z), x)[0]
        cosine = torch.cosine_similarity(ours, true, dim=0) if ours.any() else torch.zeros(())
        found[name] = [float((ours - true).norm() / true.norm()), float(cosine)]
    return found


def learn(data: Cleaning, name: str, inner: Inner, iterations: int, lr: float, work: Work) -> Row:
    """Learn the weights by one estimator and Adam.

    Returns:
        The outer losses over the iterations, and the processor seconds; in the end, the test error in per cent of the
        solution under the learned weights, and how well these tell right labels from wrong ones.
    """
    source = work.generator("directions")
    estimator, x = estimators(inner, source)[name], torch.full((len(data.labels),), START, requires_grad=True)
    outer = torch.optim.Adam([x], lr=lr)

    def iterate(iteration: int) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", diffopt.EstimateWarning)
            loss = data.outer_loss(after_steps(data, x, inner, estimator))
            torch.autograd.backward(loss)
        return loss.item()

    began = time.process_time()
    try:
        losses, seconds = train(work, {"x": x}, outer, {"directions": source}, iterations, iterate)
        error = data.test_error(fitted(data, x.detach().sigmoid(), inner))
    except FAILED as failed:
        return {"diverged": type(failed).__name__, "seconds": time.process_time() - began}
    return {"losses": losses, "seconds": seconds, "test error": error, "told apart": data.told_apart(x)}
