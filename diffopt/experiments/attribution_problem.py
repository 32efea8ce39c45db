"""What is trained in the experiment on attribution: a small network on digits, with a weight for each example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, final

import numpy as np
import torch
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import diffopt
from diffopt.experiments.framework.unit_context import Work
from diffopt.tasks import MNIST

Params: TypeAlias = dict[str, Tensor]
Side: TypeAlias = tuple[Tensor, Tensor]
"""Inputs ``[examples, pixels]`` in ``[0, 1]`` and labels ``[examples]``."""


@final
@dataclass(frozen=True)
class Training:
    """How the network is trained.

    Attributes:
        hidden: width of the hidden layer; its function is tanh, which is smooth.
        steps: of SGD.
        batch: examples in a step; 0: all.
        lr: step size.
        momentum: of SGD.
        penalty: times the sum of the squares of all weights.
    """

    hidden: int
    steps: int
    batch: int
    lr: float
    momentum: float
    penalty: float


@final
@dataclass(frozen=True, eq=False)
class Problem:
    """A training in which every example has a weight, and what is measured at its end.

    # NOTE [what makes a training predictable]
    Initialisation and batches are the same in each training: a weight of zero takes an example out of its batch, which
    keeps its place and its divisor. The network is smooth and the batches are large: where single examples decide which
    way the training takes, no derivative at the weights of one predicts what it does without them.

    Attributes:
        training: how.
        examples: what it is trained with.
        queries: whose losses are measured, one by one.
        tests: whose mean loss is measured.
        start: the initial parameters.
    """

    training: Training
    examples: Side
    queries: Side
    tests: Side
    start: Params

    @property
    def ones(self) -> Tensor:
        """The weights with which all examples count alike."""
        return self.examples[0].new_ones(len(self.examples[1]))

    def train(self, weights: Tensor) -> Params:
        """The parameters at the end of the training."""
        how, count = self.training, len(weights)
        batches = diffopt.Batches(TensorDataset(torch.arange(count)), min(how.batch or count, count))
        optimizer = diffopt.SGD(how.lr, momentum=how.momentum)
        return diffopt.solve(
            self.loss, self.start, weights, optimizer=optimizer, steps=how.steps, batches=lambda step: batches(step)[0]
        ).params

    def loss(self, params: Params, weights: Tensor, chosen: Tensor) -> Tensor:
        """The training loss of a batch, given by the places of its examples."""
        each = losses(params, (self.examples[0][chosen], self.examples[1][chosen]))
        squares = torch.stack([x.square().sum() for x in params.values()]).sum()
        return (weights[chosen] * each).mean() + self.training.penalty * squares

    def whole_loss(self, params: Params, weights: Tensor) -> Tensor:
        """The training loss of all examples."""
        return self.loss(params, weights, torch.arange(len(weights)))

    def metric(self, params: Params) -> Tensor:
        """The loss of each query, and the mean loss of the tests: ``[queries + 1]``."""
        return torch.cat([losses(params, self.queries), self.mean_loss(params)[None]])

    def mean_loss(self, params: Params) -> Tensor:
        """The mean loss of the tests."""
        return losses(params, self.tests).mean()


def outputs(params: Params, inputs: Tensor) -> Tensor:
    """The scores of the ten classes."""
    return torch.tanh(inputs @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def losses(params: Params, side: Side) -> Tensor:
    """The cross entropy of every example."""
    return cross_entropy(outputs(params, side[0]), side[1], reduction="none")


def accuracy(params: Params, side: Side) -> float:
    """In per cent."""
    return 100 * float((outputs(params, side[0]).argmax(1) == side[1]).float().mean())


def network(pixels: int, hidden: int, generator: torch.Generator) -> Params:
    """Normal weights of variance one over the inputs, no offsets."""
    return {
        "w1": torch.randn(pixels, hidden, generator=generator) / pixels**0.5,
        "b1": torch.zeros(hidden),
        "w2": torch.randn(hidden, 10, generator=generator) / hidden**0.5,
        "b2": torch.zeros(10),
    }


def digits(examples: int, work: Work) -> tuple[Side, Side]:
    """So many of scikit-learn's 1,797 digits, 8x8, and the others."""
    images, labels = (torch.from_numpy(np.asarray(x)) for x in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=work.generator("digits"))
    inputs, labels = images[order].float() / 16, labels[order].long()
    return (inputs[:examples], labels[:examples]), (inputs[examples:], labels[examples:])


def mnist(split: str, count: int, work: Work) -> Side:
    """So many images of one of MNIST's splits.

    Raises:
        DataError: MNIST is not there.
    """
    loaded = MNIST.load(work.data_dir, split=split)  # type: ignore[arg-type]  # one of the three
    chosen = torch.randperm(len(loaded.labels), generator=work.generator(f"mnist {split}"))[:count]
    return loaded.images[chosen].flatten(1).float() / 255, loaded.labels[chosen]


def changed_labels(labels: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Labels of which a share is changed to another class, and which ones those are: ``[examples]`` of booleans."""
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    wrong = torch.zeros(len(labels), dtype=torch.bool)
    wrong[chosen] = True
    shift = torch.randint(1, 10, labels.shape, generator=generator)
    return torch.where(wrong, (labels + shift) % 10, labels), wrong
