"""Few-shot classification that is small enough for one CPU core: Omniglot at 14x14, or noisy clusters without data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from diffopt.experiments.framework.unit_context import Work
from diffopt.tasks import MLP, Omniglot, functional

Apply: TypeAlias = Callable[[dict[str, Tensor], Tensor], Tensor]

PROBLEMS = ("omniglot", "clusters")
PIXELS, LAYERS = 14 * 14, 3


def load(name: str, work: Work) -> Tensor:
    """Images by class, uint8, ``[classes, examples, 14, 14]``.

    ``omniglot``: the background characters, each 2x2 pixels averaged. ``clusters``: 60 random images, each blurred by
    noise 20 times over.

    Raises:
        DataError: Omniglot is not there.
    """
    if name == "omniglot":
        images = Omniglot.load(work.data_dir, split="background").images.flatten(0, 1)
        small = avg_pool2d(images[:, None].float(), 2).round().to(torch.uint8)
        return small.reshape(-1, 20, 14, 14)
    generator = work.generator("clusters")
    centres = torch.rand(60, 1, 14, 14, generator=generator)
    noise = torch.randn(60, 20, 14, 14, generator=generator)
    return (255 * (centres + 0.5 * noise).clamp(0, 1)).round().to(torch.uint8)


def network(width: int, way: int, adapted: int, start: str, work: Work) -> tuple[Apply, dict[str, Tensor], list[str]]:
    """A network of three layers for these images: its function, its params, and the names of those of its last layers.

    Args:
        width: of the two hidden layers.
        way: classes.
        adapted: how many layers are the last.
        start: which start, for ``work``.
        work: where it runs.
    """
    module = MLP((PIXELS, width, width, way), torch.tanh, generator=work.generator(start))
    apply, params = functional(module)
    params = {name: value.detach().to(work.device).requires_grad_() for name, value in params.items()}
    last = [name for name in params if int(name.split(".")[1]) >= LAYERS - adapted]  # layers.0.weight ... layers.2.bias
    return apply, params, last
