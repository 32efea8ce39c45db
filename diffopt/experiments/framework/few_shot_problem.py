"""Few-shot problems as a meta-training loop sees them, one step of MAML on them, and their evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, final

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (its usual name)

import diffopt
from diffopt.estimators import Estimator
from diffopt.experiments.framework import image_sets
from diffopt.experiments.framework.image_sets import Images
from diffopt.experiments.framework.ranks import ALONE, Ranks
from diffopt.tasks import MLP, Episodes, Omniglot, RaggedImages, Sinusoid, functional, sample_episodes

Params: TypeAlias = dict[str, Tensor]
EVALUATION_SEED = 20_000
"""Every run is evaluated on the same episodes, whatever its own seed."""


@final
@dataclass(frozen=True)
class FewShot:
    """A few-shot problem.

    Attributes:
        title: what is evaluated, in words.
        metric: ``accuracy`` (a fraction) or ``mse``.
        params: the initial parameters before meta-training.
        predict: ``predict(params, inputs)``, the network.
        loss: ``loss(params, inputs, targets)``, the inner loss on a support set.
        measure: ``measure(params, inputs, targets)``, the outer loss on a query set and the metric on it, detached.
        training: ``training(tasks, generator)`` draws episodes to train on.
        evaluation: draws episodes that have nothing in common with those of the training.
        evaluation_batch: how many episodes are evaluated at once.
    """

    title: str
    metric: Literal["accuracy", "mse"]
    params: Params
    predict: Callable[[Params, Tensor], Tensor]
    loss: Callable[[Params, Tensor, Tensor], Tensor]
    measure: Callable[[Params, Tensor, Tensor], tuple[Tensor, Tensor]]
    training: Callable[[int, torch.Generator], Episodes]
    evaluation: Callable[[int, torch.Generator], Episodes]
    evaluation_batch: int


@final
@dataclass(frozen=True)
class Adaptation:
    """How parameters are adapted to a support set: inner optimizer, steps, and the estimator of the hypergradient.

    ``adapted`` names the parameters that are adapted, the others being shared by all tasks (ANIL); ``None``: all.
    ``batched``: the support set has a leading axis of steps, each of which sees its own part.
    """

    optimizer: diffopt.Optimizer
    steps: int
    estimator: Estimator | None = None
    adapted: frozenset[str] | None = None
    batched: bool = False


@final
class Interval(NamedTuple):
    """A mean over episodes, and half the width of its 95 % confidence interval."""

    mean: float
    half_width: float


@final
class Evaluation(NamedTuple):
    """The metric on query sets before and after adaptation to the support sets."""

    before: Interval
    after: Interval
    episodes: int
    each: tuple[float, ...] = ()
    """The metric after adaptation, by episode."""


@final
class Pictures(NamedTuple):
    """Images to train and to evaluate on, in classes; ``unseen`` says in words what the second are."""

    title: str
    unseen: str
    channels: int
    size: int
    train: Images
    test: Images


def omniglot(folder: str | None, split: Literal["official", "vinyals"], rotations: bool, device: str) -> Pictures:
    """Omniglot: the background alphabets and the evaluation alphabets (or Vinyals' characters), these unrotated."""
    train_split, test_split, unseen = {
        "official": ("background", "evaluation", "unseen evaluation alphabets"),
        "vinyals": ("vinyals-train", "vinyals-test", "characters of the Vinyals test split"),
    }[split]
    train = Omniglot.load(folder, split=train_split, rotations=rotations).images.to(device)  # type: ignore[arg-type]
    test = Omniglot.load(folder, split=test_split).images.to(device)  # type: ignore[arg-type]
    return Pictures("Omniglot", unseen, 1, 28, train, test)


def image_set(name: str, folder: str | None, device: str) -> Pictures:
    """A set of :mod:`diffopt.commands.image_sets`, its own two splits."""
    kind = image_sets.SETS[name]
    train, test = (image_sets.load(name, split, folder, device) for split in ("train", "test"))
    return Pictures(kind.title, "unseen classes", kind.channels, kind.size, train, test)


def classification(
    title: str,
    network: torch.nn.Module,
    train: Images,
    test: Images,
    *,
    way: int,
    shot: int,
    queries: int,
    device: str,
) -> FewShot:
    """Episodes of image classes, ``queries`` per class in training and up to 15 in evaluation."""
    apply, params = functional(network)
    smallest = int(test.counts.min()) if isinstance(test, RaggedImages) else test.shape[1]
    eval_queries = min(15, smallest - shot)

    def measure(params: Params, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = apply(params, inputs)
        accuracy = (logits.detach().argmax(-1) == targets).float().mean()
        return F.cross_entropy(logits, targets), accuracy

    return FewShot(
        title=title,
        metric="accuracy",
        params=_leaves(params, device),
        predict=apply,
        loss=lambda params, inputs, targets: F.cross_entropy(apply(params, inputs), targets),
        measure=measure,
        training=lambda tasks, source: sample_episodes(
            train, way=way, shot=shot, query=queries, tasks=tasks, generator=source
        ),
        evaluation=lambda tasks, source: sample_episodes(
            test, way=way, shot=shot, query=eval_queries, tasks=tasks, generator=source
        ),
        evaluation_batch=10,
    )


def sinusoid(*, shot: int, queries: int, generator: torch.Generator, device: str) -> FewShot:
    """Regression on sine waves by an MLP 1-40-40-1; evaluated on 100 query points of new waves."""
    apply, params = functional(MLP((1, 40, 40, 1), generator=generator))

    def measure(params: Params, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        error = F.mse_loss(apply(params, inputs), targets)
        return error, error.detach()

    def sampler(points: int) -> Callable[[int, torch.Generator], Episodes]:
        waves = Sinusoid(shots=shot, queries=points)
        return lambda tasks, source: Episodes(*(x.to(device) for x in waves.sample(tasks, source)))

    return FewShot(
        title=f"sine waves from {shot} points",
        metric="mse",
        params=_leaves(params, device),
        predict=apply,
        loss=lambda params, inputs, targets: F.mse_loss(apply(params, inputs), targets),
        measure=measure,
        training=sampler(queries),
        evaluation=sampler(100),
        evaluation_batch=100,
    )


def meta_gradient(
    problem: FewShot, params: Params, adaptation: Adaptation, episodes: Episodes, ranks: Ranks = ALONE
) -> tuple[float, float]:
    r"""Put the gradient of the mean outer loss over some episodes into the ``grad`` of ``params`` (MAML).

    .. math:: F(\theta) = \frac1B\sum_b L^{query}_b\big(\phi_b(\theta)\big),\qquad
              \phi_b(\theta) = \mathrm{solve}(L^{support}_b, \theta)

    Each of the ``ranks`` takes its share of the episodes, and all have the gradient.

    Returns:
        The mean outer loss and the mean metric after adaptation.

    Reference: Finn, Abbeel, Levine (2017), "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks",
    algorithm 2.
    """

    def meta_loss(*episode: Tensor) -> tuple[Tensor, Tensor]:
        support_inputs, support_targets, query_inputs, query_targets = episode
        adapted = adapt(problem, params, adaptation, support_inputs, support_targets)
        return problem.measure(adapted, query_inputs, query_targets)

    for value in params.values():
        value.grad = None
    if ranks.count == 1:
        losses, metrics = torch.func.vmap(meta_loss)(*episodes)
        torch.autograd.backward(losses.mean())
        return float(losses.detach().mean()), float(metrics.mean())
    tasks, (loss, metric) = len(episodes[0]), next(iter(params.values())).new_zeros(2)
    share = ranks.share(tasks)
    if share.start < share.stop:
        losses, metrics = torch.func.vmap(meta_loss)(*(x[share] for x in episodes))
        torch.autograd.backward(losses.sum() / tasks)
        loss, metric = losses.detach().sum() / tasks, metrics.sum().to(losses) / tasks
    grads = [torch.zeros_like(value) if value.grad is None else value.grad for value in params.values()]
    *grads, loss, metric = ranks.total([*grads, loss, metric])
    for value, grad in zip(params.values(), grads, strict=True):
        value.grad = grad
    return float(loss), float(metric)


def adapt(
    problem: FewShot, params: Params, adaptation: Adaptation, support_inputs: Tensor, support_targets: Tensor
) -> Params:
    """The parameters adapted to one support set, differentiable in ``params``."""
    names = params.keys() if adaptation.adapted is None else adaptation.adapted
    shared = {name: value for name, value in params.items() if name not in names}

    def loss(adapted: Params, shared: Params, support: tuple[Tensor, Tensor]) -> Tensor:
        return problem.loss({**shared, **adapted}, *support)

    support = (support_inputs, support_targets)
    found = diffopt.solve(
        loss,
        {name: value for name, value in params.items() if name in names},
        shared,
        *(() if adaptation.batched else (support,)),
        batches=support if adaptation.batched else None,
        optimizer=adaptation.optimizer,
        steps=adaptation.steps,
        estimator=adaptation.estimator,
    )
    return {**shared, **found.params}


def evaluate(
    problem: FewShot,
    params: Params,
    adaptation: Adaptation,
    episodes: int,
    between: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Adapt to, and measure on, ``episodes`` evaluation episodes; the same ones at each call.

    ``between`` is called after each batch of episodes and may raise to stop. The ``ranks`` take the batches in turn.
    """

    def measure(*episode: Tensor) -> tuple[Tensor, Tensor]:
        before = problem.measure(params, *episode[2:])[1]
        return before, _measured(problem, params, adaptation, *episode)

    before, after = _over_episodes(problem, measure, 2, episodes, between, ranks)
    return Evaluation(interval(before), interval(after), episodes, tuple(after.tolist()))


def evaluate_adapted(problem: FewShot, params: Params, adaptation: Adaptation, episodes: int) -> Tensor:
    """The metric of :func:`evaluate` after adaptation alone, ``[episodes]``: it spares the network a third of them."""

    def measure(*episode: Tensor) -> tuple[Tensor]:
        return (_measured(problem, params, adaptation, *episode),)

    return _over_episodes(problem, measure, 1, episodes)[0]


def _measured(problem: FewShot, params: Params, adaptation: Adaptation, *episode: Tensor) -> Tensor:
    """The metric on the query set after adaptation to the support set."""
    support_inputs, support_targets, query_inputs, query_targets = episode
    adapted = adapt(problem, params, adaptation, support_inputs, support_targets)
    return problem.measure(adapted, query_inputs, query_targets)[1]


def _over_episodes(
    problem: FewShot,
    measure: Callable[..., tuple[Tensor, ...]],
    values: int,
    episodes: int,
    between: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> list[Tensor]:
    """The so many values that ``measure`` gives of each evaluation episode, each ``[episodes]``."""
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    measured: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        for number, tasks in enumerate(_batches(episodes, problem.evaluation_batch)):
            drawn = problem.evaluation(tasks, generator)
            if number % ranks.count == ranks.rank:
                measured.append(torch.func.vmap(measure)(*drawn))
            else:
                measured.append((next(iter(problem.params.values())).new_zeros(tasks),) * values)
            between()
    return ranks.total([torch.cat(parts) for parts in zip(*measured, strict=True)])


def interval(values: Tensor) -> Interval:
    """Mean and ``1.96 * std / sqrt(n)`` of ``n >= 2`` values, ``[n]``."""
    return Interval(float(values.mean()), 1.96 * float(values.std()) / math.sqrt(len(values)))


def _batches(total: int, size: int) -> Iterator[int]:
    while total > 0:
        yield min(size, total)
        total -= size


def _leaves(params: Params, device: str) -> Params:
    return {name: value.detach().to(device).requires_grad_() for name, value in params.items()}
