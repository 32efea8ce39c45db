"""Transfer from a trained source network to other classes, and one iteration of algorithm 1 by every method.

Two solves are chained: ``steps`` on the transfer loss by a method's estimator, and one on the task's loss. The second
goes on from the first's parameters and buffers, so that autograd carries the hypergradient from one into the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Any, NamedTuple, cast, final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import diffopt
from diffopt import State
from diffopt.estimators import Estimator, FirstOrder, MultiStep, Reverse
from diffopt.experiments.framework.unit_context import Work
from diffopt.experiments.meta_transfer_source import Domain, Network, domains, source_network
from diffopt.tasks import MetaTransfer, PlainStages, functional
from diffopt.tasks.meta_transfer import Params
from diffopt.tensors import tree
from diffopt.tensors.leaves import Leaves

KINDS = ("sgd", "adam")
"""The inner optimizers."""
PAIRS = ("same", "all")
SCRATCH, FIXED, BASELINE, FIRST_ORDER = "scratch", "fixed weights (T=0)", "baseline", "first-order"


@final
@dataclass(frozen=True)
class Method:
    """How a target is trained.

    Attributes:
        steps: on the transfer loss; 0: the meta-networks stay as they are.
        estimator: the estimator for these steps.
        factor: what the step size is multiplied by in them.
        total: the outer loss is the total loss, which reads the meta-networks itself.
        transfer: the target is trained on the total loss, not the task's.
    """

    steps: int
    estimator: Estimator
    factor: float = 1.0
    total: bool = False
    transfer: bool = True


def methods(steps: int) -> dict[str, Method]:
    """The rows of the paper's tables, for so many steps on the transfer loss."""
    windows = [n for n in (2, 3, 4, 8) if steps % n == 0]  # the step on the task's loss is not in a window
    exact = Reverse("graph")
    return {
        SCRATCH: Method(0, exact, transfer=False),
        FIXED: Method(0, exact),
        BASELINE: Method(steps, exact),
        **{f"multi-step {window}": Method(steps, MultiStep(window, exact)) for window in windows},
        FIRST_ORDER: Method(steps, FirstOrder(), total=True),
        **({f"one step, {steps} lr": Method(1, exact, factor=float(steps))} if steps > 1 else {}),
    }


def annealing(iteration: int, iterations: int) -> float:
    """What the step size of an iteration is multiplied by; from one to zero along a cosine."""
    return (1 + cos(pi * iteration / iterations)) / 2


class Batch(NamedTuple):
    """Images of the target's training set, and what the source says of them."""

    inputs: Tensor
    labels: Tensor
    source: tuple[Tensor, ...]


