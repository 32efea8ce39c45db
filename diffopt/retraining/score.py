"""The linear datamodeling score as an object: what was predicted, what was measured, and how well they agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from diffopt.errors import DisconnectedError, HyperparameterError, LeafError, ShapeError
from diffopt.retraining.rank_correlation import score_and_interval
from diffopt.retraining.trainings import predictions
from diffopt.tensors.leaves import all_finite
from diffopt.tensors.tree import describe


@final
@dataclass(frozen=True, eq=False)
class DatamodelingScore:
    """What :func:`diffopt.datamodeling_score` found, and the trainings behind it.

    Attributes:
        score: the mean of ``per_metric``.
        interval: of ``score``: as wide as the percentile interval where the subsets are drawn again 2,000 times, with
            replacement, around the score. The metrics are taken as given.
        per_metric: ``[m]``, Spearman's correlation of predicted and measured changes over the subsets.
        predicted: ``[subsets, m]``, changes of the metrics by the scores.
        measured: ``[subsets, m]``, changes of the metrics by training again.
        left_out: ``[subsets, k]``, the places in ``weights.flatten()`` that each training lacks.
        noise: how far two trainings with all examples are apart beside the spread of ``measured``, the worst metric's.
        weights: as given.
        confidence: of ``interval``, as given.
        seed: as given.
    """

    score: float
    interval: tuple[float, float]
    per_metric: Tensor
    predicted: Tensor
    measured: Tensor
    left_out: Tensor
    noise: float
    weights: Tensor
    confidence: float
    seed: int

    def of(self, scores: Tensor) -> DatamodelingScore:
        """The same trainings beside other scores, such as those of another method; nothing is trained.

        Raises:
            LeafError: ``scores`` is no finite floating tensor.
            ShapeError: ``scores`` has another shape than the metric and the weights.
            HyperparameterError: a metric is predicted to change alike for all subsets.
        """
        check_scores(scores, self.weights, None)
        metrics = self.measured.shape[1]
        if scores.ndim > self.weights.ndim or metrics > 1:
            check_scores(scores, self.weights, (metrics,))
        return scored(scores, self.measured, self.left_out, self.noise, self.weights, self.confidence, self.seed)

    def __str__(self) -> str:
        """One line."""
        (subsets, size), metrics = self.left_out.shape, len(self.per_metric)
        low, high = self.interval
        share = f"{100 * self.confidence:g} % interval"
        return (
            f"linear datamodeling score {self.score:.3f} ({share} {low:.3f} to {high:.3f}): "
            f"{subsets} trainings without {size} of {self.weights.numel()}, {metrics} metric{'s' * (metrics > 1)}"
        )


def scored(
    scores: Tensor, measured: Tensor, left_out: Tensor, noise: float, weights: Tensor, confidence: float, seed: int
) -> DatamodelingScore:
    """The result for these scores and trainings."""
    predicted = predictions(scores, weights, left_out)
    _refuse_alike("measured", measured)
    _refuse_alike("predicted", predicted)
    per_metric, score, ends = score_and_interval(predicted, measured, confidence, seed)
    return DatamodelingScore(score, ends, per_metric, predicted, measured, left_out, noise, weights, confidence, seed)


def noise_beside(difference: Tensor, measured: Tensor) -> float:
    """How far two equal trainings are apart beside the spread of the changes; the worst metric's.

    Raises:
        DisconnectedError: nothing has changed.
    """
    if not measured.any():
        raise DisconnectedError(
            "datamodeling_score: no training differs from that with all examples",
            "one that reads the weights",
            "use them in the loss that train minimises, indexed by the batch",
        )
    return float(torch.where(difference > 0, difference / measured.std(0), 0).max())


def check_tensor(name: str, value: Any, fix: str) -> None:
    """Refuse what is not a finite floating tensor that holds something."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
        raise LeafError(f"datamodeling_score: {name} is {describe(value)}", "a floating tensor", fix)
    if not all_finite([value]):
        raise LeafError(f"datamodeling_score: {name} holds NaN or infinite numbers", "finite ones", "check it")


def check_scores(scores: Any, weights: Tensor, metric: Sequence[int] | None) -> None:
    """Refuse scores of another shape than that of the metric, where it is known, and of the weights."""
    check_tensor("scores", scores, "pass what diffopt.attribute returns")
    own = tuple(scores.shape[: max(scores.ndim - weights.ndim, 0)])
    if scores.shape[len(own) :] != weights.shape or len(own) > 1 or (metric is not None and own != tuple(metric)):
        known = "metric.shape" if metric is None else f"{tuple(metric)}"
        raise ShapeError(
            f"datamodeling_score: scores has the shape {tuple(scores.shape)}",
            f"{known} + {tuple(weights.shape)}, a score for each metric and weight",
            "pass what diffopt.attribute returns for the same metric and weights",
        )


def _refuse_alike(kind: str, changes: Tensor) -> None:
    alike = (changes == changes[:1]).all(0)
    if alike.any():
        raise HyperparameterError(
            f"datamodeling_score: the {kind} change of metric {int(alike.nonzero()[0])} is "
            f"{float(changes[0, alike][0]):g} for every subset",
            "changes that can be ordered",
            "leave that metric out, or take a smooth one (a loss, not an accuracy), a larger fraction or more subsets",
        )
