"""Classes with unequal numbers of images, without padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffopt.tasks.errors import DataError


@final
@dataclass(frozen=True, eq=False)
class RaggedImages:
    """The images of several classes, one class after the other; taken by :func:`diffopt.tasks.sample_episodes`.

    Attributes:
        flat: uint8, ``[images, channels, height, width]`` or ``[images, height, width]``, sorted by class.
        counts: int64, ``[classes]``, how many images each class has, in that order; on the same device.

    Raises:
        DataError: ``counts`` is not of that form, has an empty class, or does not add up to the images.

    Example:
        >>> import torch
        >>> images = RaggedImages(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), torch.tensor([2, 3]))
        >>> len(images), images[1].shape
        (2, torch.Size([3, 3, 8, 8]))
    """

    flat: Tensor
    counts: Tensor

    def __post_init__(self) -> None:
        """Refuse counts that do not belong to the images."""
        if self.counts.dtype != torch.int64 or self.counts.ndim != 1 or len(self.counts) == 0:
            kind = f"{str(self.counts.dtype).removeprefix('torch.')} of shape {tuple(self.counts.shape)}"
            raise DataError(f"counts is {kind}", "int64 [classes], one class or more")
        if self.counts.device != self.flat.device:
            raise DataError(
                f"counts is on {self.counts.device}", f"{self.flat.device} as the images", "move one with .to()"
            )
        if int(self.counts.min()) < 1 or int(self.counts.sum()) != len(self.flat):
            counted = f"{int(self.counts.sum())} images, the smallest class with {int(self.counts.min())}"
            raise DataError(f"counts says {counted}", f"the {len(self.flat)} images there are, and no empty class")

    def __len__(self) -> int:
        """The number of classes."""
        return len(self.counts)

    def __getitem__(self, label: int) -> Tensor:
        """The images of one class, ``[examples, ...]``, a view."""
        start = int(self.counts[:label].sum())
        return self.flat[start : start + int(self.counts[label])]

    def to(self, device: torch.device | str) -> RaggedImages:
        """The same images on another device."""
        return RaggedImages(self.flat.to(device), self.counts.to(device))
