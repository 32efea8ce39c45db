"""Inner products, norms and multiples of stacked problems, each task's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffopt.tensors.leaves import Leaves
from diffopt.tensors.spread import gathered, largest_modulus


@final
@dataclass(frozen=True)
class Tasks:
    """Inner products and multiples of ``Leaves`` whose first ``axes`` axes are independent problems.

    Scalars are in single precision at least: sums of squares overflow, or vanish, in half precision.
    """

    axes: int

    def dot(self, a: Leaves, b: Leaves) -> Tensor:
        """The inner product, one per task."""
        pairs = zip(a.widened(), b.widened(), strict=True)
        parts = [self._sum(x * y) for x, y in pairs]
        return gathered(parts[0]) if len(parts) == 1 else gathered(torch.stack(parts).sum(0))

    def _sum(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[: self.axes], -1).sum(-1) if self.axes else x.sum()

    def norm(self, a: Leaves) -> Tensor:
        """The Euclidean norm, one per task; of numbers so small or large that their squares are 0 or infinite, too."""
        wide = a.widened()
        scale = power_of_two(self.largest(wide))
        scaled = self.like(1 / scale, wide) * wide
        return scale * self.dot(scaled, scaled).sqrt()

    def largest(self, a: Leaves) -> Tensor:
        """The largest modulus of an entry, one per task."""
        if self.axes:
            return torch.stack([x.abs().reshape(*x.shape[: self.axes], -1).amax(-1) for x in a]).amax(0)
        return torch.stack([largest_modulus(x) for x in a]).amax(0)

    def unit(self, a: Leaves) -> Leaves:
        """A vector of norm 1 in the same direction, one per task; zero for zero."""
        scale = power_of_two(self.largest(a.widened()))
        scaled = self.like(1 / scale, a.widened()) * a.widened()  # a norm between 1 and the root of their number
        size = self.norm(scaled)
        return self.times(torch.where(size > 0, 1 / torch.where(size > 0, size, 1), 0), scaled).cast(a)

    def like(self, scalars: Tensor, a: Leaves) -> Leaves:
        """One scalar per task, shaped to broadcast against each leaf."""
        if not self.axes:
            return a.map(lambda x: scalars.to(x.dtype))
        return a.map(lambda x: scalars.reshape(scalars.shape + (1,) * (x.ndim - self.axes)).to(x.dtype))

    def times(self, factor: Tensor, a: Leaves) -> Leaves:
        """A multiple, each task with its own factor."""
        alike = factor.ndim == 0 and all(x.dtype == factor.dtype for x in a)
        return a * factor if alike else self.like(factor, a) * a

    def plus(self, x: Leaves, factor: Tensor, a: Leaves) -> Leaves:
        """``x`` and a multiple of ``a``, each task with its own factor."""
        return x.map(torch.addcmul, self.like(factor, a), a)

    def start(self, a: Leaves) -> Leaves:
        """A fixed vector, the same for every task, that no symmetry of a problem is likely to annihilate."""

        def one(x: Tensor) -> Tensor:
            own = x.shape[self.axes :]
            numbers = torch.arange(1, own.numel() + 1, device=x.device).sin().to(x.dtype)
            return numbers.reshape(own).expand(x.shape)

        return a.map(one)

    def flatten(self, a: Leaves) -> Tensor:
        """One vector per task, ``[..., n]``."""
        return torch.cat([gathered(x).reshape(*x.shape[: self.axes], -1) for x in a], dim=-1)

    def unflatten(self, vector: Tensor, like: Leaves) -> Leaves:
        """The inverse of :meth:`flatten`."""
        sizes = [x[(0,) * self.axes].numel() for x in like]
        return Leaves(v.reshape(x.shape) for v, x in zip(torch.split(vector, sizes, dim=-1), like, strict=True))


def power_of_two(sizes: Tensor) -> Tensor:
    """The power of two, which rounds nothing, at or below each size, with an inverse that is finite; 1 for no size."""
    least = torch.finfo(sizes.dtype).tiny * 4
    usable = sizes.isfinite() & (sizes > 0)
    sizes = torch.where(usable, sizes, 1)
    powers = sizes / (2 * torch.frexp(sizes).mantissa)  # (its exponent as integers the compiler cannot calculate with)
    return torch.where(usable, powers.clamp(min=least), 1)
