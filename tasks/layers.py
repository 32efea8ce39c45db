"""Layers drawn from a generator of one's choice; the parts that the models are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from diffopt.tasks.errors import ProblemError
from diffopt.tensors.arguments import check_integer

Draw: TypeAlias = Literal["torch", "he"]


@final
class BatchStatisticsNorm2d(nn.Module):
    """Batch normalisation by the statistics of the batch at hand, in training and in evaluation alike.

    ``y = weight * (x - mean) / sqrt(variance + eps) + bias``, with mean and (biased) variance of each channel
    over examples, height and width. There are no running statistics, so the module has no hidden state.

    Args:
        channels: number of channels.
        eps: added to the variance.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        """Start as the plain normalisation: weight 1, bias 0."""
        super().__init__()
        channels = check_integer("channels", channels, 1, kind=ProblemError)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise ``[examples, channels, height, width]``, with more than one value per channel."""
        # NOTE [why scale and shift stand outside batch_norm]
        # With the affine form, vmap(func.grad(loss)) differentiated again from outside by autograd comes out
        # wrong without an error. The plain form followed by a plain scale and shift comes out right.
        if inputs.ndim != 4 or inputs.shape[1] != len(self.weight) or inputs[:, :1].numel() < 2:
            raise ProblemError(
                f"inputs has shape {tuple(inputs.shape)}",
                f"[examples, {len(self.weight)}, height, width] with two or more values per channel",
            )
        normal = nn.functional.batch_norm(inputs, None, None, training=True, eps=self.eps)
        return normal * self.weight[:, None, None] + self.bias[:, None, None]


def convolution(
    in_channels: int, filters: int, kernel_size: int, generator: torch.Generator | None, draw: Draw = "torch"
) -> nn.Conv2d:
    """A convolution that keeps height and width, without bias, for a normalisation to follow.

    The normalisation would subtract a bias again, leaving directions in which the loss is flat.

    Args:
        in_channels: channels of the input.
        filters: channels of the output.
        kernel_size: odd.
        generator: what the weights are drawn from; by default torch's global one.
        draw: ``torch``: torch's default distribution; ``he``: normal, with the variance ``2 / (filters *
            kernel_size^2)`` that keeps the size of gradients (He et al. (2015), "Delving deep into rectifiers").
    """
    layer = nn.Conv2d(in_channels, filters, kernel_size, padding=kernel_size // 2, bias=False, device="meta")
    layer = layer.to_empty(device=_device(generator))  # NOTE [why layers are built on meta]
    if draw == "torch":
        nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    else:
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
    return layer


def convolutions(
    channels: Sequence[int],
    activation: Callable[[], nn.Module],
    generator: torch.Generator | None,
    draw: Draw = "he",
) -> list[nn.Module]:
    """From each number of channels to the next: a 3x3 convolution, its normalisation, an activation."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        layers += [convolution(inputs, outputs, 3, generator, draw), BatchStatisticsNorm2d(outputs), activation()]
    return layers


def linear(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    """A linear layer drawn as torch draws it by default, but from ``generator``."""
    # NOTE [why layers are built on meta]
    # On the meta device the constructor's own draw does nothing; elsewhere it would advance torch's global
    # generator even where another one was given.
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device=_device(generator))
    bound = 1 / math.sqrt(inputs)
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return layer


def _device(generator: torch.Generator | None) -> torch.device:
    """Where weights drawn from ``generator`` live."""
    return torch.get_default_device() if generator is None else generator.device
