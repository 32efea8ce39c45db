"""``datamodeling_score``: whether attributions predict what training without some of the examples does."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffopt.errors import EstimateWarning, GradModeError, HyperparameterError, LossError
from diffopt.retraining.file import RetrainingFile, fingerprint
from diffopt.retraining.score import DatamodelingScore, check_scores, check_tensor, noise_beside, scored
from diffopt.retraining.trainings import finite, measure, random_subsets, retrain
from diffopt.tensors import transforms
from diffopt.tensors.arguments import check_function, check_instance, check_integer, check_number

NOISE = 0.1
"""Of what leaving examples out changes: two trainings with all examples that differ by more are warned of."""


def datamodeling_score(
    train: Callable[[Tensor], Any],
    metric: Callable[[Any], Tensor],
    weights: Tensor,
    scores: Tensor,
    *,
    fraction: float = 0.01,
    subsets: int = 100,
    seed: int = 0,
    confidence: float = 0.95,
    executor: Executor | None = None,
    path: str | os.PathLike[str] | None = None,
    on_retraining: Callable[[int, int], Any] | None = None,
) -> DatamodelingScore:
    r"""The linear datamodeling score: how well attributions predict training without some of the examples.

    .. math:: \frac1m \sum_j \mathrm{Spearman}_S\Big(-\!\sum_{i\in S} a_{ji} w_i,\;
              M_j(s_{T+1}(w \odot 1_{\bar S})) - M_j(s_{T+1}(w))\Big)

    over random subsets ``S`` of a ``fraction`` of the examples, whose weights are zero in a training of their own. 1:
    the order of all changes is predicted; 0: nothing is. Cost: ``subsets + 2`` trainings without a backward pass, two
    of them with all examples, one of which ``executor`` runs: their difference is the noise of the training. Memory:
    one training, in each process.

    The training has to be the same each time but for the weights: one initialisation, one order of batches (index the
    weights by the batch; leave no example out of the data). Where two trainings differ by themselves, no score can be
    high.

    Args:
        train: as in :func:`diffopt.attribute`; or any training that reads weights, differentiable or not.
        metric: as in :func:`diffopt.attribute`.
        weights: as in :func:`diffopt.attribute`; leaving an example out makes its weight zero.
        scores: what :func:`diffopt.attribute` returns, or those of any method: larger means that more weight increases
            the metric. Shape ``metric.shape + weights.shape``.
        fraction: of the examples to leave out, between 0 and 1; at least one is.
        subsets: how many, 3 or more.
        seed: of the subsets and of the interval; a call with more ``subsets`` begins with the same ones.
        confidence: of the interval, between 0 and 1.
        executor: runs the trainings in other processes, such as ``concurrent.futures.ProcessPoolExecutor`` or, for
            functions that cannot be pickled, that of ``loky``; in threads only if ``train`` draws none of torch's
            random numbers, of which threads have one sequence. ``None``: one after the other, here.
        path: a file that keeps what each training measured. A call that finds it goes on with it, to the same bits.
        on_retraining: ``on_retraining(done, subsets)`` after each training.

    Raises:
        LeafError: ``weights`` or ``scores`` is no finite floating tensor, or is empty.
        LossError: ``train`` or ``metric`` is no function, or the metric is no floating scalar or vector.
        ShapeError: ``scores`` has another shape than the metric and the weights.
        HyperparameterError: an option is out of its range, a file at ``path`` belongs to another call, or a metric is
            the same, or predicted to be the same, for all subsets.
        NonFiniteLossError: what is measured is NaN or infinite.
        RandomnessError: the training is not the one that the file at ``path`` was begun with.
        DisconnectedError: no training differs from that with all examples: it does not read the weights.
        GradModeError: called under a ``torch.func`` transform.

    Warns:
        EstimateWarning: two trainings with all examples differ by more than a tenth of what leaving some out changes.

    Example:
        The mean of four numbers; what each adds to it is linear in the weights, and so the score is 1.

        >>> import torch, diffopt
        >>> x = torch.tensor([1.0, 3.0, 4.0, 7.0])
        >>> train, metric = lambda w: (w * x).sum() / 4, lambda mean: mean
        >>> scores = diffopt.attribute(train, metric, torch.ones(4))
        >>> diffopt.datamodeling_score(train, metric, torch.ones(4), scores, fraction=0.5, subsets=8).score
        1.0

    Reference: Park, Georgiev, Ilyas, Leclerc and Madry (2023), "TRAK: Attributing Model Behavior at Scale"; with
    1 % left out, Ilyas and Engstrom (2025), "MAGIC: Near-Optimal Data Attribution for Deep Learning".
    """
    _check_call(train, metric, executor, on_retraining)
    check_tensor("weights", weights, "write torch.ones(n)")
    check_scores(scores, weights, None)
    fraction = check_number("datamodeling_score: fraction", fraction, 0, 1, above=True)
    confidence = check_number("datamodeling_score: confidence", confidence, 0, 1, above=True)
    subsets = check_integer("datamodeling_score: subsets", subsets, 3)
    seed = check_integer("datamodeling_score: seed", seed, 0)
    weights = weights.detach().clone()
    left_out = random_subsets(weights.numel(), _size(weights, fraction), subsets, seed)
    base = finite(measure(train, metric, weights), "with all examples")
    check_scores(scores, weights, base.shape)
    # where the others are: a module of another process may begin with other random numbers
    elsewhere = None if executor is None else executor.submit(measure, train, metric, weights)
    again = measure(train, metric, weights) if elsewhere is None else elsewhere.result()
    difference = (again - base).abs()
    known: dict[int, Tensor] = {}
    with ExitStack() as stack:
        file = None
        if path is not None:
            header = {"weights": fingerprint(weights), "size of the subsets": left_out.shape[1], "seed": seed}
            slack = 10 * float(difference.max())  # zero where the training is repeatable
            file = stack.enter_context(closing(RetrainingFile(Path(path), header, base, slack)))
            known = {number: found for number, found in file.known.items() if number < subsets}
        for number, found in retrain(train, metric, weights, left_out, known, executor):
            known[number] = found
            if file is not None:
                file.add(number, found)
            if on_retraining is not None:
                on_retraining(len(known), subsets)
    measured = torch.stack([known[number] - base for number in range(subsets)]).reshape(subsets, -1)
    noise = noise_beside(difference.reshape(-1), measured)
    _warn_of(noise)
    return scored(scores, measured, left_out, noise, weights, confidence, seed)


def _check_call(train: Any, metric: Any, executor: Any, on_retraining: Any) -> None:
    if transforms.transforms_active():
        got, fix = "datamodeling_score was called under a torch.func transform", "it measures numbers; call it outside"
        raise GradModeError(got, "plain code", fix)
    check_function("datamodeling_score: train", train, "a function train(weights)", LossError)
    check_function("datamodeling_score: metric", metric, "a function of what train returns", LossError)
    fix = "make one: concurrent.futures.ProcessPoolExecutor(4)"
    text = "a concurrent.futures.Executor"
    check_instance("datamodeling_score: executor", executor, Executor, text, also=(None,), fix=fix)
    if on_retraining is not None:
        check_function("datamodeling_score: on_retraining", on_retraining, "a function (done, subsets)", LossError)


def _size(weights: Tensor, fraction: float) -> int:
    """How many examples a subset has: at least one, and not all."""
    size = max(1, round(fraction * weights.numel()))
    if size >= weights.numel():
        raise HyperparameterError(
            f"datamodeling_score: fraction {fraction:g} of {weights.numel()} examples is {size}",
            "one to all but one",
            "take more examples, or a smaller fraction",
        )
    return size


def _warn_of(noise: float) -> None:
    if noise > NOISE:
        warnings.warn(
            f"datamodeling_score: two trainings with all examples differ by {noise:.2g} of what leaving examples out "
            "changes; make the training the same each time (seeds of the initialisation, the batches and dropout; "
            "deterministic operations), or leave more out: no score can be high beside such noise",
            EstimateWarning,
            stacklevel=3,
        )
