r"""Intervals over starts and episodes at once, and what they say about a claim.

A method is trained from ``S`` starts, and each result is tested on ``E`` episodes: ``values[s][e]``. Its mean varies
with the starts and with the episodes. Where every start is tested on the same episodes the two are crossed,

.. math:: \hat V = \frac{MS_s}{SE} + \frac{MS_e}{SE} - \frac{MS_r}{SE},

with the mean squares of starts, episodes and of what remains; where each start has episodes of its own, the means of
the starts hold both, and their variance by ``S`` is all. The interval is Student's, its degrees of freedom
Satterthwaite's. Two methods are compared by their differences from the same starts on the same episodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import numpy as np
from scipy.special import stdtrit  # type: ignore[import-untyped]

from diffopt.experiments.framework.experiment import Answer

Wanted: TypeAlias = Literal["above", "at least", "below", "at most", "within"]
CONFIDENCE = 0.95


@final
@dataclass(frozen=True)
class Effect:
    """A mean with its 95 % interval, which one start does not have.

    Attributes:
        mean: over starts and episodes.
        low: the lower end; minus infinity from one start.
        high: the upper end; infinity from one start.
        starts: how many.
    """

    mean: float
    low: float
    high: float
    starts: int

    @property
    def half_width(self) -> float | None:
        """Half the width of the interval; ``None`` where there is none."""
        half = (self.high - self.low) / 2
        return half if math.isfinite(half) else None

    def exponential(self) -> Effect:
        """Of the logarithms' effect that of the numbers themselves: a ratio."""
        return Effect(_exp(self.mean), _exp(self.low), _exp(self.high), self.starts)

    def __str__(self) -> str:
        """The mean and the ends."""
        if not math.isfinite(self.mean):
            return "not finite: a target not reached, or a run that diverged"
        if self.half_width is None:
            return f"{self.mean:.3g} (no interval)"
        return f"{self.mean:.3g} ({self.low:.3g} to {self.high:.3g})"


def two_level(values: Sequence[Sequence[float]], *, crossed: bool = False) -> Effect:
    """The mean over starts and episodes, with its interval over both.

    Args:
        values: by start, by episode; one number per start where nothing else is drawn.
        crossed: the episodes are the same ones for every start, in the same order.

    Raises:
        ValueError: there are no values, or ``crossed`` ones are not as many for every start.
    """
    means = [float(np.mean(row)) for row in values if len(row)]
    if not means or len(means) < len(values):
        raise ValueError("a start without values, expected one or more for each")
    mean, starts = float(np.mean(means)), len(means)
    if len(set(means)) == 1 and starts > 1 and not math.isfinite(mean):
        return Effect(mean, mean, mean, starts)  # every run diverged, or none came to its target
    if starts == 1 or not math.isfinite(mean):
        return Effect(mean, -math.inf, math.inf, starts)
    parts = [(float(np.var(means, ddof=1)) / starts, starts - 1.0)]
    if crossed and len(values[0]) > 1:
        parts += _episodes(np.asarray(values, dtype=np.float64))
    variance = max(sum(part for part, _ in parts), parts[0][0])
    if variance == 0:
        return Effect(mean, mean, mean, starts)
    freedom = variance**2 / sum(part**2 / own for part, own in parts)
    half = float(stdtrit(max(1.0, freedom), (1 + CONFIDENCE) / 2)) * math.sqrt(variance)
    return Effect(mean, mean - half, mean + half, starts)


def _episodes(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> list[tuple[float, float]]:
    """What the episodes, the same for every start, add to the variance of the mean; with the degrees of freedom."""
    starts, episodes = values.shape
    rest = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    freedom = (starts - 1.0) * (episodes - 1)
    by_episode = starts * float(np.var(values.mean(0), ddof=1))
    residual = float(np.square(rest).sum()) / freedom
    size = starts * episodes
    return [(by_episode / size, episodes - 1.0), (-residual / size, freedom)]


def differences(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], *, logarithms: bool = False
) -> list[list[float]]:
    """First minus second, or the difference of their logarithms, from the same starts on the same episodes."""

    def apart(a: float, b: float) -> float:
        if logarithms:
            a, b = (math.log(x) if x > 0 else -math.inf for x in (a, b))
        return a - b if math.isfinite(a) or math.isfinite(b) else math.nan

    return [[apart(a, b) for a, b in zip(*rows, strict=True)] for rows in zip(first, second, strict=True)]


def judged(effect: Effect, wanted: Wanted, margin: float, zero: float) -> Answer:
    """What an effect says about a claim.

    Args:
        effect: what was measured.
        wanted: on which side of the margin it is claimed to be; ``within``: so near to ``zero``, or by such a factor.
        margin: of the claim.
        zero: what no effect at all would be: 0 for differences, 1 for ratios.

    Returns:
        ``yes`` or ``no`` where the whole interval lies on one side of the margin. Where the margin is within, ``not
        decided``; but ``partly`` where more than a direction is claimed, and the whole interval is in that direction.
        From one start nothing is decided.
    """
    if wanted == "within":
        sides = (
            judged(effect, "at most", margin, zero),
            judged(effect, "at least", 1 / margin if zero else -margin, zero),
        )
        return "no" if "no" in sides else "yes" if sides == ("yes", "yes") else "not decided"
    sign = 1 if wanted in ("above", "at least") else -1
    low, high = sorted((sign * effect.low, sign * effect.high))
    margin, zero = sign * margin, sign * zero
    if low > margin or (low == margin and wanted.startswith("at")):
        return "yes"
    if high < margin or (low == high == margin):
        return "no"
    return "partly" if zero < margin and low > zero else "not decided"


def together(answers: Sequence[Answer], *, order: bool = False) -> Answer:
    """The answer to a claim from its answers in several settings.

    It is ``partly`` where some settings show it and others do not, and ``no`` where none shows it and one speaks
    against it. With ``order`` it is that nothing speaks against it and something for it.
    """
    known = [answer for answer in answers if answer != "not measured"]
    if not known:
        return "not measured"
    shown, against = ("yes" in known or "partly" in known), "no" in known
    if order:
        return "partly" if shown and against else "yes" if shown else "no" if against else "not decided"
    if all(answer == "yes" for answer in known):
        return "yes"
    return "partly" if shown else "no" if against else "not decided"


def _exp(value: float) -> float:
    return math.inf if value > 700 else math.exp(value)
