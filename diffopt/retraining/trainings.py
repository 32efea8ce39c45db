"""Training again without some of the examples: which are left out, what is measured then, and what was predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, as_completed
from typing import Any

import torch
from torch import Tensor

from diffopt.errors import NonFiniteLossError
from diffopt.tensors.arguments import check_measured
from diffopt.tensors.leaves import all_finite

Train = Callable[[Tensor], Any]
Metric = Callable[[Any], Tensor]


def random_subsets(examples: int, size: int, count: int, seed: int) -> Tensor:
    """``count`` sets of ``size`` different examples, ``[count, size]``; more of them begin with the same ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(examples, generator=generator)[:size].sort().values for _ in range(count)])


def without(weights: Tensor, left_out: Tensor) -> Tensor:
    """A copy of ``weights`` that is zero at these places of ``weights.flatten()``."""
    return weights.detach().flatten().index_fill(0, left_out.to(weights.device), 0).reshape(weights.shape)


def measure(train: Train, metric: Metric, weights: Tensor) -> Tensor:
    """What ``metric`` says of a training with these weights: a scalar or ``[m]``, in double precision on the CPU.

    Raises:
        LossError: it is neither.
    """
    found = check_measured("datamodeling_score: metric", metric(train(weights.detach().clone())))
    return found.detach().to("cpu", torch.float64)


def retrain(
    train: Train,
    metric: Metric,
    weights: Tensor,
    left_out: Iterable[Tensor],
    known: Mapping[int, Tensor],
    executor: Executor | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Train without each set of examples that is not ``known`` by its number; yields the number and what is measured.

    Raises:
        NonFiniteLossError: what is measured is NaN or infinite.
    """
    wanted = [(number, chosen) for number, chosen in enumerate(left_out) if number not in known]
    if executor is None:
        for number, chosen in wanted:
            yield number, finite(measure(train, metric, without(weights, chosen)), f"without subset {number}")
        return
    futures = {executor.submit(measure, train, metric, without(weights, chosen)): number for number, chosen in wanted}
    try:
        for future in as_completed(futures):
            yield futures[future], finite(future.result(), f"without subset {futures[future]}")
    finally:  # one has failed, or the caller has stopped: what has not begun is not begun
        for future in futures:
            future.cancel()


def finite(measured: Tensor, which: str) -> Tensor:
    """Refuse what is NaN or infinite."""
    if not all_finite([measured]):
        raise NonFiniteLossError(
            f"datamodeling_score: the metric of the training {which} is NaN or infinite",
            "finite numbers",
            "look at that training, or take a metric that is defined for it",
        )
    return measured


def predictions(scores: Tensor, weights: Tensor, left_out: Iterable[Tensor]) -> Tensor:
    """The changes of the metrics that ``scores`` predict where these examples are left out, ``[subsets, m]``."""
    effects = (scores.detach() * weights.to(scores)).reshape(-1, weights.numel()).to("cpu", torch.float64)
    return torch.stack([-effects[:, chosen].sum(1) for chosen in left_out])
