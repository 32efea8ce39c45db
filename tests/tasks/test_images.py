"""Decoding and resizing: the usual pictures, and those made to harm."""

from __future__ import annotations

import contextlib
import struct
import zlib

import numpy as np
import pytest
import torch
from data_files import encoded, little_memory, refused, refuses, triangle
from hypothesis import given
from hypothesis import strategies as st

from diffopt.tasks import DataError
from diffopt.tasks.images import channels_first, decoded, resized


@pytest.mark.parametrize("size", [5, 12, 30])
@pytest.mark.parametrize("shape", [(20, 16), (20, 16, 3)])
def test_resizing_is_an_antialiased_triangle_filter(shape, size):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    rows, columns = triangle(20, size), triangle(16, size)
    expected = np.einsum("ij,jk...,lk->il...", rows, image.astype(float), columns)
    found = resized(image, size)
    assert found.dtype == np.uint8
    # Pillow rounds to whole levels after each of its two passes.
    assert np.abs(found - expected).max() <= 1.01
    square = image[:16]
    assert resized(square, 16) is square


def test_what_is_lossless_comes_back():
    image = np.random.default_rng(1).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    assert np.array_equal(decoded(encoded(image), "a", size=7), image)
    assert np.array_equal(decoded(encoded(image[..., 0]), "a", size=7), np.repeat(image[..., :1], 3, axis=2))
    see_through = np.dstack([image, np.full((7, 7), 9, np.uint8)])
    assert np.array_equal(decoded(encoded(see_through), "a", size=7), image)
    assert np.array_equal(decoded(encoded(image), "a", size=4), resized(image, 4))


def test_pictures_go_to_one_tensor():
    pictures = [np.full((4 + place, 6, 3), [place, 10, 20], np.uint8) for place in range(3)]
    found = channels_first(iter(pictures), 3, 5)
    assert found.dtype == torch.uint8
    assert found.shape == (3, 3, 5, 5)
    for place in range(3):
        assert found[place].amax(dim=(1, 2)).tolist() == found[place].amin(dim=(1, 2)).tolist() == [place, 10, 20]
    with pytest.raises(ValueError, match="zip"):
        channels_first(iter(pictures), 4, 5)


def claiming(width, height):
    """A PNG of a few bytes, whole in itself, that claims a size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((8001, 8000), "a claims 8001x8000 pixels, expected 64,000,000 at most"),
        ((10_000, 10_000), "a cannot be read .*decompression bomb.*, expected a whole PNG"),
        ((20_000, 20_000), "a cannot be read .*decompression bomb.*, expected a whole PNG"),
        ((2**31 - 1, 2**31 - 1), "a cannot be read .*, expected a whole PNG"),
    ],
)
def test_claims_of_many_pixels_are_refused_before_decoding(size, message):
    with little_memory(1_000_000), refused(message):
        decoded(claiming(*size), "a", size=4)


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "JPEG", "PPM"])
def test_other_formats_are_not_tried(form):
    image = np.zeros((4, 4, 3), np.uint8)
    refuses(r"a cannot be read .*, expected a whole PNG", decoded, encoded(image, form), "a", size=4)
    assert decoded(encoded(image, "JPEG"), "a", size=4, formats=("JPEG", "PNG")).shape == (4, 4, 3)


NOISE = np.random.default_rng(2).integers(0, 256, (12, 12, 3), dtype=np.uint8)
WHOLE = [encoded(NOISE), encoded(NOISE[..., 0]), encoded(NOISE, "JPEG"), encoded(NOISE, "JPEG", progressive=True)]


@given(data=st.data())
def test_damaged_pictures_are_refused_or_read_but_never_crash(data):
    whole = data.draw(st.sampled_from(WHOLE))
    content = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 8))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DataError):
        found = decoded(bytes(content), "a", size=6, formats=("JPEG", "PNG"))
        assert found.shape == (6, 6, 3)
        assert found.dtype == np.uint8
