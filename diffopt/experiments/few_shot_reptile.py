"""Reptile by its own algorithm: what it takes its steps on, and how its outer step is made."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor

from diffopt.tasks import Episodes


def in_batches(episodes: Episodes, steps: int, size: int, generator: torch.Generator) -> Episodes:
    """The same tasks with a support set of ``steps`` batches, each ``size`` of all images of the task.

    Reptile has no query set: it learns from all images of a task, in batches drawn through one shuffle after the other.
    On the support set alone it would learn to fit five images by five steps, which says nothing about others.

    Returns:
        Support ``[tasks, steps, size, ...]``, each batch without an image twice if it begins a shuffle; queries as
        they are.

    Reference: Nichol et al. (2018), "On First-Order Meta-Learning Algorithms", algorithm 1 and section 6.1.
    """
    inputs = torch.cat((episodes.support_inputs, episodes.query_inputs), 1)
    targets = torch.cat((episodes.support_targets, episodes.query_targets), 1)
    tasks, images = targets.shape[:2]
    size = min(size, images)
    shuffles = -(-steps * size // images)
    keys = torch.rand(tasks, shuffles, images, generator=generator, device=generator.device)
    order = keys.argsort(dim=2).flatten(1)[:, : steps * size].to(targets.device)
    rows = torch.arange(tasks, device=targets.device)[:, None]
    inputs, targets = (
        rearrange(x[rows, order], "tasks (steps images) ... -> tasks steps images ...", steps=steps)
        for x in (inputs, targets)
    )
    return episodes._replace(support_inputs=inputs, support_targets=targets)


def outer_steps(params: Iterable[Tensor], rate: float, tasks: int) -> torch.optim.SGD:
    """The step of ``rate`` towards the mean of the tasks' solutions.

    The direction of :class:`diffopt.estimators.Reptile` is the sum over tasks, whatever the outer loss.
    """
    return torch.optim.SGD(params, lr=rate / tasks)
