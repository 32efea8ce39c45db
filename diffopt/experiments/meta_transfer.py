r"""Meta-transfer: meta-networks learn what and where a target network takes from a source network.

The source is trained on some classes, the target on few images of others (``meta_transfer_source`` says how they were
chosen). The paper's algorithm 1 is run as it stands,
with momentum SGD and with Adam: a step on the total loss; from there, steps on the transfer loss and one on the task's
loss, through which the meta-networks learn. Their estimators are compared by the target's accuracy, by the time of an
iteration, and by the hypergradient.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any, final

import torch
from torch import Tensor

from diffopt import State
from diffopt.estimators import Reverse
from diffopt.experiments.framework.experiment import Row, Unit
from diffopt.experiments.framework.options import listed, one_of, option, real, whole
from diffopt.experiments.framework.outer_loop import train
from diffopt.experiments.framework.texts import described
from diffopt.experiments.framework.unit_context import Work
from diffopt.experiments.meta_transfer_draw import pictures
from diffopt.experiments.meta_transfer_problem import (
    BASELINE,
    FIXED,
    KINDS,
    PAIRS,
    SCRATCH,
    Batch,
    Method,
    Transfer,
    annealing,
    methods,
)
from diffopt.experiments.meta_transfer_report import summary
from diffopt.experiments.meta_transfer_source import PROBLEMS, SPLITS
from diffopt.tensors import tree
from diffopt.tensors.memory import peak_bytes


@final
@dataclass(frozen=True)
class Settings:
    """What is transferred."""

    problem: str = option("omniglot", "omniglot, caltech101, or clusters (no data)", one_of(*PROBLEMS))
    size: int = option(14, "height and width of the images", whole(8))
    source_channels: tuple[int, ...] = option((16, 32, 64), "stages of the residual source", listed(whole(1)))
    source_blocks: int = option(1, "residual blocks per stage", whole(1))
    source_iterations: int = option(1000, "batches the source is trained on", whole(1))
    target_channels: tuple[int, ...] = option((16, 32, 64), "stages of the VGG-like target", listed(whole(1)))
    target_layers: int = option(1, "convolutions per stage", whole(1))
    per_class: int = option(3, "training images per class of the target; the others are for testing", whole(1))
    batch: int = option(48, "images of a batch", whole(2))
    steps: int = option(2, "steps T on the transfer loss", whole(1))
    sgd_lr: float = option(0.3, "inner step size of momentum SGD, before annealing", real(0))
    adam_lr: float = option(0.03, "and of Adam", real(0))
    meta_lr: float = option(0.001, "step size of the outer Adam", real(0))
    beta: float = option(0.5, "weight of the transfer loss", real(0, above=False))
    iterations: int = option(100, "outer iterations", whole(2))
    evaluations: int = option(10, "how often accuracy and gradient difference are measured", whole(1))
    seeds: int = option(3, "runs of each, from different starts on different images", whole(1))
    cost_steps: tuple[int, ...] = option((1, 2, 3, 8), "T of the iterations that are timed", listed(whole(1)))
    cost_after: int = option(20, "updates by the baseline before that", whole(1))
    rounds: int = option(3, "times that each is timed, in turn", whole(1))
    other_steps: tuple[int, ...] = option((1, 3), "other T that targets are trained with, by Adam", listed(whole(1)))
    split: str = option("test", "the target's classes: validation, or test", one_of(*SPLITS))
    classes: int = option(50, "classes of the target, others for every start; 0: all", whole(0))
    pairs: str = option("same", "pairs of stages that are matched: same, of equal number, or all", one_of(*PAIRS))


def units(settings: Settings) -> list[Unit]:
    """The source; for each start times and hypergradients for each T, one per run, and runs of other T."""
    source_cost = settings.source_iterations / 3
    found = [Unit("source", partial(source, settings), source_cost, keys={"part": "source", "seed": 0})]
    for seed in range(settings.seeds):
        for kind in KINDS:
            keys = {"seed": seed, "kind": kind}
            for steps in settings.cost_steps:
                cost = 4.0 * settings.rounds * (2 + steps) + 4 * settings.cost_after
                run = partial(measure, settings, steps, kind, seed)
                name = f"cost T={steps} {kind}, seed {seed}"
                found.append(Unit(name, run, cost, keys={"part": "cost", **keys, "T": steps}))
            for name, method in methods(settings.steps).items():
                cost = settings.iterations * (4.0 if method.steps else 1.0)
                run = partial(learn, settings, name, kind, seed)
                of = {"part": "learn", **keys, "estimator": name}
                found.append(Unit(f"{name}, {kind}, seed {seed}", run, cost, resumable=True, keys=of))
        found += [_of_steps(settings, steps, name, seed) for steps in settings.other_steps for name in compared(steps)]
    return found


def compared(steps: int) -> list[str]:
    """The methods of Fig. 4 at another number of steps: exact, one window, one step of so many times the rate."""
    return [BASELINE, *[f"multi-step {steps}", f"one step, {steps} lr"] * (steps > 1)]


def _of_steps(settings: Settings, steps: int, name: str, seed: int) -> Unit:
    """A run of Fig. 4, whose inner optimizer is Adam."""
    run = partial(learn, replace(settings, steps=steps), name, "adam", seed)
    keys = {"part": "steps", "seed": seed, "kind": "adam", "T": steps, "estimator": name}
    return Unit(f"{name}, T={steps}, adam, seed {seed}", run, 4.0 * settings.iterations, resumable=True, keys=keys)


def source(settings: Settings, work: Work) -> Row:
    """Train the source; how well it does, and how many images there are."""
    transfer = Transfer(settings, work)
    meta = sum(value.numel() for value in tree.flatten(transfer.meta)[0])
    return {
        "accuracy": transfer.source_accuracy,
        "linear layer": transfer.linear_accuracy(),
        "training images": len(transfer.train.labels),
        "test images": len(transfer.test.labels),
        "classes": transfer.train.classes,
        "meta-parameters": meta,
    }


def rates(settings: Settings, kind: str, method: Method, iteration: int) -> tuple[float, float]:
    """The annealed step sizes, of steps on the task's loss and of those on the transfer loss."""
    whole_rate = settings.sgd_lr if kind == "sgd" else settings.adam_lr
    rate = whole_rate * annealing(iteration, settings.iterations)
    return rate, method.factor * rate


