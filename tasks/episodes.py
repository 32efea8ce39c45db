"""Few-shot episodes, stacked over tasks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from diffopt.tasks.errors import DataError, ProblemError
from diffopt.tasks.ragged import RaggedImages
from diffopt.tensors.arguments import check_generator, check_integer
from diffopt.tensors.tree import describe


class Episodes(NamedTuple):
    """Several tasks of one size, stacked; the leading axis is the one for ``torch.func.vmap``.

    Attributes:
        support_inputs: what the inner problem learns from, ``[tasks, support, ...]``.
        support_targets: their labels or values, ``[tasks, support]`` or ``[tasks, support, outputs]``.
        query_inputs: what the outer loss is measured on, ``[tasks, query, ...]``.
        query_targets: their labels or values.
    """

    support_inputs: Tensor
    support_targets: Tensor
    query_inputs: Tensor
    query_targets: Tensor


def sample_episodes(
    images: Tensor | RaggedImages, *, way: int, shot: int, query: int, tasks: int, generator: torch.Generator
) -> Episodes:
    """Draw N-way K-shot classification episodes.

    Each task draws ``way`` classes and, of each, ``shot + query`` images, all uniformly and without
    replacement, so support and query are disjoint. Labels number the drawn classes in the order in which they
    were drawn; rows are ordered by label. The result depends on the images, the sizes and the generator's
    state only.

    Args:
        images: uint8, ``[classes, examples, height, width]`` or ``[classes, examples, channels, height,
            width]``; or :class:`diffopt.tasks.RaggedImages`. They stay uint8; only what is drawn becomes float.
        way: classes per task.
        shot: support images per class.
        query: query images per class.
        tasks: number of tasks.
        generator: source of all randomness; it may live on another device than the images.

    Returns:
        Inputs float32 in ``[0, 1]``, ``[tasks, way * shot, channels, height, width]`` for the support and
        ``[tasks, way * query, channels, height, width]`` for the query; labels int64 in ``0 .. way - 1``. All
        on the images' device.

    Raises:
        DataError: the images are not uint8 of one of the two shapes, or hold too few classes or examples.
        ProblemError: a size is below 1.

    Example:
        >>> import torch
        >>> images = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 4, 2, 2)
        >>> episodes = sample_episodes(images, way=3, shot=1, query=2, tasks=5, generator=torch.Generator())
        >>> episodes.query_inputs.shape
        torch.Size([5, 6, 1, 2, 2])
        >>> episodes.query_targets[0].tolist()
        [0, 0, 1, 1, 2, 2]
    """
    sizes = {"way": way, "shot": shot, "query": query, "tasks": tasks}
    way, shot, query, tasks = (check_integer(name, size, 1, kind=ProblemError) for name, size in sizes.items())
    check_generator("generator", generator, ProblemError)
    classes, examples = _checked(images)
    if classes < way:
        raise DataError(
            f"way is {way}", f"at most {classes}", f"there are only {classes} classes; lower it or take a larger split"
        )
    if examples < shot + query:
        raise DataError(
            f"shot + query is {shot} + {query}",
            f"at most {examples}",
            f"a class has only {examples} images; lower one of them",
        )
    drawn = _drawn(images, way, shot + query, tasks, generator)
    support_inputs, support_targets = _one_side(drawn[:, :, :shot])
    query_inputs, query_targets = _one_side(drawn[:, :, shot:])
    return Episodes(support_inputs, support_targets, query_inputs, query_targets)


def _checked(images: Tensor | RaggedImages) -> tuple[int, int]:
    """The number of classes and of images in the smallest of them."""
    if not isinstance(images, Tensor | RaggedImages):
        raise DataError(f"images is {describe(images)}", "a uint8 tensor", "convert it with torch.as_tensor")
    stored, classes_axes = (images.flat, 1) if isinstance(images, RaggedImages) else (images, 2)
    if stored.dtype != torch.uint8 or stored.ndim - classes_axes not in (2, 3):
        kind = f"{str(stored.dtype).removeprefix('torch.')} of shape {tuple(stored.shape)}"
        axes = "images" if classes_axes == 1 else "classes, examples"
        raise DataError(f"images are {kind}", f"uint8 [{axes}, (channels,) height, width]")
    if isinstance(images, RaggedImages):
        return len(images), int(images.counts.min())
    return images.shape[0], images.shape[1]


def _drawn(images: Tensor | RaggedImages, way: int, count: int, tasks: int, generator: torch.Generator) -> Tensor:
    """Images drawn without replacement, uint8 ``[tasks, way, count, channels, height, width]``."""
    device = generator.device
    most = int(images.counts.max()) if isinstance(images, RaggedImages) else images.shape[1]
    # The places of the largest of many uniform numbers are a draw without replacement, for all tasks at once.
    class_keys = torch.rand(tasks, len(images), generator=generator, device=device)
    class_index = class_keys.topk(way, dim=1).indices[:, :, None]
    example_keys = torch.rand(tasks, way, most, generator=generator, device=device)
    if isinstance(images, RaggedImages):
        counts = images.counts.to(device)
        # Below every uniform number: what a smaller class does not have is never among the largest.
        example_keys.masked_fill_(torch.arange(most, device=device) >= counts[class_index], -1.0)
        starts = (counts.cumsum(0) - counts)[class_index]
        drawn = images.flat[(starts + example_keys.topk(count, dim=2).indices).to(images.flat.device)]
    else:
        example_index = example_keys.topk(count, dim=2).indices.to(images.device)
        drawn = images[class_index.to(images.device), example_index]
    if drawn.ndim == 5:
        drawn = rearrange(drawn, "tasks way image height width -> tasks way image 1 height width")
    return drawn


def _one_side(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and labels of one side, from uint8 ``[tasks, way, images, channels, height, width]``."""
    inputs = rearrange(drawn, "tasks way image ... -> tasks (way image) ...").to(torch.float32).div_(255)
    tasks, way, count = drawn.shape[:3]
    labels = torch.arange(way, device=drawn.device)
    # Contiguous because transforms of torch.func refuse to write into, or differentiate at, expanded tensors.
    return inputs, repeat(labels, "way -> tasks (way image)", tasks=tasks, image=count).contiguous()
