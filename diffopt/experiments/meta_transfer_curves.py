"""How the step sizes of meta-transfer are annealed, and the ways to normalise the gradient difference of Fig. 1."""

from __future__ import annotations

from math import cos, pi

from diffopt.experiments.framework.experiment import Row


def annealing(iteration: int, iterations: int) -> float:
    """What the step size of an iteration is multiplied by; from one to zero along a cosine."""
    return (1 + cos(pi * iteration / iterations)) / 2


def difference_curve(row: Row, key: str, iterations: int) -> list[float]:
    """``difference`` or ``relative difference`` as measured; ``per step size``: the latter over the annealed size."""
    if key != "per step size":
        return list(row[key])
    measured = zip(row["after"], row["relative difference"], strict=False)  # accuracy is measured once more, in the end
    return [value / annealing(after + 1, iterations) for after, value in measured]  # an update comes before