def iterate(
    transfer: Transfer, kind: str, method: Method, state: State[Any], iteration: int, batch: Batch
) -> tuple[State[Any], Tensor | None]:
    """One iteration of algorithm 1: the target's next state, and the outer loss if there is one."""
    rate, fast_rate = rates(transfer.settings, kind, method, iteration)
    optimizers = transfer.optimizer(kind, rate), transfer.optimizer(kind, fast_rate)
    state = transfer.updated(method, state, optimizers[0], batch)
    if not method.steps:
        return state, None
    return state, transfer.outer_loss(method, state, optimizers, batch)


def measure(settings: Settings, steps: int, kind: str, seed: int, work: Work) -> Row:
    """Processor time and memory of one iteration by every method in turn, and its hypergradient beside the baseline's.

    They are taken where the baseline is after some iterations with the meta-networks as they start.
    """
    transfer, order = Transfer(settings, work, seed), work.generator(f"cost batches {seed}")
    chosen, state = methods(steps), transfer.start(kind)
    for number in range(settings.cost_after):
        state, _ = iterate(transfer, kind, chosen[FIXED], state, number, transfer.batch(order))
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    rows = transfer.batch(order)
    leaves = tree.flatten(transfer.meta)[0]

    def once(method: Method) -> Tensor | None:
        """An iteration from the batch on; the hypergradient, flat."""
        with torch.no_grad():
            features = transfer.source(transfer.source_params, rows.inputs).features if method.transfer else rows.source
        batch = Batch(rows.inputs, rows.labels, features)
        _, loss = iterate(transfer, kind, method, state, settings.cost_after, batch)
        if loss is None:
            return None
        return torch.cat([x.flatten() for x in torch.autograd.grad(loss, leaves)])

    gradients = {name: once(method) for name, method in chosen.items()}
    for _ in range(settings.rounds):
        for name, method in chosen.items():
            began = time.process_time()
            once(method)
            seconds[name].append(time.process_time() - began)
    exact, found = gradients[BASELINE], {}
    assert exact is not None
    for name, gradient in gradients.items():
        peak = peak_bytes(partial(once, chosen[name]))
        found[name] = {
            "seconds": median(seconds[name]),
            "ratio": median(a / b for a, b in zip(seconds[name], seconds[BASELINE], strict=True)),
            "megabytes": None if peak is None else peak / 1e6,
            "error": None if gradient is None else float((gradient - exact).norm() / exact.norm()),
            "cosine": None if gradient is None else float(torch.cosine_similarity(gradient, exact, dim=0)),
        }
    return {"methods": found}


