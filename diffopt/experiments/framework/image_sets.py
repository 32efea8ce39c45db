"""Few-shot image sets by name, each with its splits and sizes; the files' formats are the loaders' matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from diffopt.tasks import CIFARFS, FC100, Caltech101, MiniImageNet, Omniglot, RaggedImages, TieredImageNet
from diffopt.tasks.data import Split
from diffopt.tasks.omniglot import Split as OmniglotSplit

Images: TypeAlias = "Tensor | RaggedImages"


@final
@dataclass(frozen=True)
class ImageSet:
    """A set of images in classes.

    Attributes:
        title: in words.
        channels: 1 or 3.
        size: height and width.
        load: ``load(folder, split, rotations)``; ``rotations`` makes further classes of turned training images, where
            that is the custom.
    """

    title: str
    channels: int
    size: int
    load: Callable[[str | None, Split, bool], Images]


def _omniglot(folder: str | None, split: Split, rotations: bool) -> Images:
    """The background alphabets for training; of the evaluation alphabets every fourth for validation."""
    if split == "train":
        return Omniglot.load(folder, split="background", rotations=rotations).images
    loaded = Omniglot.load(folder, split="evaluation")
    chosen = sorted(set(loaded.alphabets))[::4]
    rows = [i for i, name in enumerate(loaded.alphabets) if (name in chosen) == (split == "validation")]
    return loaded.images[rows]


def _vinyals(folder: str | None, split: Split, rotations: bool) -> Images:
    """Characters drawn at random from all alphabets by Vinyals et al. (2016), as most papers have them.

    Turned images are further classes of every split, as Santoro et al. (2016) have them: "Meta-Learning with
    Memory-Augmented Neural Networks", section 4.1.
    """
    sides: dict[Split, OmniglotSplit] = {
        "train": "vinyals-train",
        "validation": "vinyals-validation",
        "test": "vinyals-test",
    }
    return Omniglot.load(folder, split=sides[split], rotations=rotations).images


def _clusters(folder: str | None, split: Split, rotations: bool) -> Images:
    """Random images, each blurred by noise 20 times over: 30 classes, other ones for every split; needs no file."""
    generator = torch.Generator().manual_seed(("train", "validation", "test").index(split))
    centres = torch.rand(30, 1, 16, 16, generator=generator)
    noise = torch.randn(30, 20, 16, 16, generator=generator)
    return (255 * (centres + 0.3 * noise).clamp(0, 1)).round().to(torch.uint8)


SETS: dict[str, ImageSet] = {
    "omniglot": ImageSet("Omniglot", 1, 28, _omniglot),
    "omniglot-vinyals": ImageSet("Omniglot (characters as split by Vinyals et al.)", 1, 28, _vinyals),
    "caltech101": ImageSet(
        "Caltech-101 at 32x32, a stand-in for CIFAR-FS", 3, 32, lambda f, s, r: Caltech101.load(f, split=s).images
    ),
    "cifar-fs": ImageSet("CIFAR-FS", 3, 32, lambda f, s, r: CIFARFS.load(f, split=s).images),
    "fc100": ImageSet("FC100", 3, 32, lambda f, s, r: FC100.load(f, split=s).images),
    "mini-imagenet": ImageSet("miniImageNet", 3, 84, lambda f, s, r: MiniImageNet.load(f, split=s).images),
    "tiered-imagenet": ImageSet("tieredImageNet", 3, 84, lambda f, s, r: TieredImageNet.load(f, split=s).images),
    "clusters": ImageSet("noisy clusters", 1, 16, _clusters),
}


def shrunk(images: Images, side: int) -> Images:
    """The images averaged down to ``side`` pixels each way, uint8 again."""
    if isinstance(images, RaggedImages):
        return RaggedImages(_shrunk(images.flat, side), images.counts)
    return _shrunk(images.flatten(0, 1), side).reshape(*images.shape[:-2], side, side)


def _shrunk(images: Tensor, side: int) -> Tensor:
    return torch.cat(
        [adaptive_avg_pool2d(part.float(), side).round().to(torch.uint8) for part in torch.split(images, 4096)]
    )


def load(name: str, split: Split, folder: str | None, device: str = "cpu", *, rotations: bool = False) -> Images:
    """One split of a set, uint8, on ``device``.

    Raises:
        DataError: the files are not there.
    """
    return SETS[name].load(folder, split, rotations).to(device)
