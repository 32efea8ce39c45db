"""Reading the official Omniglot zips: 105x105 drawings of one bit per pixel, made 28x28."""

from __future__ import annotations

import io
import re
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from diffopt.tasks.archives import BROKEN_ZIP
from diffopt.tasks.data import plain_size, whole
from diffopt.tasks.errors import DataError
from diffopt.tasks.images import BROKEN_IMAGE

OFFICIAL_SIZE = (105, 105)
SIZE = (28, 28)
LARGEST_DRAWING = 100_000
"""Bytes; the official drawings have some 300 each, and 11,025 pixels."""
LARGEST_ZIP = 200_000_000
"""Bytes; the largest of the official zips has 9,464,212."""
_MEMBER = re.compile(r"[^/]+/(?P<alphabet>[^/]+)/(?P<character>character\d+)/\d+_\d+\.png")


class Drawings(NamedTuple):
    """The drawings of several characters.

    Attributes:
        images: uint8, ``[characters, drawers, 28, 28]``, ink 255; sorted by alphabet, then character, then
            drawer.
        alphabets: for each character, the name of its alphabet.
        characters: for each character, its name within its alphabet.
    """

    images: npt.NDArray[np.uint8]
    alphabets: tuple[str, ...]
    characters: tuple[str, ...]


def read_archives(archives: Sequence[tuple[str, Path | BinaryIO]]) -> Drawings:
    """Read and join zips in the official layout, ``<stem>/<alphabet>/characterNN/XXXX_YY.png``.

    Members that are not drawings are passed over. A character that several zips hold alike (the two small
    official ones have Greek and Latin in common) counts once.

    Args:
        archives: for each zip, its name for messages, and its path or content.

    Raises:
        DataError: a file is missing or is not a zip; a drawing is not a 105x105 image; two zips hold the same
            character with different drawings; characters differ in their number of drawings; or there are
            none.
    """
    drawn: dict[tuple[str, str], list[npt.NDArray[np.uint8]]] = {}
    for name, file in archives:
        found = _read_one(name, file)
        for key in found.keys() & drawn.keys():
            if not np.array_equal(found[key], drawn[key]):
                raise DataError(f"{name} holds {'/'.join(key)} with other drawings than an earlier zip", "the same")
        drawn |= found
    names = [name for name, _ in archives]
    if not drawn:
        example = "images_background/Greek/character01/0394_01.png"
        raise DataError(f"no drawings in {names}", f"members such as {example}")
    counts = {len(images) for images in drawn.values()}
    if len(counts) > 1:
        raise DataError(f"the characters in {names} have {sorted(counts)} drawings", "as many (20) of each")
    keys = sorted(drawn)
    images = np.stack([np.stack(drawn[key]) for key in keys])
    return Drawings(images, tuple(alphabet for alphabet, _ in keys), tuple(character for _, character in keys))


def _read_one(name: str, file: Path | BinaryIO) -> dict[tuple[str, str], list[npt.NDArray[np.uint8]]]:
    """The drawings of each (alphabet, character) of one zip, in the order of their names."""
    drawn: defaultdict[tuple[str, str], list[npt.NDArray[np.uint8]]] = defaultdict(list)
    with whole(f"{name} cannot be read", "a zip", BROKEN_ZIP, "download it again"):
        if isinstance(file, Path) and (size := plain_size(file)) > LARGEST_ZIP:
            raise DataError(f"{name} has {size:,} bytes", f"{LARGEST_ZIP:,} at most", "this is another file")
        with zipfile.ZipFile(file) as archive:
            for member in sorted(archive.infolist(), key=lambda one: one.filename):
                if match := _MEMBER.fullmatch(member.filename):
                    drawing = _decode(f"{name}: {member.filename}", _content(name, archive, member))
                    drawn[match["alphabet"], match["character"]].append(drawing)
    return dict(drawn)


def _content(name: str, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """One member, whose size is looked at before anything is unpacked; no more than it claims comes out of it."""
    if member.file_size > LARGEST_DRAWING:
        got = f"{name} holds {member.filename[:80]} with {member.file_size:,} bytes"
        raise DataError(got, f"a drawing of {LARGEST_DRAWING:,} at most", "this is another file")
    return archive.read(member)


def _decode(name: str, content: bytes) -> npt.NDArray[np.uint8]:
    """One drawing, uint8 ``[28, 28]`` with ink 255.

    # NOTE [grey, then invert, then resize]
    The filter rounds, so inverting after it instead of before differs by one grey level in some pixels.
    """
    with (
        whole(f"{name} is not a readable image", "a PNG", BROKEN_IMAGE, "download the zip again"),
        Image.open(io.BytesIO(content), formats=("PNG",)) as image,
    ):
        if image.size != OFFICIAL_SIZE:
            raise DataError(f"{name} is {image.size[0]}x{image.size[1]} pixels", "105x105")
        ink = 255 - np.asarray(image.convert("L"))
    return np.asarray(Image.fromarray(ink).resize(SIZE, Image.Resampling.BILINEAR))
