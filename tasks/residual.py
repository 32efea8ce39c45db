"""Residual networks, and networks in stages that show what each stage computes, for transfer: of one kind of block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d

from diffopt.tasks.errors import ProblemError
from diffopt.tasks.layers import BatchStatisticsNorm2d, convolution, convolutions, linear

SMALLEST_IMAGE = 16


@final
class ResidualBlock(nn.Module):
    """``end(f_n(...a(f_1(x))) + s(x))``, with ``f_i`` a 3x3 convolution and its normalisation, ``a`` an activation.

    ``s`` is a 1x1 convolution and its normalisation, or the identity where ``project`` is false.
    """

    def __init__(
        self,
        channels: Sequence[int],
        activation: Callable[[], nn.Module],
        end: nn.Module,
        generator: torch.Generator | None,
        *,
        project: bool,
    ) -> None:
        """Draw the convolutions, the shortcut's last; ``channels`` of the input and of each layer."""
        super().__init__()
        self.residual = nn.Sequential(*convolutions(channels, activation, generator)[:-1])
        self.shortcut: nn.Module = nn.Identity()
        if project:
            shortcut = convolution(channels[0], channels[-1], 1, generator, "he")
            self.shortcut = nn.Sequential(shortcut, BatchStatisticsNorm2d(channels[-1]))
        self.end = end

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``[examples, channels[0], height, width]`` to as many of ``channels[-1]``, and ``end`` that."""
        outputs: Tensor = self.end(self.residual(inputs) + self.shortcut(inputs))
        return outputs


@final
class ResNet12(nn.Module):
    """Four residual blocks of three 3x3 convolutions, an average over the picture, and a linear layer.

    Each block maps ``x`` to ``pool(a(f3(a(f2(a(f1(x))))) + s(x)))``, with ``f1 .. f3`` a 3x3 convolution and a
    normalisation each, ``s`` a 1x1 convolution and a normalisation, ``a`` a leaky ReLU of slope 0.1, and ``pool``
    the largest of 2x2. The normalisation is :class:`BatchStatisticsNorm2d`, through which the examples of one batch
    influence each other's logits; convolutions have no bias. There is no dropout and no DropBlock: give those to
    the data, or a second derivative has to replay them. Drawn as in the reference: He's normal distribution for
    convolutions.

    12,424,320 parameters before the linear layer with the default filters and three channels; 7,996,800 with
    ``(64, 128, 256, 512)``, the narrower form of Oreshkin et al. (2018), "TADAM".

    Reference: Lee, Maji, Ravichandran, Soatto (2019), "Meta-learning with differentiable convex optimization",
    section 4.1, where DropBlock is added.

    Args:
        in_channels: 1 for grey images, 3 for colour.
        way: number of classes.
        filters: channels of the four blocks.
        generator: draws the initial weights; by default torch's global one.

    Raises:
        ProblemError: a size is below 1, or there are not four blocks.
    """

    def __init__(
        self,
        in_channels: int,
        way: int,
        filters: Sequence[int] = (64, 160, 320, 640),
        generator: torch.Generator | None = None,
    ) -> None:
        """Build the blocks and draw their weights."""
        super().__init__()
        if len(filters) != 4 or min(in_channels, way, *filters) < 1:
            sizes = f"in_channels {in_channels}, way {way}, filters {tuple(filters)}"
            raise ProblemError(sizes, "1 or more of each, and four numbers of filters")
        leaky = partial(nn.LeakyReLU, 0.1)
        ends = [nn.Sequential(leaky(), nn.MaxPool2d(2)) for _ in filters]
        pairs = zip(pairwise((in_channels, *filters)), ends, strict=True)
        blocks = [ResidualBlock((n, m, m, m), leaky, end, generator, project=True) for (n, m), end in pairs]
        self.blocks = nn.Sequential(*blocks)
        self.head = linear(filters[3], way, generator)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map images ``[examples, in_channels, height, width]``, 16 pixels or more, to logits ``[examples, way]``.

        Raises:
            ProblemError: the images are smaller: halved four times, nothing is left.
        """
        if min(inputs.shape[-2:]) < SMALLEST_IMAGE:
            size = tuple(inputs.shape[-2:])
            raise ProblemError(f"images are {size[0]}x{size[1]}", f"{SMALLEST_IMAGE} pixels or more each way")
        logits: Tensor = self.head(self.blocks(inputs).mean(dim=(-2, -1)))
        return logits


class Staged(NamedTuple):
    """What a network in stages returns.

    Attributes:
        features: of each stage, ``[examples, channels, height, width]``; each stage halves height and width.
        logits: ``[examples, classes]``.
    """

    features: tuple[Tensor, ...]
    logits: Tensor


def _stages(sizes: tuple[int, int, Sequence[int], int], stage: Callable[[int, int], list[nn.Module]]) -> nn.ModuleList:
    """A stage for each number of channels, of what ``stage`` makes; ``sizes`` are those that a network is given."""
    in_channels, classes, channels, depth = sizes
    if min(in_channels, classes, depth, len(channels), *channels) < 1:
        got = f"in_channels {in_channels}, classes {classes}, channels {tuple(channels)}, depth {depth}"
        raise ProblemError(got, "1 or more of each, and one stage or more")
    return nn.ModuleList(nn.Sequential(*stage(n, m)) for n, m in pairwise((in_channels, *channels)))


def _staged(inputs: Tensor, stages: nn.ModuleList, pool: Callable[[Tensor, int], Tensor], head: nn.Linear) -> Staged:
    """Through the stages, each but the first behind a pooling; an average over the picture; the linear layer."""
    features: list[Tensor] = []
    hidden = inputs
    for i, stage in enumerate(stages):
        hidden = stage(pool(hidden, 2) if i else hidden)
        features.append(hidden)
    return Staged(tuple(features), head(hidden.mean(dim=(2, 3))))


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

        def stage(n: int, m: int) -> list[nn.Module]:
            sizes = [(n, m, m), *[(m, m, m)] * (blocks - 1)]
            return [ResidualBlock(s, nn.ReLU, nn.ReLU(), generator, project=s[0] != m) for s in sizes]

        super().__init__()
        self.stages = _stages((in_channels, classes, channels, blocks), stage)
        self.head = linear(channels[-1], classes, generator)

    def forward(self, inputs: Tensor) -> Staged:
        """Map images ``[examples, in_channels, height, width]`` to features and logits."""
        return _staged(inputs, self.stages, avg_pool2d, self.head)


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

        def stage(n: int, m: int) -> list[nn.Module]:
            return convolutions((n, *[m] * layers), nn.ReLU, generator)

        super().__init__()
        self.stages = _stages((in_channels, classes, channels, layers), stage)
        self.head = linear(channels[-1], classes, generator)

    def forward(self, inputs: Tensor) -> Staged:
        """Map images ``[examples, in_channels, height, width]`` to features and logits."""
        return _staged(inputs, self.stages, max_pool2d, self.head)
