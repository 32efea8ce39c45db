"""Arithmetic on the leaves of a tree: what optimizers and estimators are written in.

``Leaves`` makes an update rule read like its formula and runs each operation over all leaves in one call
(``torch._foreach_*``); inside ``vmap``, which those calls do not know, it goes leaf by leaf.
"""

from __future__ import annotations

import cmath
from collections.abc import Callable, Iterable
from itertools import repeat
from types import SimpleNamespace
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from diffopt.tensors import transforms

_foreach: Any = SimpleNamespace(**{name: getattr(torch, f"_foreach_{name}") for name in ("add", "sub", "mul", "div")})

_WIDE = (torch.float32, torch.float64)
_LEAST_MAXIMUM = torch.finfo(torch.float16).max
_MOST_INTEGER = 2**63 - 1

Operand: TypeAlias = "Leaves | float | Tensor"


@final
class Leaves(tuple[Tensor, ...]):
    """A tuple of tensors with elementwise arithmetic.

    The other operand is a number (the same for every leaf), also one held in a tensor without axes, or another
    ``Leaves`` of equal length whose tensors broadcast against these. Nothing is done in place, and every operation is
    differentiable.

    Example:
        >>> import torch
        >>> x = Leaves([torch.tensor([1.0, 2.0]), torch.tensor(3.0)])
        >>> (1 - 2 * x).tensors
        (tensor([-1., -3.]), tensor(-5.))
    """

    __slots__ = ()
    __array_ufunc__ = None  # so that numpy's numbers leave the arithmetic to this class
    __eq__, __hash__ = object.__eq__, object.__hash__  # tensors have no one answer to ==

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors in a plain tuple."""
        return tuple.__getitem__(self, slice(None))

    def __getitem__(self, index: Any) -> Any:
        """One tensor for an integer, ``Leaves`` for a slice."""
        found = tuple.__getitem__(self, index)
        return Leaves(found) if isinstance(index, slice) else found

    def __repr__(self) -> str:
        """Shapes only: the values are rarely what one wants to see."""
        return f"Leaves({[tuple(tensor.shape) for tensor in self.tensors]})"

    def map(self, function: Callable[..., Tensor], *others: Leaves) -> Leaves:
        """Apply ``function`` leaf by leaf, with the corresponding leaves of ``others``."""
        if any(len(other) != len(self) for other in others):
            raise ValueError(f"{self} has {len(self)} leaves, expected as many as {others}")
        return Leaves(map(function, self, *others))

    def zeros(self) -> Leaves:
        """Zeros of the same shapes, dtypes and devices."""
        return Leaves(map(torch.zeros_like, self))

    def virtual_zeros(self) -> Leaves:
        """The same, each a single number that stands for all: they take no memory, and cannot be written to."""
        return Leaves([tensor.new_zeros(()).expand(tensor.shape) for tensor in self])

    def __add__(self, other: Operand) -> Leaves:  # type: ignore[override]  # a sum of numbers, no longer tuple
        """Elementwise sum."""
        return _apply(torch.add, _foreach.add, self, other)

    __radd__ = __add__

    def __sub__(self, other: Operand) -> Leaves:
        """Elementwise difference."""
        return _apply(torch.sub, _foreach.sub, self, other)

    def __rsub__(self, other: float) -> Leaves:
        """Elementwise ``other - self``."""
        return -self + other

    def __mul__(self, other: Operand) -> Leaves:  # type: ignore[override]
        """Elementwise product."""
        return _apply(torch.mul, _foreach.mul, self, other)

    def __rmul__(self, other: Operand) -> Leaves:  # type: ignore[override]
        """Elementwise product."""
        return _apply(torch.mul, _foreach.mul, self, other)

    def __truediv__(self, other: Operand) -> Leaves:
        """Elementwise quotient."""
        return _apply(torch.div, _foreach.div, self, other)

    def __rtruediv__(self, other: float) -> Leaves:
        """Elementwise ``other / self``."""
        return Leaves([other / tensor for tensor in self])

    def __pow__(self, exponent: float) -> Leaves:
        """Elementwise power with a fixed exponent."""
        return Leaves([tensor**exponent for tensor in self])

    def __neg__(self) -> Leaves:
        """Elementwise negative."""
        return self * -1.0

    def minus(self, scale: Operand, other: Leaves) -> Leaves:
        """``self - scale * other``, in one operation where ``scale`` is a number (and rounded once, as torch.optim)."""
        if not isinstance(scale, float | int) or (abs(scale) > _LEAST_MAXIMUM and self._cannot_hold(scale)):
            return self - scale * other
        if torch.is_grad_enabled() or transforms.current_level() is not None or not self:
            return Leaves([torch.add(a, b, alpha=-scale) for a, b in zip(self, other, strict=True)])
        return Leaves(_foreach.add(self, other, alpha=-scale))

    def _cannot_hold(self, scale: float) -> bool:
        """Whether a number is infinite in the dtype of a leaf: torch takes it as a factor, but not as ``alpha``."""
        return abs(scale) > _MOST_INTEGER or any(abs(scale) > torch.finfo(x.dtype).max for x in self)

    def widened(self) -> Leaves:
        """Half-precision tensors in single precision; the others as they are."""
        if all(x.dtype in _WIDE for x in self.tensors):
            return self
        return self.map(lambda x: x.to(torch.promote_types(x.dtype, torch.float32)))

    def cast(self, like: Leaves) -> Leaves:
        """Each tensor in the dtype of the corresponding one of ``like``."""
        return self.map(lambda x, y: x.to(y.dtype), like)

    def sqrt(self) -> Leaves:
        """Elementwise root with derivative 0 (not infinity) at 0, and NaN below.

        An adaptive optimizer divides by the root of an average of squares; at a coordinate whose gradient has
        always been zero the plain root turns every hypergradient into NaN. Values are those of ``torch.sqrt``.
        """
        return self.map(root)

    def where_greater(self, other: Leaves) -> Leaves:
        """The elementwise larger of the two; at a tie it is ``other``, and so is its derivative."""
        return self.map(lambda a, b: torch.where(a > b, a, b), other)


_FEW = 32
"""Tensors that are faster looked at one by one than all in one call."""


def norm(tensors: Iterable[Tensor]) -> float:
    """The Euclidean norm of all of them together, in double precision."""
    return float(torch.stack([x.double().norm() for x in tensors]).norm())


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no number is NaN or infinite; the tensors live on one device."""
    numbers = list(tensors)
    if any(map(transforms.is_wrapped, numbers)):
        numbers = list(map(transforms.unwrapped, numbers))
    # A finite sum ends the matter in few calls and one synchronisation; another one may only have overflowed.
    if torch.is_grad_enabled():
        numbers = [x.detach() for x in numbers]
    if len(numbers) <= _FEW and set(map(type, numbers)) <= {Tensor} and (not numbers or numbers[0].is_cpu):
        total = sum(map(Tensor.item, map(Tensor.sum, numbers)))
    else:
        total = float(torch.stack(torch._foreach_norm(numbers)).sum())
    return cmath.isfinite(total) or all([bool(x.isfinite().all()) for x in numbers])


def _apply(
    single: Callable[..., Tensor], every: Callable[..., Iterable[Tensor]], leaves: Leaves, other: Operand
) -> Leaves:
    if not isinstance(other, Leaves | float | int | Tensor):
        return NotImplemented
    if isinstance(other, Tensor) and other.ndim > 0:
        return NotImplemented  # type: ignore[no-any-return]
    if isinstance(other, int) and abs(other) > _MOST_INTEGER:
        other = float(other)
    # leaf by leaf also while a graph is recorded: that of a fused call keeps all its inputs, needed or not
    if isinstance(other, Tensor) or torch.is_grad_enabled() or transforms.current_level() is not None or not leaves:
        if not isinstance(other, Leaves):
            return Leaves(map(single, leaves, repeat(other)))
        if len(other) != len(leaves):
            raise ValueError(f"{leaves} has {len(leaves)} leaves, expected as many as {other}")
        return Leaves(map(single, leaves, other))
    return Leaves(every(leaves, other))


def root(x: Tensor) -> Tensor:
    """See :meth:`Leaves.sqrt`; a number below zero stays what it is, so that its NaN is noticed."""
    zero = x == 0
    return torch.where(zero, torch.zeros_like(x), torch.where(zero, torch.ones_like(x), x).sqrt())
