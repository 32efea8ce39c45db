"""The images of meta-transfer, and the source network that is trained on the source's.

The standard problem was chosen on classes for validation (``--set split=validation``), by a rule that was written down
before the test classes were looked at:

1. the source is one whose features are worth more to a linear layer on the target's few images than training from
   scratch comes to (Caltech-101's halves at 16x16, the problem before, were not: 31 % beside 31 %);
2. the inner step size is the one that is best for training from scratch, mean over three starts, for each optimizer;
3. beta is the paper's 0.5 and all pairs of stages of equal number weigh one; that is kept if it gains five points or
   more over scratch at each of three starts with both optimizers, with few images per class: 5, else 3;
4. the outer step size is the paper's for small images, 0.001.

The test classes are others, of other alphabets, and were used once, for the results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias, cast, final

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy

from diffopt.experiments.framework import image_sets
from diffopt.experiments.framework.unit_context import Work
from diffopt.tasks import Caltech101, ResidualStages, Staged, functional
from diffopt.tasks.data import Split

Network: TypeAlias = "Callable[[dict[str, Tensor], Tensor], Staged]"
PROBLEMS = ("omniglot", "caltech101", "clusters")
SPLITS = ("validation", "test")
BATCH, LR = 64, 0.002


class Domain(NamedTuple):
    """Images of some classes."""

    inputs: Tensor
    labels: Tensor
    classes: int


@lru_cache(maxsize=2)
def domains(problem: str, size: int, split: str, data_dir: str | None) -> tuple[Domain, Domain]:
    """Source and target, no class in both, images brought to a mean near zero.

    ``omniglot``: the background alphabets, and those of the evaluation alphabets that are for validation or testing,
    averaged to the size. ``caltech101``: its training and its other classes. ``clusters``: random images blurred by
    noise, of 16x16 whatever the size.

    Raises:
        DataError: the files are not there.
    """
    if problem == "caltech101":
        images = [Caltech101.load(data_dir, split=part, size=size).images for part in ("train", _split(split))]
        return _domain(images[0].flat, images[0].counts), _domain(images[1].flat, images[1].counts)
    made = [image_sets.load(problem, part, data_dir) for part in ("train", _split(split))]
    found = [_domain(_sized(x, problem, size), _counts(x)) for x in made if isinstance(x, Tensor)]
    return found[0], found[1]


def _split(name: str) -> Split:
    return "validation" if name == "validation" else "test"


def _sized(images: Tensor, problem: str, size: int) -> Tensor:
    """One image after the other, ``[images, 1, height, width]``."""
    flat = images.flatten(0, 1)[:, None]
    return adaptive_avg_pool2d(flat.float(), size) if problem == "omniglot" else flat


def _counts(images: Tensor) -> Tensor:
    return torch.full((len(images),), images.shape[1])


def _domain(images: Tensor, counts: Tensor) -> Domain:
    labels = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return Domain((images.float() / 255 - 0.5) / 0.25, labels, len(counts))


@final
@dataclass(frozen=True)
class Source:
    """What a source network depends on, so that settings of other things share one."""

    problem: str
    size: int
    channels: tuple[int, ...]
    blocks: int
    iterations: int


def source_network(settings: Any, seed: int, data_dir: str | None) -> tuple[Network, dict[str, Tensor], float]:
    """The source network of an experiment's settings, see :func:`trained`."""
    channels, blocks = tuple(settings.source_channels), settings.source_blocks
    return trained(
        Source(settings.problem, settings.size, channels, blocks, settings.source_iterations), seed, data_dir
    )


@lru_cache(maxsize=2)
def trained(of: Source, seed: int, data_dir: str | None) -> tuple[Network, dict[str, Tensor], float]:
    """The source network, trained by Adam on all images of the source's classes; kept, as every unit asks for it.

    Returns:
        The network, its parameters, and its accuracy in per cent on the images of the last ten batches.
    """
    work = Work(seed)
    source, _ = domains(of.problem, of.size, "validation", data_dir)
    generator = work.generator("source network")
    network = ResidualStages(source.inputs.shape[1], source.classes, of.channels, of.blocks, generator)
    optimizer = torch.optim.Adam(network.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, of.iterations)
    order, right = work.generator("source batches"), list[float]()
    for _ in range(of.iterations):
        rows = torch.randperm(len(source.labels), generator=order)[:BATCH]
        logits = network(source.inputs[rows]).logits
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(logits, source.labels[rows]))
        optimizer.step()
        schedule.step()
        right.append(float((logits.argmax(1) == source.labels[rows]).float().mean()))
    apply, params = functional(network)
    params = {name: value.detach() for name, value in params.items()}
    return cast("Network", apply), params, 100 * sum(right[-10:]) / len(right[-10:])
