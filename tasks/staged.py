"""Networks in stages that show what each stage computes: small residual and VGG-like ones, for transfer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d

from diffopt.tasks.errors import ProblemError
from diffopt.tasks.layers import BatchStatisticsNorm2d, convolution, linear


class Staged(NamedTuple):
    """What a network in stages returns.

    Attributes:
        features: of each stage, ``[examples, channels, height, width]``; each stage halves height and width.
        logits: ``[examples, classes]``.
    """

    features: tuple[Tensor, ...]
    logits: Tensor


@final
class ResidualStages(nn.Module):
    """A residual network like ResNet-32: stages of two-convolution blocks, an average over the picture, a linear layer.

    A block maps ``x`` to ``relu(f2(relu(f1(x))) + s(x))`` with ``f1``, ``f2`` a 3x3 convolution and
    :class:`BatchStatisticsNorm2d` each, ``s`` the identity, or a 1x1 convolution and a normalisation where the number
    of channels changes. From the second stage on, each first takes the average of 2x2. A stage's feature is its output.

    Reference: He, Zhang, Ren, Sun (2016), "Deep residual learning for image recognition", section 4.2.

    Args:
        in_channels: 1 for grey images, 3 for colour.
        classes: number of classes.
        channels: of each stage; the paper's ResNet-32 has ``(16, 32, 64)``.
        blocks: per stage; the paper's ResNet-32 has 5.
        generator: draws the initial weights; by default torch's global one.

    Raises:
        ProblemError: a size is below 1, or there is no stage.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        channels: Sequence[int] = (16, 32, 64),
        blocks: int = 5,
        generator: torch.Generator | None = None,
    ) -> None:
        """Build the stages and draw their weights."""
        super().__init__()
        _check(in_channels, classes, channels, blocks)
        sizes = (in_channels, *channels)
        self.stages = nn.ModuleList(
            nn.Sequential(*(_Block(n if i == 0 else m, m, generator) for i in range(blocks)))
            for n, m in pairwise(sizes)
        )
        self.head = linear(channels[-1], classes, generator)

    def forward(self, inputs: Tensor) -> Staged:
        """Map images ``[examples, in_channels, height, width]`` to features and logits."""
        features: list[Tensor] = []
        hidden = inputs
        for i, stage in enumerate(self.stages):
            hidden = stage(avg_pool2d(hidden, 2) if i else hidden)
            features.append(hidden)
        return Staged(tuple(features), self.head(hidden.mean(dim=(2, 3))))


@final
class PlainStages(nn.Module):
    """A VGG-like network: stages of 3x3 convolution, normalisation and ReLU, then the largest of 2x2; a linear layer.

    A stage's feature is what goes into its pooling, as in the reference for VGG-9.

    Reference: Simonyan, Zisserman (2015), "Very deep convolutional networks for large-scale image recognition"; the
    features are those of Jang, Lee, Hwang, Shin (2019), "Learning what and where to transfer", section 3.1.

    Args:
        in_channels: 1 for grey images, 3 for colour.
        classes: number of classes.
        channels: of each stage.
        layers: convolutions per stage.
        generator: draws the initial weights; by default torch's global one.

    Raises:
        ProblemError: a size is below 1, or there is no stage.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        channels: Sequence[int] = (64, 128, 256, 512),
        layers: int = 2,
        generator: torch.Generator | None = None,
    ) -> None:
        """Build the stages and draw their weights."""
        super().__init__()
        _check(in_channels, classes, channels, layers)
        self.stages = nn.ModuleList(
            nn.Sequential(*_plain(n, m, layers, generator)) for n, m in pairwise((in_channels, *channels))
        )
        self.head = linear(channels[-1], classes, generator)

    def forward(self, inputs: Tensor) -> Staged:
        """Map images ``[examples, in_channels, height, width]`` to features and logits."""
        features: list[Tensor] = []
        hidden = inputs
        for i, stage in enumerate(self.stages):
            hidden = stage(max_pool2d(hidden, 2) if i else hidden)
            features.append(hidden)
        return Staged(tuple(features), self.head(hidden.mean(dim=(2, 3))))


def _check(in_channels: int, classes: int, channels: Sequence[int], depth: int) -> None:
    if min(in_channels, classes, depth, len(channels), *channels) < 1:
        sizes = f"in_channels {in_channels}, classes {classes}, channels {tuple(channels)}, depth {depth}"
        raise ProblemError(sizes, "1 or more of each, and one stage or more")


def _plain(in_channels: int, channels: int, layers: int, generator: torch.Generator | None) -> list[nn.Module]:
    parts: list[nn.Module] = []
    for i in range(layers):
        inputs = channels if i else in_channels
        parts += [convolution(inputs, channels, 3, generator, "he"), BatchStatisticsNorm2d(channels), nn.ReLU()]
    return parts


@final
class _Block(nn.Module):
    """One residual block of the same height and width."""

    def __init__(self, in_channels: int, channels: int, generator: torch.Generator | None) -> None:
        super().__init__()
        first, second = _plain(in_channels, channels, 1, generator), _plain(channels, channels, 1, generator)
        self.residual = nn.Sequential(*first, *second[:-1])  # the last ReLU comes after the sum
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != channels:
            self.shortcut = nn.Sequential(
                convolution(in_channels, channels, 1, generator, "he"), BatchStatisticsNorm2d(channels)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.relu(self.residual(inputs) + self.shortcut(inputs))
