"""The residual network that few-shot papers call ResNet-12."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from diffopt.tasks.errors import ProblemError
from diffopt.tasks.layers import BatchStatisticsNorm2d, convolution, linear

SMALLEST_IMAGE = 16


@final
class ResNet12(nn.Module):
    """Four residual blocks of three 3x3 convolutions, an average over the picture, and a linear layer.

    Each block maps ``x`` to ``pool(f(f3(f(f2(f(f1(x))))) + s(x)))``, with ``f1 .. f3`` a 3x3 convolution and a
    normalisation each, ``s`` a 1x1 convolution and a normalisation, ``f`` a leaky ReLU of slope 0.1, and ``pool``
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
        inputs = (in_channels, *filters[:3])
        self.blocks = nn.Sequential(*(_Block(n, m, generator) for n, m in zip(inputs, filters, strict=True)))
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


@final
class _Block(nn.Module):
    """One residual block: half the height and width, rounded down."""

    def __init__(self, in_channels: int, filters: int, generator: torch.Generator | None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (in_channels, filters, filters):
            layers += [
                convolution(channels, filters, 3, generator, "he"),
                BatchStatisticsNorm2d(filters),
                nn.LeakyReLU(0.1),
            ]
        self.residual = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential(
            convolution(in_channels, filters, 1, generator, "he"), BatchStatisticsNorm2d(filters)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        added = self.residual(inputs) + self.shortcut(inputs)
        return nn.functional.max_pool2d(nn.functional.leaky_relu(added, 0.1), 2)
