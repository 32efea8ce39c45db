"""``diffopt.attribute``: beside closed forms, loops and retraining; many metrics in one replay; refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import diffopt
from diffopt import DisconnectedError, GradModeError, LeafError, LossError, NonFiniteGradientError
from diffopt.estimators import Binomial, Implicit, Krylov, Reverse, Truncated, Unrolled

pytestmark = pytest.mark.usefixtures("float64_by_default")
SAMPLES, FEATURES = 7, 3


class Ridge:
    """Ridge regression with a weight for each sample, whose minimiser is known."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(SAMPLES, FEATURES, generator=generator)
        self.y = torch.randn(SAMPLES, generator=generator)
        self.queries = torch.randn(4, FEATURES, generator=generator)

    def loss(self, p, weights, x, y):
        return (weights * (x @ p - y).square()).sum() / 2 + p.square().sum() / 2

    def trained(self, weights: Tensor, steps: int = 400, estimator=None) -> Tensor:
        optimizer, start = diffopt.SGD(0.08), torch.zeros(FEATURES)
        options = {"optimizer": optimizer, "steps": steps, "estimator": estimator}
        return diffopt.solve(self.loss, start, weights, self.x, self.y, **options).params

    def minimiser(self, weights: Tensor) -> Tensor:
        curvature = self.x.T @ (weights[:, None] * self.x) + torch.eye(FEATURES)
        return torch.linalg.solve(curvature, self.x.T @ (weights * self.y))

    def derivative(self) -> Tensor:
        """Of the minimiser with respect to the weights, ``-H^-1 x_i (x_i p - y_i)``: ``[FEATURES, SAMPLES]``."""
        p = self.minimiser(torch.ones(SAMPLES))
        curvature = self.x.T @ self.x + torch.eye(FEATURES)
        return -torch.linalg.solve(curvature, self.x.T * (self.x @ p - self.y))

    def predicted(self, p: Tensor) -> Tensor:
        return (self.queries @ p).square()


METRICS = {
    "a scalar": lambda ridge: lambda p: ridge.predicted(p).sum(),
    "a vector": lambda ridge: ridge.predicted,
    "a vector of one": lambda ridge: lambda p: ridge.predicted(p)[:1],
    "the params": lambda ridge: lambda p: p,
}


@pytest.mark.parametrize("estimator", [None, Reverse("sqrt"), Implicit()], ids=str)
@pytest.mark.parametrize("name", METRICS)
def test_ridge_regression_is_as_in_the_closed_form(name, estimator):
    ridge, ones = Ridge(), torch.ones(SAMPLES)
    metric = METRICS[name](ridge)
    found = diffopt.attribute(lambda w: ridge.trained(w, estimator=estimator), metric, ones)
    at = ridge.minimiser(ones)
    slope = torch.autograd.functional.jacobian(metric, at)
    assert found.shape == (*metric(at).shape, SAMPLES)
    assert not found.requires_grad
    torch.testing.assert_close(found, slope @ ridge.derivative(), rtol=1e-7, atol=1e-7)


def test_it_predicts_what_leaving_a_little_of_a_sample_out_does():
    ridge, ones, little = Ridge(), torch.ones(SAMPLES), 1e-5
    found = diffopt.attribute(ridge.trained, ridge.predicted, ones)
    for i in range(SAMPLES):
        less = ones.clone()
        less[i] -= little
        change = ridge.predicted(ridge.minimiser(less)) - ridge.predicted(ridge.minimiser(ones))
        torch.testing.assert_close(-found[:, i] * little, change, rtol=1e-3, atol=1e-12)


ESTIMATORS = [Reverse("graph"), Reverse(1), Reverse("sqrt"), Truncated(3), Unrolled(), Binomial(3), Krylov(2)]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize("shape", [(SAMPLES,), (SAMPLES, 1), ()], ids=str)
def test_many_metrics_are_a_loop_over_them(estimator, shape):
    ridge = Ridge()

    def train(weights):
        return ridge.trained(weights.reshape(-1).expand(SAMPLES), 6, estimator)

    weights = torch.full(shape, 0.8)
    found = diffopt.attribute(train, ridge.predicted, weights)
    rows = [diffopt.attribute(train, lambda p, j=j: ridge.predicted(p)[j], weights) for j in range(4)]
    assert found.shape == (4, *shape)
    torch.testing.assert_close(found, torch.stack(rows), rtol=1e-12, atol=1e-12)


