"""Few-shot episodes, stacked over tasks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from diffopt.tasks.errors import DataError, ProblemError


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
    images: Tensor, *, way: int, shot: int, query: int, tasks: int, generator: torch.Generator
) -> Episodes:
    """Draw N-way K-shot classification episodes.

    Each task draws ``way`` classes and, of each, ``shot + query`` images, all uniformly and without
    replacement, so support and query are disjoint. Labels number the drawn classes in the order in which they
    were drawn; rows are ordered by label. The result depends on the images, the sizes and the generator's
    state only.

    Args:
        images: uint8, ``[classes, examples, height, width]`` or ``[classes, examples, channels, height,
            width]``.
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
    for name, size in sizes.items():
        if size < 1:
            raise ProblemError(f"{name} is {size}; expected 1 or more")
    if images.dtype != torch.uint8 or images.ndim not in (4, 5):
        kind = f"{str(images.dtype).removeprefix('torch.')} of shape {tuple(images.shape)}"
        raise DataError(f"images are {kind}; expected uint8 [classes, examples, (channels,) height, width]")
    classes, examples = images.shape[:2]
    if classes < way:
        raise DataError(f"way is {way} but there are only {classes} classes; lower way or use a larger split")
    if examples < shot + query:
        raise DataError(f"shot + query is {shot} + {query} but a class has only {examples} images; lower one of them")

    # The places of the largest of many uniform numbers are a draw without replacement, for all tasks at once.
    class_keys = torch.rand(tasks, classes, generator=generator, device=generator.device)
    example_keys = torch.rand(tasks, way, examples, generator=generator, device=generator.device)
    class_index = class_keys.topk(way, dim=1).indices[:, :, None].to(images.device)
    example_index = example_keys.topk(shot + query, dim=2).indices.to(images.device)
    drawn = images[class_index, example_index]  # [tasks, way, shot + query, ...]
    if images.ndim == 4:
        drawn = rearrange(drawn, "tasks way image height width -> tasks way image 1 height width")
    support_inputs, support_targets = _one_side(drawn[:, :, :shot])
    query_inputs, query_targets = _one_side(drawn[:, :, shot:])
    return Episodes(support_inputs, support_targets, query_inputs, query_targets)


def _one_side(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and labels of one side, from uint8 ``[tasks, way, images, channels, height, width]``."""
    inputs = rearrange(drawn, "tasks way image ... -> tasks (way image) ...").to(torch.float32).div_(255)
    tasks, way, count = drawn.shape[:3]
    labels = torch.arange(way, device=drawn.device)
    # Contiguous because transforms of torch.func refuse to write into, or differentiate at, expanded tensors.
    return inputs, repeat(labels, "way -> tasks (way image)", tasks=tasks, image=count).contiguous()
