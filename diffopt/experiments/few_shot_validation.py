"""The choice of the parameters that are tested: the best so far on validation episodes."""

from __future__ import annotations

import time
from typing import final

import torch

from diffopt.experiments.framework.few_shot_problem import Adaptation, FewShot, evaluate_adapted


@final
class Validation:
    """The best parameters so far by validation episodes, and how that went.

    Attributes:
        best: the parameters.
        curves: accuracies in per cent, after how many iterations, and the processor seconds that looking took.
    """

    def __init__(self, problem: FewShot, adaptation: Adaptation, episodes: int) -> None:
        """Look at nothing yet."""
        self._problem, self._adaptation, self._episodes = problem, adaptation, episodes
        self.best = {key: value.detach().clone() for key, value in problem.params.items()}
        self.curves: dict[str, list[float]] = {"validation": [], "after": [], "evaluating": []}

    def look(self, after: int) -> None:
        """Measure the parameters of the problem as they now are, and keep them if they are the best."""
        began, params = time.process_time(), self._problem.params
        accuracy = 100 * float(evaluate_adapted(self._problem, params, self._adaptation, self._episodes).mean())
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
