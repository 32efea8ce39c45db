r"""Proximal maps for :class:`diffopt.Proximal`: penalties with a kink, and projections onto sets.

.. math:: \mathrm{prox}_{\eta h}(\phi) = \arg\min_x\; \eta\,h(x) + \tfrac12\lVert x - \phi\rVert^2

Strengths, bounds and radii may be tensors, and are then learned. Each is a :class:`Prox`, of which your own can be a
subclass of five lines.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from diffopt.errors import HyperparameterError, ShapeError
from diffopt.optimizers.base import OPTION, Hyperparameter
from diffopt.optimizers.checks import POSITIVE, check_one_number, check_range
from diffopt.optimizers.norm import norm, one_number, times
from diffopt.optimizers.prox import Prox, one_step_size
from diffopt.tensors import transforms, tree
from diffopt.tensors.leaves import Leaves, root
from diffopt.tensors.plain_numbers import as_float, is_integer, make_plain

__all__ = ["L1", "Box", "GroupL1", "L2Ball", "Nonnegative", "Prox", "Simplex"]


@final
@dataclass(frozen=True)
class L1(Prox):
    r"""The penalty ``strength * |w|_1`` (Lasso): soft thresholding.

    .. math:: x_i = \mathrm{sign}(\phi_i)\,\max(|\phi_i| - \eta\lambda, 0)

    The derivative is 1 by ``phi_i`` and ``-sign * eta`` by ``lambda`` where the result is not zero, and zero elsewhere.

    Args:
        strength: ``lambda``: a float, a scalar tensor, a ``Schedule``, or a tree like ``params`` (adaptive Lasso).

    Raises:
        HyperparameterError: a negative strength.

    Reference: Parikh and Boyd (2014), "Proximal Algorithms", section 6.

    Example:
        >>> import torch, diffopt
        >>> diffopt.prox.L1(0.5)(torch.tensor([2.0, -0.1]), 1.0)
        tensor([1.5000, 0.0000])
    """

    strength: Hyperparameter
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse a negative strength."""
        make_plain(self)
        check_range(self, strength=POSITIVE)

    def apply(self, params: Leaves, step_size: Leaves) -> Leaves:
        """Soft thresholding."""
        return params.map(_soft_threshold, step_size * self.strength)


def _soft_threshold(x: Tensor, threshold: Tensor) -> Tensor:
    """At a threshold of exactly zero, the identity at zero too."""
    inside = (x.abs() <= threshold) & (threshold > 0)
    return torch.where(inside, torch.zeros_like(x), x - threshold * x.sign())


@final
@dataclass(frozen=True)
class GroupL1(Prox):
    r"""The penalty ``strength`` times the sum of the norms of groups (group Lasso): whole groups become zero.

    .. math:: x_G = \max\Big(1 - \frac{\eta\lambda}{\lVert \phi_G\rVert}, 0\Big)\,\phi_G

    Args:
        strength: ``lambda``: a float, a scalar tensor, a ``Schedule``, or a tree of scalars like ``params``.
        axis: the axis, or the axes in a tuple, along which a group runs, of every leaf; ``axis=1`` makes a group of
            each row of a matrix. Use :class:`diffopt.Groups` where leaves differ.

    Raises:
        HyperparameterError: a negative strength, or an axis that is no integer; by ``solve``: strengths or step sizes
            differ within a leaf.
        ShapeError: by ``solve``: a leaf lacks the axis.

    Reference: Parikh and Boyd (2014), "Proximal Algorithms", section 6.

    Example:
        The row (3, 4) has norm 5:

        >>> import torch, diffopt
        >>> diffopt.prox.GroupL1(1.0, axis=1)(torch.tensor([[3.0, 4.0], [0.1, 0.2]]), 1.0)
        tensor([[2.4000, 3.2000],
                [0.0000, 0.0000]])
    """

    strength: Hyperparameter
    axis: Any = field(metadata=OPTION)

    def __post_init__(self) -> None:
        """Refuse a negative strength, and what is no axis."""
        make_plain(self)
        check_range(self, strength=POSITIVE)
        axes = self.axis if isinstance(self.axis, tuple | list) else (self.axis,)
        if not axes or not all(map(is_integer, axes)):
            raise HyperparameterError(f"GroupL1: axis is {tree.describe(self.axis)}", "an integer or a tuple of them")
        object.__setattr__(self, "axis", tuple(axes))

    def apply(self, params: Leaves, step_size: Leaves) -> Leaves:
        """Thresholding of norms."""
        return params.map(self._of_leaf, step_size * self.strength)

    def _of_leaf(self, x: Tensor, threshold: Tensor) -> Tensor:
        if any([not -x.ndim <= axis < x.ndim for axis in self.axis]):
            raise ShapeError(
                f"GroupL1: axis is {self.axis} for a parameter of shape {tuple(x.shape)}",
                "axes that it has",
                "put Proximal around the optimizer of the others, in diffopt.Groups",
            )
        one_step_size(self, threshold)
        size = root(x.square().sum(self.axis, keepdim=True))
        inside = (size <= threshold) & (threshold > 0)
        safe = torch.where(size > 0, size, torch.ones_like(size))
        return torch.where(inside, torch.zeros_like(x), x * (1 - threshold / safe))


