"""A small real problem without a download: one penalty per feature of a logistic regression on breast-cancer data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from sklearn.datasets import load_breast_cancer  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn.functional import softplus

import diffopt
from diffopt.estimators import Estimator

STEPS, LR, MOMENTUM = 200, 0.1, 0.9


@final
@dataclass(frozen=True, eq=False)
class Penalties:
    """Logistic regression with one penalty per feature, judged on validation data.

    Inner loss ``mean softplus(-y X w) + sum_j exp(p_j) w_j^2`` with ``y`` in ``{-1, 1}``, minimised by ``STEPS`` steps
    of SGD with momentum from ``start``; outer loss the first term on validation data. Hyperparameters: ``p``.

    Attributes:
        inputs: ``[samples, features]``, float64, standardised.
        targets: ``[samples]``, -1 or 1.
        validation_inputs: ``[validation samples, features]``.
        validation_targets: ``[validation samples]``.
        start: the initial weights, ``[features]``.
        log_penalty: where hypergradients are compared, ``[features]``; requires grad.
    """

    inputs: Tensor
    targets: Tensor
    validation_inputs: Tensor
    validation_targets: Tensor
    start: Tensor
    log_penalty: Tensor

    @classmethod
    def breast_cancer(cls) -> Penalties:
        """The 569 tumours of the data set that scikit-learn bundles, half of them for validation."""
        features, labels = load_breast_cancer(return_X_y=True)
        generator = torch.Generator().manual_seed(0)
        inputs, targets = torch.from_numpy(features), 2.0 * torch.from_numpy(labels) - 1
        inputs = (inputs - inputs.mean(0)) / inputs.std(0)
        order = torch.randperm(len(inputs), generator=generator)
        train, validation = order.chunk(2)
        # Not zeros: an estimator that is wrong only where weights differ from zero must show.
        start = 0.1 * torch.randn(inputs.shape[1], generator=generator, dtype=inputs.dtype)
        log_penalty = torch.full_like(start, -5.0).requires_grad_()
        return cls(inputs[train], targets[train], inputs[validation], targets[validation], start, log_penalty)

    def loss(self, weights: Tensor, log_penalty: Tensor) -> Tensor:
        """The inner loss."""
        misfit = softplus(-self.targets * (self.inputs @ weights)).mean()
        return misfit + (log_penalty.exp() * weights.square()).sum()

    def outer_loss(self, weights: Tensor) -> Tensor:
        """The outer loss."""
        return softplus(-self.validation_targets * (self.validation_inputs @ weights)).mean()

    def compare_loss(self, estimator: Estimator) -> Tensor:
        """The outer loss at penalties of ``exp(-5)``, for :func:`diffopt.compare`."""
        optimizer = diffopt.SGD(lr=LR, momentum=MOMENTUM)
        penalties = self.log_penalty
        solution = diffopt.solve(
            self.loss, self.start, penalties, optimizer=optimizer, steps=STEPS, estimator=estimator
        )
        return self.outer_loss(solution.params)
