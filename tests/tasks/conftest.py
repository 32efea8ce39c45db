"""What tests of the tasks share: a generator, and a measure of data that has been measured elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffopt.tasks import RaggedImages, sample_episodes


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20)


@pytest.fixture
def nearest_neighbours() -> Callable[[Tensor | RaggedImages, int], float]:
    """The accuracy of the nearest neighbour in pixels, on 600 episodes of five classes."""

    def accuracy(images: Tensor | RaggedImages, shot: int) -> float:
        drawn = torch.Generator().manual_seed(0)
        episodes = sample_episodes(images, way=5, shot=shot, query=15, tasks=600, generator=drawn)
        distance = torch.cdist(episodes.query_inputs.flatten(2), episodes.support_inputs.flatten(2))
        nearest = episodes.support_targets.gather(1, distance.argmin(dim=2))
        return float((nearest == episodes.query_targets).float().mean())

    return accuracy