@final
@dataclass(frozen=True)
class Box(Prox):
    r"""The projection onto ``low <= w <= high``.

    .. math:: x_i = \min(\max(\phi_i, l_i), u_i)

    The derivative is 1 by ``phi_i`` within the box, and 1 by the bound where ``phi_i`` is beyond it.

    Args:
        low: ``l``: a float, a scalar tensor, a ``Schedule``, or a tree like ``params``; ``None``: no bound.
        high: ``u``, likewise.

    Raises:
        HyperparameterError: a bound that is no number, or ``low`` above ``high`` (looked at in floats and CPU tensors).

    Reference: Parikh and Boyd (2014), "Proximal Algorithms", section 6.

    Example:
        >>> import torch, diffopt
        >>> diffopt.prox.Box(-1.0, 1.0)(torch.tensor([3.0, 0.5]))
        tensor([1.0000, 0.5000])
    """

    low: Hyperparameter = None
    high: Hyperparameter = None
    elementwise: ClassVar[bool] = True
    polyhedral: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what is no box."""
        make_plain(self)
        for name in ("low", "high"):
            for leaf in tree.flatten(getattr(self, name))[0]:
                if isinstance(leaf, bool | str) or (isinstance(leaf, float | int) and as_float(leaf) != leaf):
                    raise HyperparameterError(f"Box: {name} is {tree.describe(leaf)}", "None, a number or a tensor")
        low, high = self.low, self.high
        numbers = isinstance(low, float | int) and isinstance(high, float | int)
        if (numbers and low > high) or _crossed(low, high):
            raise HyperparameterError(f"Box: low is {tree.brief(low)} and high is {tree.brief(high)}", "low <= high")

    def apply(self, params: Leaves, step_size: Leaves) -> Leaves:
        """The nearest point of the box."""
        if self.low is not None:
            params = _bounded(params, self.low, torch.lt)
        return params if self.high is None else _bounded(params, self.high, torch.gt)


def _crossed(low: Any, high: Any) -> bool:
    """Whether bounds that can be looked at without waiting for a device cross."""
    bounds = (low, high)
    if not any(isinstance(x, Tensor) for x in bounds) or not all(isinstance(x, Tensor | float | int) for x in bounds):
        return False
    tensors = [x for x in bounds if isinstance(x, Tensor)]
    if transforms.transforms_active() or any(type(x) is not Tensor or x.device.type != "cpu" for x in tensors):
        return False
    try:
        return bool((torch.as_tensor(low) > high).any())
    except RuntimeError:  # of shapes that do not go together, which fit params or are refused there
        return False


def _bounded(params: Leaves, bound: Any, beyond: Any) -> Leaves:
    """Every number, or the bound where it is beyond; on the bound the derivative is that of the number."""
    if isinstance(bound, Leaves):
        return params.map(lambda x, y: torch.where(beyond(x, y), y, x), bound)
    return params.map(lambda x: torch.where(beyond(x, bound), torch.full_like(x, bound), x))


@final
@dataclass(frozen=True)
class Nonnegative(Prox):
    r"""The projection onto ``w >= 0``.

    .. math:: x_i = \max(\phi_i, 0)

    Reference: Parikh and Boyd (2014), "Proximal Algorithms", section 6.

    Example:
        >>> import torch, diffopt
        >>> diffopt.prox.Nonnegative()(torch.tensor([3.0, -0.5]))
        tensor([3., 0.])
    """

    elementwise: ClassVar[bool] = True
    polyhedral: ClassVar[bool] = True

    def apply(self, params: Leaves, step_size: Leaves) -> Leaves:
        """The nearest point without negative numbers."""
        return _bounded(params, 0.0, torch.lt)


@final
@dataclass(frozen=True)
class Simplex(Prox):
    r"""The projection onto the probability simplex, ``w >= 0`` with sum 1, along the last axis of every leaf.

    .. math:: x_i = \max(\phi_i - \theta, 0),\qquad \textstyle\sum_i x_i = 1

    Exact, by sorting. The derivative on the support ``S`` is ``I - 1 1' / |S|``, and zero elsewhere.

    Raises:
        ShapeError: by ``solve``: a leaf without axes.
        HyperparameterError: by ``solve``: step sizes that differ within a leaf.

    Reference: Duchi et al. (2008), "Efficient Projections onto the l1-Ball for Learning in High Dimensions", figure 1.

    Example:
        >>> import torch, diffopt
        >>> diffopt.prox.Simplex()(torch.tensor([0.9, 0.5, -1.0]))
        tensor([0.7000, 0.3000, 0.0000])
    """

    polyhedral: ClassVar[bool] = True

    def apply(self, params: Leaves, step_size: Leaves) -> Leaves:
        """The nearest probabilities."""
        return params.map(self._of_leaf, step_size)

    def _of_leaf(self, x: Tensor, step_size: Tensor) -> Tensor:
        if x.ndim == 0:
            raise ShapeError("Simplex: a parameter has no axes", "one axis at least, along which the sum is 1")
        one_step_size(self, step_size)
        support = _support(x.detach())
        inside = torch.where(support, x, torch.zeros_like(x))
        shift = (inside.sum(-1, keepdim=True) - 1) / support.sum(-1, keepdim=True)
        return torch.where(support, x - shift, torch.zeros_like(x))


def _support(x: Tensor) -> Tensor:
    """Where the projection onto the simplex is not zero."""
    largest = x.sort(-1, descending=True).values
    counts = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    shifts = (largest.cumsum(-1) - 1) / counts
    kept = (largest > shifts).sum(-1, keepdim=True)
    return ~(x <= shifts.gather(-1, (kept - 1).clamp(min=0)))  # NaN goes on


@final
@dataclass(frozen=True)
class L2Ball(Prox):
    r"""The projection onto the ball ``|w|_2 <= radius`` of all leaves together.

    .. math:: x = \min\Big(1, \frac{r}{\lVert\phi\rVert}\Big)\,\phi

    Use :class:`diffopt.Groups` for a ball of some leaves. All of them should have one step size.

    Args:
        radius: ``r``: one number, as a float, a scalar tensor or a ``Schedule``.

    Raises:
        HyperparameterError: a negative radius, or one that is not one number; by ``solve``: step sizes that differ
            within a leaf.

    Reference: Parikh and Boyd (2014), "Proximal Algorithms", section 6.

    Example:
        >>> import torch, diffopt
        >>> diffopt.prox.L2Ball(1.0)(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """

    radius: Hyperparameter

    def __post_init__(self) -> None:
        """Refuse a negative radius."""
        make_plain(self)
        check_range(self, radius=POSITIVE)
        check_one_number(self, "radius", self.radius)

    def apply(self, params: Leaves, step_size: Leaves) -> Leaves:
        """The nearest point of the ball."""
        for size in step_size:
            one_step_size(self, size)
        size = norm(params)
        outside = size > one_number(self.radius, size)
        safe = torch.where(outside, size, torch.ones_like(size))
        return times(params, torch.where(outside, one_number(self.radius, size) / safe, torch.ones_like(size)))
