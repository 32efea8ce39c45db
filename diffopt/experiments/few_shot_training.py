"""A run of few-shot training: looks at validation episodes on the way, and a test of what is chosen in the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, final

import torch
from torch import nn

from diffopt.experiments.framework.experiment import Row
from diffopt.experiments.framework.few_shot_problem import (
    Adaptation,
    FewShot,
    classification,
    evaluate_adapted,
    interval,
)
from diffopt.experiments.framework.image_sets import Images
from diffopt.experiments.framework.outer_loop import FAILED, train
from diffopt.experiments.framework.unit_context import Work


@final
class Validation:
    """The best parameters so far by validation episodes, and how that went.

    Attributes:
        problem: whose parameters are looked at, with validation episodes for its evaluation.
        adaptation: in the looks.
        best: the parameters.
        curves: accuracies in per cent, after how many iterations, and the processor seconds that looking took.
    """

    def __init__(self, problem: FewShot, adaptation: Adaptation, episodes: int) -> None:
        """Look at nothing yet."""
        self.problem, self.adaptation, self._episodes = problem, adaptation, episodes
        self.best = {key: value.detach().clone() for key, value in problem.params.items()}
        self.curves: dict[str, list[float]] = {"validation": [], "after": [], "evaluating": []}

    def look(self, after: int) -> None:
        """Measure the parameters of the problem as they now are, and keep them if they are the best."""
        began, params = time.process_time(), self.problem.params
        accuracy = 100 * float(evaluate_adapted(self.problem, params, self.adaptation, self._episodes).mean())
        if accuracy > max(self.curves["validation"], default=-1.0):
            with torch.no_grad():
                for key, value in params.items():
                    self.best[key].copy_(value)
        lasted = time.process_time() - began
        for name, number in zip(self.curves, (accuracy, after, lasted), strict=True):
            self.curves[name].append(number)

    def left_out(self, clock: list[float]) -> list[float]:
        """The times of iterations without those of the looks before them."""
        looks = list(zip(self.curves["after"], self.curves["evaluating"], strict=True))
        return [t - sum(lasted for after, lasted in looks if after <= i) for i, t in enumerate(clock)]


def validated_and_tested(
    title: str, network: nn.Module, images: list[Images], settings: Any, way: int, shot: int, device: str
) -> tuple[FewShot, FewShot]:
    """The problem with validation episodes for its evaluation, and with test episodes, from images of three splits."""
    sizes = {"way": way, "shot": shot, "queries": settings.queries}
    first, second = (classification(title, network, images[0], side, device=device, **sizes) for side in images[1:])
    return first, replace(first, evaluation=second.evaluation)


def trained_and_tested(
    work: Work,
    settings: Any,
    outer: torch.optim.Optimizer,
    generators: Mapping[str, torch.Generator],
    iterate: Callable[[int], float],
    validation: Validation,
    tested: FewShot,
    *,
    choose: bool,
) -> Row:
    """Train the parameters that ``validation`` looks at, and test them.

    Args:
        work: of the unit.
        settings: how many ``iterations``, ``checkpoints`` at which validation looks, and test ``episodes``.
        outer: see :func:`train`.
        generators: see :func:`train`.
        iterate: see :func:`train`.
        validation: what looks.
        tested: the problem with test episodes.
        choose: test the best parameters by validation, not the last; then those before training are not looked at.

    Returns:
        The outer losses and processor seconds over the iterations, validations left out; the accuracies on validation
        episodes in per cent, and after which iterations; the test accuracy, half the width of its 95 % interval over
        the episodes, and the accuracies on each of them. Of a run that diverged: the error.
    """
    every, params = -(-settings.iterations // settings.checkpoints), validation.problem.params

    def looked(iteration: int) -> float:
        if iteration % every == 0 and (iteration or not choose):
            validation.look(iteration)
        return iterate(iteration)

    kept: dict[str, Any] = {"tensors": validation.best, "curves": validation.curves}
    try:
        losses, clock = train(work, params, outer, generators, settings.iterations, looked, **kept)
        validation.look(settings.iterations)
        chosen = validation.best if choose else params
        tests = 100 * evaluate_adapted(tested, chosen, validation.adaptation, settings.episodes)
    except FAILED as error:
        return {"diverged": type(error).__name__}
    figures = dict(zip(("accuracy", "half_width"), interval(tests), strict=True))
    each = [round(value, 3) for value in tests.tolist()]
    return {"losses": losses, "seconds": validation.left_out(clock), **validation.curves, **figures, "each": each}
