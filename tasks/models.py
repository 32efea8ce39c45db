"""Small networks for few-shot learning."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn

from diffopt.tasks.errors import ProblemError
from diffopt.tasks.layers import convolutions, linear
from diffopt.tensors.arguments import check_generator, check_integer
from diffopt.tensors.tree import describe


@final
class MLP(nn.Module):
    """Linear layers with an activation between them, none after the last.

    Args:
        sizes: of the input, each hidden layer and the output, such as ``(1, 40, 40, 1)``.
        activation: an elementwise function; one that is twice differentiable (``torch.tanh``) where second
            derivatives are compared with finite differences.
        generator: draws the initial weights from torch's default distribution; by default torch's global one.

    Raises:
        ProblemError: fewer than two sizes, or one below 1.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: Callable[[Tensor], Tensor] = torch.relu,
        generator: torch.Generator | None = None,
    ) -> None:
        """Build the layers and draw their weights."""
        super().__init__()
        if not isinstance(sizes, Sequence) or len(sizes) < 2:
            raise ProblemError(f"sizes is {describe(sizes)}", "two or more integers, such as (1, 40, 1)")
        sizes = [check_integer(f"sizes[{i}]", size, 1, kind=ProblemError) for i, size in enumerate(sizes)]
        if not callable(activation):
            raise ProblemError(f"activation is {describe(activation)}", "a function, such as torch.tanh")
        if generator is not None:
            check_generator("generator", generator, ProblemError)
        self.activation = activation
        pairs = itertools.pairwise(sizes)
        self.layers = nn.ModuleList(linear(inputs, outputs, generator) for inputs, outputs in pairs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map ``[..., sizes[0]]`` to ``[..., sizes[-1]]``."""
        hidden = inputs
        for layer in self.layers[:-1]:
            hidden = self.activation(layer(hidden))
        outputs: Tensor = self.layers[-1](hidden)
        return outputs


@final
class Conv4(nn.Module):
    """Four blocks of 3x3 convolution, normalisation, ReLU and 2x2 max-pooling; then a linear layer.

    The normalisation is :class:`BatchStatisticsNorm2d`, through which the examples of one batch influence each
    other's logits (transductive prediction). The convolutions have no bias: the normalisation would subtract it
    again, leaving directions in which the loss is flat.

    Reference: Vinyals et al. (2016), "Matching Networks for One Shot Learning", section 4.1.

    Args:
        in_channels: 1 for grey images, 3 for colour.
        way: number of classes.
        filters: channels of every block.
        image_size: height and width of the images, 16 or more.
        generator: draws the initial weights from torch's default distribution; by default torch's global one.

    Raises:
        ProblemError: a size is too small.
    """

    def __init__(
        self,
        in_channels: int,
        way: int,
        filters: int = 64,
        image_size: int = 28,
        generator: torch.Generator | None = None,
    ) -> None:
        """Build the blocks and draw their weights."""
        super().__init__()
        counts = {"in_channels": in_channels, "way": way, "filters": filters}
        in_channels, way, filters = (check_integer(name, x, 1, kind=ProblemError) for name, x in counts.items())
        image_size = check_integer("image_size (halved four times)", image_size, 16, kind=ProblemError)
        if generator is not None:
            check_generator("generator", generator, ProblemError)
        blocks = [
            nn.Sequential(*convolutions((inputs, filters), nn.ReLU, generator, "torch"), nn.MaxPool2d(2))
            for inputs in (in_channels, filters, filters, filters)
        ]
        self.features = nn.Sequential(*blocks, nn.Flatten())
        self.head = linear(filters * (image_size // 16) ** 2, way, generator)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map images ``[examples, in_channels, image_size, image_size]`` to logits ``[examples, way]``."""
        logits: Tensor = self.head(self.features(inputs))
        return logits
