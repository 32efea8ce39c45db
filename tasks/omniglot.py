"""Omniglot: 1,623 handwritten characters of 50 alphabets, each drawn by 20 people."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, final, get_args

import numpy as np
import torch
from torch import Tensor

from diffopt.tasks.classification import Form, KnownSet
from diffopt.tasks.data import KnownFile, expanded
from diffopt.tasks.errors import DataError
from diffopt.tasks.omniglot_archive import Drawings, read_archives

Split: TypeAlias = Literal["background", "evaluation", "vinyals-train", "vinyals-validation", "vinyals-test"]

SINGLE_FILE = KnownFile(
    "omniglot_28.npz", 5_524_973, "a8d9a1e90a86a4778f522d5f9999cc75fd540b7b56eb663729281c39252aa7ca"
)
BACKGROUND = KnownFile(
    "images_background.zip", 9_464_212, "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640"
)
EVALUATION = KnownFile(
    "images_evaluation.zip", 6_462_886, "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee"
)
SMALL_BACKGROUND = (
    KnownFile(
        "images_background_small1.zip",
        1_319_022,
        "f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4",
    ),
    KnownFile(
        "images_background_small2.zip",
        1_580_917,
        "3ccaa407515a8778e5d0861875af38b17e418f301ad5bb3b5a6b65d901a41c7f",
    ),
)
ORIGIN = "github.com/brendenlake/omniglot"
CODES = ("vinyals-train", "vinyals-validation", "vinyals-test")


def _forms(split: Split, size: int) -> list[Form[Drawings]]:
    def single(place: Path) -> Drawings:
        with np.load(io.BytesIO(SINGLE_FILE.read(place)), allow_pickle=False) as file:
            if split in CODES:
                chosen = file["vinyals_split"] == CODES.index(split)
            else:
                chosen = file["is_background"] == (split == "background")
            alphabets = file["alphabet_names"][file["alphabet"][chosen]].tolist()
            characters = file["character_names"][chosen].tolist()
            return Drawings(file["images"][chosen], tuple(alphabets), tuple(characters))

    def zips(*known: KnownFile) -> Form[Drawings]:
        def read(place: Path) -> Drawings:
            return read_archives([(one.name, io.BytesIO(one.read(place))) for one in known])

        small = SMALL_BACKGROUND[0].name if known[0] in SMALL_BACKGROUND else ""
        return Form(tuple(one.name for one in known), read, small)

    first, second = SMALL_BACKGROUND
    archives = {
        "background": [zips(BACKGROUND), zips(first, second), zips(first), zips(second)],
        "evaluation": [zips(EVALUATION)],
    }
    shown = f"{SINGLE_FILE.name} (the official zips do not know the Vinyals splits)" if split in CODES else ""
    return [Form((SINGLE_FILE.name,), single, shown), *archives.get(split, [])]


_KNOWN = KnownSet("Omniglot", 28, _forms, ORIGIN, splits=get_args(Split))


@final
@dataclass(frozen=True, eq=False)
class Omniglot:
    """The images of one split, 28x28 with ink 255 and paper 0.

    The official drawings are 105x105 with one bit per pixel. They are turned to grey, inverted and resized
    with Pillow's antialiased bilinear filter. :func:`diffopt.tasks.sample_episodes` draws few-shot tasks from
    ``images``.

    Reference: Lake, Salakhutdinov, Tenenbaum (2015), "Human-level concept learning through probabilistic
    program induction". Vinyals splits: Vinyals et al. (2016), "Matching Networks for One Shot Learning".

    Attributes:
        images: uint8, ``[classes, 20, 28, 28]``.
        alphabets: for each class, the name of its alphabet.
        characters: for each class, the name of its character, such as ``character01``; numbered within its
            alphabet.
        sources: the names of the files that were read.
    """

    images: Tensor
    alphabets: tuple[str, ...]
    characters: tuple[str, ...]
    sources: tuple[str, ...]

    @classmethod
    def load(cls, folder: str | Path | None = None, *, split: Split, rotations: bool = False) -> Omniglot:
        """Read one split from the files in ``folder``, each checked by size and SHA-256.

        Read is the first of these that is there: ``omniglot_28.npz`` (all characters in one file, already
        28x28, and the only one that knows the Vinyals splits); the official ``images_background.zip`` or
        ``images_evaluation.zip``; for the background split, whichever are there of the official
        ``images_background_small1.zip`` and ``images_background_small2.zip`` (five of the thirty background
        alphabets each, eight together). ``sources`` says which it was. Zips are decoded at each call, which
        takes seconds.

        Args:
            folder: where to look; see :func:`diffopt.tasks.data_folder`.
            split: ``background`` and ``evaluation`` are the official ones and have no alphabet in common (964
                and 659 characters). The Vinyals splits have 1028, 172 and 423 characters; their alphabets
                overlap, and so do they and the official ones.
            rotations: also turn every class by 90, 180 and 270 degrees, as by :meth:`rotated`.

        Raises:
            DataError: the split is unknown, no usable file is there, or a file is not what its name says.
        """
        drawings, sources = _KNOWN.find(folder, split)
        loaded = cls(torch.from_numpy(drawings.images), drawings.alphabets, drawings.characters, sources)
        return loaded.rotated() if rotations else loaded

    @classmethod
    def from_archives(cls, paths: Sequence[str | Path]) -> Omniglot:
        """Read zips of the official layout, ``<stem>/<alphabet>/characterNN/XXXX_YY.png``, with any checksum.

        Raises:
            DataError: a file is missing, is not a zip, or does not hold what the layout promises.
        """
        if isinstance(paths, str | Path):
            raise DataError(f"paths is {str(paths)!r}", "a list of paths", "put it in [ ]")
        named = [(str(path), expanded(path)) for path in paths]
        drawings, sources = read_archives(named), tuple(path.name for _, path in named)
        return cls(torch.from_numpy(drawings.images), drawings.alphabets, drawings.characters, sources)

    def rotated(self) -> Omniglot:
        """These classes, then all of them turned by 90 degrees counterclockwise, by 180, by 270."""
        turned = [torch.rot90(self.images, quarter, dims=(2, 3)) for quarter in range(4)]
        names = [f"{name} rotated {90 * quarter}" for quarter in (1, 2, 3) for name in self.characters]
        return Omniglot(torch.cat(turned), self.alphabets * 4, (*self.characters, *names), self.sources)
