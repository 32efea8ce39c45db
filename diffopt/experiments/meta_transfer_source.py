"""The images of meta-transfer, and the source network that is trained on the source's."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from diffopt.experiments.framework import image_sets
from diffopt.experiments.framework.unit_context import Work
from diffopt.tasks import Caltech101, ResidualStages, Staged, functional

Network: TypeAlias = "Callable[[dict[str, Tensor], Tensor], Staged]"
PROBLEMS = ("caltech101", "clusters")
BATCH, LR = 64, 0.002


class Domain(NamedTuple):
    """Images of some classes."""

    inputs: Tensor
    labels: Tensor
    classes: int


@lru_cache(maxsize=2)
def domains(problem: str, size: int, data_dir: str | None) -> tuple[Domain, Domain]:
    """Source and target, no class in both, images brought to a mean near zero.

    ``caltech101``: its training and test classes. ``clusters``: random images blurred by noise, of 16x16 whatever the
    size.

    Raises:
        DataError: the files are not there.
    """
    if problem == "caltech101":
        images = [Caltech101.load(data_dir, split=split, size=size).images for split in ("train", "test")]
        return _domain(images[0].flat, images[0].counts), _domain(images[1].flat, images[1].counts)
    made = [image_sets.load("clusters", split, None) for split in ("train", "test")]
    found = [_domain(x.flatten(0, 1)[:, None], _counts(x)) for x in made if isinstance(x, Tensor)]
    return found[0], found[1]


def _counts(images: Tensor) -> Tensor:
    return torch.full((len(images),), images.shape[1])


def _domain(images: Tensor, counts: Tensor) -> Domain:
    labels = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return Domain((images.float() / 255 - 0.5) / 0.25, labels, len(counts))


@lru_cache(maxsize=2)
def source_network(settings: Any, seed: int, data_dir: str | None) -> tuple[Network, dict[str, Tensor], float]:
    """The source network, trained by Adam on all images of the source's classes; kept, as every unit asks for it.

    Returns:
        The network, its parameters, and its accuracy in per cent on the images of the last ten batches.
    """
    work = Work(seed)
    source, _ = domains(settings.problem, settings.size, data_dir)
    generator = work.generator("source network")
    channels, blocks = settings.source_channels, settings.source_blocks
    network = ResidualStages(source.inputs.shape[1], source.classes, channels, blocks, generator)
    optimizer = torch.optim.Adam(network.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.source_iterations)
    order, right = work.generator("source batches"), list[float]()
    for _ in range(settings.source_iterations):
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
