"""How far a hypergradient tells what the outer loss does: beside differences of it at several step sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

CLOSE = 0.1
"""The relative error up to which a number is as good as any."""

WORTHLESS = 0.5
"""The relative error from which on it says nothing."""

CALMER = "lower the learning rate, take fewer steps, smooth the loss, or give Adam a larger eps"
"""What makes an outer loss smoother."""

_MOVES = (1e-1, 1e-2, 1e-3, 1e-4)
"""The sizes of the moves that an outer optimizer makes, relative to what is moved."""

_PROBES = (1e-6, 1e-8)
"""Those at which a derivative shows, however rough the outer loss is at the others."""

_CONVERGED = 1e-3
"""The relative error below which smaller moves say nothing new."""

Value: TypeAlias = Callable[[Sequence[Tensor]], Tensor]
"""The outer loss, a number, of other values of the tensors that it depends on."""


@final
@dataclass(frozen=True)
class Smoothness:
    """The relative error of a hypergradient beside differences of the outer loss.

    Attributes:
        errors: by the size of the moves, relative to what is moved, the largest first; as many as were needed, without
            those whose differences round-off hides.
        derivative: whether it is the derivative of the outer loss: ``True`` at the smallest moves, whatever it is at
            larger ones; ``False``: differences settle at other numbers; ``None``: it cannot be told, since they do not
            settle at all or are lost in round-off before.
    """

    errors: dict[float, float]
    derivative: bool | None = True

    @property
    def hidden(self) -> bool:
        """Whether the outer loss changes by less than its round-off, whatever the move."""
        return not self.errors

    @property
    def cut_short(self) -> bool:
        """Whether round-off hides the moves at which it would be told whether it is the derivative."""
        return self.derivative is None and not any(size in self.errors for size in _PROBES)

    @property
    def undefined(self) -> bool:
        """Whether it is the derivative, of an outer loss that is a number at none of the moves."""
        return self.derivative is True and math.isinf(self.error)

    @property
    def error(self) -> float:
        """The smallest error at moves such as an outer optimizer makes, 1e-4 or more; 1: nothing is told of it."""
        return min((error for size, error in self.errors.items() if size >= _MOVES[-1]), default=1.0)

    def __str__(self) -> str:
        """The errors, in words."""
        errors = ", ".join(f"{error:.1g}" for error in self.errors.values())
        return f"{errors} for moves of {', '.join(f'{size:g}' for size in self.errors)} of the size"


def smoothness(value: Value, leaves: Sequence[Tensor], gradient: Sequence[Tensor], directions: int) -> Smoothness:
    r"""Set a hypergradient beside central differences of the outer loss along random directions.

    .. math:: \frac{\|q(h) - s\|}{\max(\|q(h)\|, \|s\|)},\qquad
              q_k(h) = \frac{F(\theta + h u_k) - F(\theta - h u_k)}{2h},\quad s_k = \nabla F^\top u_k

    for ``h`` of 0.1, 0.01, 1e-3 and 1e-4, until it is below a thousandth; where it is never below a tenth, for 1e-6 and
    1e-8 as well. A move of ``h = 1`` has the size of ``theta`` itself, entry by entry.

    # NOTE [round-off is no agreement]
    Where round-off could have made a tenth of both numbers, they say nothing, whether they agree or not: that ``h``
    does not count. The smaller ``h``, the larger is round-off, so that a large outer loss hides the smallest moves.

    Args:
        value: the outer loss; NaN or infinite where it has none.
        leaves: ``theta``, in the precision in which ``value`` is to be taken.
        gradient: the hypergradient at ``leaves``, a tensor for each.
        directions: how many; ``2 * directions`` values for each ``h``.
    """
    moves = _random_moves(leaves, directions)
    errors: dict[float, float] = {}
    seen: list[Tensor] = []
    for size in (*_MOVES, *_PROBES):
        best = min(errors.values(), default=math.inf)
        if best <= _CONVERGED or (size in _PROBES and best <= CLOSE):
            return Smoothness(errors)
        rows = [_slopes(value, leaves, gradient, move, size) for move in moves]
        quotients, slopes, noises = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
        if not _lost(quotients, slopes, float(noises.norm())):
            errors[size] = _relative(quotients, slopes)
            seen.append(quotients)
    if not errors:
        return Smoothness(errors, None)
    smallest = min(errors)
    right = True if errors[smallest] <= CLOSE else False if _settled(seen, smallest) else None
    return Smoothness(errors, right)


def _settled(seen: Sequence[Tensor], smallest: float) -> bool:
    """Whether differences agree at the smallest moves that count.

    Two sizes will do where a derivative shows. Where round-off hides that, a rough function may look smooth at larger
    moves: three.
    """
    last = seen[-2:] if smallest in _PROBES else seen[-3:]
    enough = len(last) == (2 if smallest in _PROBES else 3)
    return enough and all(_relative(a, b) <= 10 * _CONVERGED for a, b in itertools.pairwise(last))


def _lost(quotients: Tensor, slopes: Tensor, noise: float) -> bool:
    """Whether round-off could have made a tenth of both; of two zeros it made nothing, if anything has moved."""
    larger = _larger(quotients, slopes)
    return larger < noise / CLOSE and (larger > 0 or math.isinf(noise))


def _larger(found: Tensor, expected: Tensor) -> float:
    return max(float(found.norm()), float(expected.norm()))


def _relative(found: Tensor, expected: Tensor) -> float:
    error = float((found - expected).norm()) / (_larger(found, expected) + 1e-300)
    return error if math.isfinite(error) else math.inf


def _random_moves(leaves: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """Random directions in which every entry moves by its own size, a zero by the mean of its leaf, or by one."""
    generator = torch.Generator().manual_seed(0)

    def one(x: Tensor) -> Tensor:
        mean = x.abs().mean()
        size = torch.where(x == 0, torch.where(mean > 0, mean, 1), x.abs())
        return size * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)

    return [[one(x) for x in leaves] for _ in range(count)]


def _slopes(
    value: Value, leaves: Sequence[Tensor], gradient: Sequence[Tensor], move: Sequence[Tensor], size: float
) -> tuple[float, float, float]:
    """The difference quotient along a move as it is once rounded, the slope there, and the round-off to expect.

    That is infinite where the move is rounded to none.
    """
    up, down = ([x + sign * u for x, u in zip(leaves, move, strict=True)] for sign in (size, -size))
    ends = [value(there).detach() for there in (up, down)]
    along = [
        float((g.detach().double() * (a.double() - b.double())).sum())
        for g, a, b in zip(gradient, up, down, strict=True)
    ]
    noise = 100 * torch.finfo(ends[0].dtype).eps * (abs(float(ends[0])) + abs(float(ends[1]))) / size
    if all(torch.equal(a, b) for a, b in zip(up, down, strict=True)):
        noise = math.inf
    return (float(ends[0]) - float(ends[1])) / (2 * size), sum(along) / (2 * size), noise
