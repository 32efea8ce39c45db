"""Regression on random sine waves, the toy problem of few-shot learning; needs no download."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffopt.tasks.episodes import Episodes
from diffopt.tasks.errors import ProblemError
from diffopt.tensors.arguments import Options, check_generator, check_integer


@final
@dataclass(frozen=True)
class Sinusoid:
    """Each task is ``y = amplitude * sin(x - phase)`` seen at a few points.

    Amplitude is uniform in ``[0.1, 5]``, phase in ``[0, pi]``, ``x`` in ``[-5, 5]``; there is no noise.

    Reference: Finn, Abbeel, Levine (2017), "Model-Agnostic Meta-Learning for Fast Adaptation of Deep
    Networks", section 5.1.

    Attributes:
        shots: support points per task.
        queries: query points per task.

    Raises:
        ProblemError: a size is below 1.
    """

    shots: int = 10
    queries: int = 10

    def __post_init__(self) -> None:
        """Refuse empty sides."""
        options = Options(self)
        options.integer("shots", 1, kind=ProblemError)
        options.integer("queries", 1, kind=ProblemError)

    def sample(self, tasks: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Episodes:
        """Draw ``tasks`` sine waves.

        Args:
            tasks: number of tasks.
            generator: source of all randomness; the tensors live on its device.
            dtype: of all tensors.

        Returns:
            Inputs and targets ``[tasks, shots, 1]`` for the support, ``[tasks, queries, 1]`` for the query.

        Raises:
            ProblemError: ``tasks`` is below 1.
        """
        tasks = check_integer("tasks", tasks, 1, kind=ProblemError)
        check_generator("generator", generator, ProblemError)
        if not dtype.is_floating_point:
            raise ProblemError(f"dtype is {dtype}", "a floating one, such as torch.float32")

        def uniform(low: float, high: float, points: int) -> Tensor:
            draw = torch.rand(tasks, points, 1, generator=generator, dtype=dtype, device=generator.device)
            return low + (high - low) * draw

        amplitude, phase = uniform(0.1, 5.0, 1), uniform(0.0, math.pi, 1)
        inputs = uniform(-5.0, 5.0, self.shots + self.queries)
        targets = amplitude * torch.sin(inputs - phase)
        support, query = slice(None, self.shots), slice(self.shots, None)
        return Episodes(inputs[:, support], targets[:, support], inputs[:, query], targets[:, query])