@final
class Transfer:
    """A target network to be trained, the same for every method."""

    def __init__(self, settings: Any, work: Work, seed: int = 0) -> None:
        """Draw the target network and its training images."""
        self.settings = settings
        self.source, self.source_params, self.source_accuracy = source_network(settings, work.seed, work.data_dir)
        _, target = domains(settings.problem, settings.size, settings.split, work.data_dir)
        chosen = work.generator(f"training images {seed}")
        classes: Sequence[int] = range(target.classes)
        if 0 < settings.classes < target.classes:
            drawn = torch.randperm(target.classes, generator=work.generator(f"classes {seed}"))
            classes = drawn[: settings.classes].tolist()
        rows = [torch.nonzero(target.labels == label)[:, 0] for label in classes]
        rows = [row[torch.randperm(len(row), generator=chosen)] for row in rows]
        self.train, self.test = (
            Domain(
                target.inputs[torch.cat(sides)],
                torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(side) for side in sides])),
                len(rows),
            )
            for sides in (
                [row[: settings.per_class] for row in rows],
                [row[settings.per_class :] for row in rows],
            )
        )
        start = work.generator(f"start {seed}")
        channels = settings.target_channels
        network = PlainStages(target.inputs.shape[1], len(rows), channels, settings.target_layers, start)
        apply, params = functional(network)
        self.target = cast("Network", apply)
        sizes = tuple(settings.source_channels), tuple(channels)
        same = tuple((stage, stage) for stage in range(min(map(len, sizes))))
        self.task = MetaTransfer(self.target, *sizes, same if settings.pairs == "same" else (), settings.beta)
        detached = {name: value.detach() for name, value in params.items()}
        self.params = self.task.start(detached, start)
        like = next(iter(detached.values()))
        self.meta = tree.map_leaves(lambda x: x.requires_grad_(), self.task.meta_start(like))

    def batch(self, generator: torch.Generator) -> Batch:
        """Draw images without replacement."""
        rows = torch.randperm(len(self.train.labels), generator=generator)[: self.settings.batch]
        inputs = self.train.inputs[rows]
        with torch.no_grad():
            source = self.source(self.source_params, inputs).features
        return Batch(inputs, self.train.labels[rows], source)

    def optimizer(self, kind: str, lr: float) -> diffopt.Optimizer:
        """The inner optimizer; ``kind`` is ``sgd`` or ``adam``."""
        if kind == "sgd":
            return diffopt.SGD(lr, momentum=0.9, weight_decay=1e-4)
        return diffopt.Adam(lr, weight_decay=1e-4)

    def start(self, kind: str) -> State[Params]:
        """Where every method starts: the buffers are those of an optimizer that has made no step."""
        leaves, structure = tree.flatten(self.params)
        buffers = self.optimizer(kind, 1.0).init(Leaves(leaves))
        return State(self.params, {name: tree.unflatten(structure, list(x)) for name, x in buffers.items()})

    def updated(
        self, method: Method, state: State[Params], optimizer: diffopt.Optimizer, batch: Batch
    ) -> State[Params]:
        """Line 5: one step on the total loss, which the meta-gradient does not go through."""
        with torch.no_grad():
            if method.transfer:
                loss = self.task.total_loss
                found = diffopt.solve(loss, state, self.meta, *batch, optimizer=optimizer, steps=1)
            else:
                found = diffopt.solve(self.task.task_loss, state, *batch[:2], optimizer=optimizer, steps=1)
        return found.state

    def moved(self, method: Method, state: State[Params], optimizer: diffopt.Optimizer, batch: Batch) -> State[Params]:
        """Lines 7 to 12: the steps on the transfer loss, by the method's estimator."""
        return diffopt.solve(
            self.task.transfer_loss,
            state,
            self.meta,
            batch.inputs,
            batch.source,
            optimizer=optimizer,
            steps=method.steps,
            estimator=method.estimator,
        ).state

    def outer_loss(
        self, method: Method, state: State[Params], optimizers: tuple[diffopt.Optimizer, ...], batch: Batch
    ) -> Tensor:
        """Lines 6 to 14: the steps on the transfer loss, the one on the task's, and the loss of what comes out.

        Args:
            method: with one step or more on the transfer loss.
            state: after line 5.
            optimizers: of the step on the task's loss, and of those on the transfer loss.
            batch: for all of them, as in the paper.
        """
        optimizer, fast = optimizers
        moved = self.moved(method, state, fast, batch)
        extra = diffopt.solve(
            self.task.task_loss,
            moved,
            *batch[:2],
            optimizer=optimizer,
            steps=1,
            estimator=FirstOrder() if method.total else Reverse("graph"),
        )
        if method.total:
            return self.task.total_loss(extra.params, self.meta, *batch)
        return self.task.task_loss(extra.params, *batch[:2])

    def transfer_gradient(self, params: Params, batch: Batch) -> Tensor:
        """The gradient of the transfer loss, flat; the last layer, which it does not read, has none."""
        leaves, structure = tree.flatten(params)
        leaves = [x.detach().requires_grad_() for x in leaves]
        loss = self.task.transfer_loss(tree.unflatten(structure, leaves), self.meta, batch.inputs, batch.source)
        return torch.cat([x.flatten() for x in torch.autograd.grad(loss, leaves, materialize_grads=True)])

    def linear_accuracy(self) -> float:
        """What the source is worth: test accuracy in per cent of a linear layer fitted to its features' means.

        Of all stages, standardised; 200 steps of Adam with a little weight decay.
        """
        with torch.no_grad():
            found = [self.source(self.source_params, side.inputs).features for side in (self.train, self.test)]
            train, test = (torch.cat([x.mean(dim=(2, 3)) for x in features], dim=1) for features in found)
            mean, deviation = train.mean(0), train.std(0) + 1e-3
            train, test = (train - mean) / deviation, (test - mean) / deviation

            def loss(layer: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
                return cross_entropy(inputs @ layer["weight"] + layer["bias"], labels)

            classes = self.train.classes
            start = {"weight": train.new_zeros(train.shape[1], classes), "bias": train.new_zeros(classes)}
            adam = diffopt.Adam(0.02, weight_decay=0.01)
            layer = diffopt.solve(loss, start, train, self.train.labels, optimizer=adam, steps=200).params
            right = (test @ layer["weight"] + layer["bias"]).argmax(1) == self.test.labels
        return 100 * float(right.float().mean())

    def accuracy(self, params: Params) -> float:
        """Of the target network on the test images in per cent; they share their batch statistics."""
        with torch.no_grad():
            logits = self.target(params["network"], self.test.inputs).logits
        return 100 * float((logits.argmax(1) == self.test.labels).float().mean())