def test_the_weights_of_batches_are_indexed_by_the_batch():
    ridge = Ridge()
    data = torch.utils.data.TensorDataset(ridge.x, ridge.y, torch.arange(SAMPLES))
    batches = diffopt.Batches(data, 2)

    def loss(p, weights, batch):
        x, y, index = batch
        return ridge.loss(p, weights[index], x, y)

    def train(weights):
        options = {"optimizer": diffopt.SGD(0.1), "steps": 5, "batches": batches}
        return diffopt.solve(loss, torch.zeros(FEATURES), weights, **options).params

    def by_hand(weights):
        p = torch.zeros(FEATURES, requires_grad=True)
        for step in range(5):
            p = p - 0.1 * torch.autograd.grad(loss(p, weights, batches(step)), p, create_graph=True)[0]
        return ridge.predicted(p)

    ones = torch.ones(SAMPLES, requires_grad=True)
    values = by_hand(ones)
    expected = torch.stack([torch.autograd.grad(x, ones, retain_graph=True)[0] for x in values])
    torch.testing.assert_close(diffopt.attribute(train, ridge.predicted, ones), expected, rtol=1e-12, atol=1e-12)


def test_a_large_problem_takes_its_steps_again_once_for_all_metrics():
    size, calls = 2**15, []

    def loss(p, weights, x):
        calls.append(1)
        return ((p - x) * weights.repeat_interleave(size // 4)).square().sum() / 2

    def train(weights):
        x = torch.linspace(0, 1, size)
        options = {"optimizer": diffopt.SGD(0.1), "steps": 3, "estimator": Reverse(1)}
        return diffopt.solve(loss, torch.zeros(size), weights, x, **options).params

    diffopt.attribute(train, lambda p: p[:: size // 10], torch.ones(4))
    assert len(calls) == 6


def test_a_loss_that_draws_is_pulled_back_metric_by_metric():
    ridge = Ridge()

    def loss(p, weights):
        return ridge.loss(torch.nn.functional.dropout(p, 0.4), weights, ridge.x, ridge.y)

    def train(weights):
        torch.manual_seed(3)
        return diffopt.solve(loss, torch.ones(FEATURES), weights, optimizer=diffopt.SGD(0.05), steps=4).params

    ones = torch.ones(SAMPLES)
    rows = [diffopt.attribute(train, lambda p, j=j: ridge.predicted(p)[j], ones) for j in range(4)]
    torch.testing.assert_close(
        diffopt.attribute(train, ridge.predicted, ones), torch.stack(rows), rtol=1e-12, atol=1e-12
    )


def test_grad_modes_and_what_is_given_are_left_alone():
    ridge = Ridge()
    weights = torch.ones(SAMPLES, requires_grad=True)
    with torch.no_grad():
        found = diffopt.attribute(lambda w: ridge.trained(w, 3), ridge.predicted, weights)
    assert weights.grad is None
    torch.testing.assert_close(found, diffopt.attribute(lambda w: ridge.trained(w, 3), ridge.predicted, weights))


ONES = torch.ones(SAMPLES)
BAD = {
    "integers": (lambda t, m: diffopt.attribute(t, m, torch.ones(7, dtype=torch.int64)), LeafError, "floating tensor"),
    "a list": (lambda t, m: diffopt.attribute(t, m, [1.0] * 7), LeafError, r"torch\.ones\(n\)"),
    "no weight": (lambda t, m: diffopt.attribute(t, m, torch.ones(0)), LeafError, "weights is"),
    "no training": (lambda t, m: diffopt.attribute(None, m, ONES), LossError, "attribute: train"),
    "no metric": (lambda t, m: diffopt.attribute(t, 3.0, ONES), LossError, "attribute: metric"),
    "a matrix": (lambda t, m: diffopt.attribute(t, lambda p: p[:, None] * p, ONES), LossError, "flatten it"),
    "a number": (lambda t, m: diffopt.attribute(t, lambda p: p.sum().item(), ONES), LossError, "keep it a tensor"),
    "no number": (lambda t, m: diffopt.attribute(t, lambda p: p[:0], ONES), LossError, "a vector.*measure something"),
    "two numbers": (lambda t, m: diffopt.attribute(t, lambda p: (p[0], p[1]), ONES), LossError, "with torch.stack"),
    "a constant": (lambda t, m: diffopt.attribute(t, lambda p: p.detach(), ONES), DisconnectedError, "solution.params"),
    "other weights": (
        lambda t, m: diffopt.attribute(lambda w: t(ONES.clone().requires_grad_()), m, ONES),
        DisconnectedError,
        "does not depend on weights",
    ),
    "other weights, one metric": (
        lambda t, m: diffopt.attribute(lambda w: t(ONES.clone().requires_grad_()), lambda p: m(p).sum(), ONES),
        DisconnectedError,
        "does not depend on weights",
    ),
    "a root at zero": (
        lambda t, m: diffopt.attribute(t, lambda p: (p - p.detach()).abs().sqrt(), ONES),
        NonFiniteGradientError,
        "NaN or infinite",
    ),
    "a transform": (
        lambda t, m: torch.func.grad(lambda w: diffopt.attribute(t, m, w).sum())(ONES),
        GradModeError,
        "call it outside",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_attributed_is_refused(name):
    call, kind, message = BAD[name]
    ridge = Ridge()
    with pytest.raises(kind, match=message):
        call(lambda w: ridge.trained(w, 3), ridge.predicted)
