r"""Theorems 1 and 2 of the memory-reduced algorithm: the floor that sampled tasks leave, and the rate without sampling.

The problem is made so that the true gradient has a closed form. Descent takes so many tasks, drawn independently, in
each outer iteration, or all of them; each task keeps its inner solution and its multiplier from one visit to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import final

from diffopt.experiments.framework.experiment import Unit, starts
from diffopt.experiments.framework.options import listed, option, real, whole
from diffopt.experiments.framework.texts import described
from diffopt.experiments.memory_rates_problem import descend
from diffopt.experiments.memory_rates_report import pictures, summary


@final
@dataclass(frozen=True)
class Settings:
    """What is descended."""

    tasks: int = option(64, "tasks in all", whole(2))
    batches: tuple[int, ...] = option((1, 4, 16, 64), "tasks |B| that are sampled per iteration", listed(whole(1)))
    steps: int = option(5, "inner steps K of each visit", whole(1))
    products: int = option(3, "iterations N of conjugate gradients of each visit", whole(1))
    outer_lr: float = option(0.05, "constant step size of the outer descent", real(0))
    iterations: int = option(1000, "outer iterations", whole(2))
    seeds: int = option(3, "starts: other tasks, and other samples of them", whole(1))


def units(settings: Settings) -> list[Unit]:
    """For each start one for every number of sampled tasks, and one with all of them."""

    def of_one() -> list[Unit]:
        return [
            Unit(
                "all tasks" if size is None else f"|B|={size}",
                partial(descend, settings, size),
                keys={"tasks": size or 0},
            )
            for size in (*settings.batches, None)
        ]

    return starts(settings.seeds, of_one)


EXPERIMENT = described(
    "memory-rates",
    quick=Settings(8, (1, 4), 2, 2, iterations=60, seeds=2),
    standard=Settings(),
    full=Settings(iterations=20000, seeds=5),
    units=units,
    summary=summary,
    pictures=pictures,
)