def difference(transfer: Transfer, kind: str, state: State[Any], iteration: int, batch: Batch) -> tuple[float, float]:
    """Fig. 1: how much a step on the transfer loss changes its gradient; alone, and divided by the gradient's norm."""
    method = Method(1, Reverse())
    optimizer = transfer.optimizer(kind, rates(transfer.settings, kind, method, iteration)[0])
    first = transfer.transfer_gradient(state.params, batch)
    with torch.no_grad():
        moved = transfer.moved(method, state, optimizer, batch)
    change = float((transfer.transfer_gradient(moved.params, batch) - first).norm())
    return change, change / float(first.norm())


def learn(settings: Settings, name: str, kind: str, seed: int, work: Work) -> Row:
    """Train a target by one method; every method sees the same start and the same batches.

    Returns:
        The outer losses; the accuracy in per cent and the numbers of iterations it was measured after; for the
        baseline also the gradient differences there; the weights of the pairs in the end, means over the test images.
    """
    transfer, order = Transfer(settings, work, seed), work.generator(f"batches {seed}")
    method = methods(settings.steps)[name]
    state = transfer.start(kind)
    held, structure = tree.flatten((state.params, state.buffers))
    held = [x.clone() for x in held]
    meta = {str(i): x for i, x in enumerate(tree.flatten(transfer.meta)[0])}
    outer = torch.optim.Adam(meta.values(), lr=settings.meta_lr, weight_decay=1e-4)
    curves: dict[str, list[float]] = {"accuracy": [], "after": [], "difference": [], "relative difference": []}
    every = max(1, settings.iterations // settings.evaluations)

    def evaluate(after: int) -> None:
        params, _ = tree.unflatten(structure, held)
        curves["after"].append(after)
        curves["accuracy"].append(transfer.accuracy(params))

    def iteration(number: int) -> float:
        if number % every == 0:
            evaluate(number)
        batch = transfer.batch(order)
        params, buffers = tree.unflatten(structure, held)
        now, loss = iterate(transfer, kind, method, State(params, buffers, number), number, batch)
        for place, value in zip(held, tree.flatten((now.params, now.buffers))[0], strict=True):
            place.copy_(value.detach())
        if name == BASELINE and number % every == 0:
            change, relative = difference(transfer, kind, now, number + 1, batch)
            curves["difference"].append(change)
            curves["relative difference"].append(relative)
        if loss is None:
            return 0.0
        torch.autograd.backward(loss)
        return loss.item()

    tensors = {str(i): x for i, x in enumerate(held)}
    losses, _ = train(
        work, meta, outer, {"order": order}, settings.iterations, iteration, tensors=tensors, curves=curves
    )
    evaluate(settings.iterations)
    pairs = {}
    if name != SCRATCH:
        with torch.no_grad():
            weights = transfer.task.weights(
                transfer.meta, transfer.source(transfer.source_params, transfer.test.inputs).features
            )
        pairs = {f"{m}-{n}": float(where.mean()) for (m, n), (where, _) in weights.items()}
    return {"losses": losses if method.steps else [], **curves, "pairs": pairs}


QUICK = Settings("clusters", 16, (3, 4), 1, 5, (3, 4), 1, 4, 12, iterations=4, evaluations=2, seeds=2)
QUICK = replace(QUICK, cost_steps=(2,), cost_after=1, rounds=1, other_steps=(1,), classes=0, pairs="all")
FULL = Settings("caltech101", 32, (16, 32, 64), 5, 10000, (64, 128, 256, 512), 2, 20, 128, 2, 0.1, 0.001, 0.001)
FULL = replace(FULL, iterations=10000, evaluations=20, classes=0, pairs="all")

EXPERIMENT = described(
    "meta-transfer",
    quick=QUICK,
    standard=Settings(),
    full=FULL,
    units=units,
    summary=summary,
    pictures=pictures,
)
