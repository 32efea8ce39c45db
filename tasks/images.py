"""Turning pictures, encoded or not, into uint8 arrays of one size."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffopt.tasks.data import whole
from diffopt.tasks.errors import DataError
from diffopt.tasks.pickled_arrays import Array

_MOST_PIXELS = 64_000_000
"""More than the largest photograph of ImageNet; a small file that claims more is refused before it is decoded."""

BROKEN_IMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, MemoryError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


def decoded(content: bytes | memoryview, name: str, *, size: int, formats: tuple[str, ...] = ("PNG",)) -> Array:
    """A picture, uint8 RGB ``[size, size, 3]``, brought to that size with Pillow's antialiased bilinear filter.

    Args:
        content: the encoded picture.
        name: for messages.
        size: height and width to bring it to; the shape is not kept.
        formats: what it may be encoded as; no other decoder is tried.

    Raises:
        DataError: it is no such picture, is damaged, or has too many pixels.
    """
    broken = (*BROKEN_IMAGE, Image.DecompressionBombWarning)
    with (
        whole(f"{name} cannot be read", f"a whole {' or '.join(formats)}", broken, "obtain it again"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(content), formats=formats) as image:
            if image.width * image.height > _MOST_PIXELS:
                got = f"{name} claims {image.width}x{image.height} pixels"
                raise DataError(got, f"{_MOST_PIXELS:,} at most", "it was not decoded")
            return np.asarray(_brought(image.convert("RGB"), size))


def resized(image: Array, size: int) -> Array:
    """An image, uint8 ``[height, width]`` or RGB ``[height, width, 3]``, brought to ``[size, size]``.

    The filter is Pillow's antialiased bilinear one; an image of that size comes back as it is.
    """
    return image if image.shape[:2] == (size, size) else np.asarray(_brought(Image.fromarray(image), size))


def channels_first(pictures: Iterable[Array], count: int, size: int) -> Tensor:
    """RGB pictures of any shape as one tensor, uint8 ``[count, 3, size, size]``, brought to it by :func:`resized`.

    Args:
        pictures: uint8 ``[height, width, 3]``, taken one by one.
        count: how many there are.
        size: height and width.
    """
    stored = torch.empty(count, 3, size, size, dtype=torch.uint8)
    view = stored.numpy()
    for place, picture in zip(range(count), pictures, strict=True):
        view[place] = np.moveaxis(resized(picture, size), 2, 0)
    return stored


def _brought(image: Image.Image, size: int) -> Image.Image:
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR)
