"""What is not smooth in an inner problem: a prox, and an optimizer that takes its step after another's."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from diffopt.errors import HyperparameterError, LeafError, OptimizerError, StructureError
from diffopt.optimizers.base import Bindable, Buffers, Optimizer
from diffopt.optimizers.binding import ready
from diffopt.optimizers.checks import check_optimizer_field
from diffopt.tensors import tree
from diffopt.tensors.leaves import Leaves


class Prox(Bindable):
    r"""The proximal map of a function ``h``, as a pure function of the params.

    .. math:: \mathrm{prox}_{\eta h}(\phi) = \arg\min_x\; \eta\,h(x) + \tfrac12\lVert x - \phi\rVert^2

    A projection is that of the function that is zero inside a set and infinite outside. A subclass is a frozen
    dataclass whose fields are its hyperparameters, learned and in any form as those of an optimizer are. It has one
    method, :meth:`apply`. Set ``elementwise = True`` where it treats every coordinate by itself, and ``polyhedral =
    True`` where it is the projection onto a set with flat faces: ``Implicit`` then takes it after momentum.

    A prox can be called on a tensor or a tree, in a fixed-point map of your own: ``L1(0.1)(w - lr * gradient, lr)``.

    Example:
        That of ``strength * w**2 / 2``, which shrinks:

        >>> from dataclasses import dataclass
        >>> import torch, diffopt
        >>> @dataclass(frozen=True)
        ... class Shrink(diffopt.prox.Prox):
        ...     strength: float
        ...     elementwise = True
        ...     def apply(self, params, step_size):
        ...         return params / (1 + step_size * self.strength)
        >>> Shrink(3.0)(torch.tensor([8.0]), 1.0)
        tensor([2.])
        >>> optimizer = diffopt.Proximal(diffopt.SGD(0.5), Shrink(2.0))
        >>> diffopt.solve(lambda w: w.square().sum() / 2, torch.tensor([8.0]), optimizer=optimizer, steps=1).params
        tensor([2.])
    """

    polyhedral: ClassVar[bool] = False
    """Whether it is a projection onto a set with flat faces, whose derivative does not depend on how far it goes."""

    @abstractmethod
    def apply(self, params: Leaves, step_size: Leaves) -> Leaves:
        """The prox at ``params``; ``step_size`` broadcasts with each leaf. Differentiable, nothing in place."""

    @final
    def __call__(self, params: Any, step_size: Any = 1.0) -> Any:
        """The prox of a tensor or a tree of tensors.

        Args:
            params: where it is taken.
            step_size: a number, a scalar tensor, or a tree like ``params`` of these.

        Raises:
            LeafError: a leaf of ``params`` is no floating tensor.
            HyperparameterError: a step size is no number or tensor, or a negative number.
            StructureError, ShapeError, DtypeError, DeviceError: a hyperparameter does not fit ``params``.
        """
        leaves, structure = tree.flatten(params)
        for leaf, path in zip(leaves, tree.paths(structure), strict=True):
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                raise LeafError(f"{type(self).__name__}: params{path} is {tree.describe(leaf)}", "a floating tensor")
        own = ready(self, leaves, structure)
        each = _step_sizes(self, step_size, structure)
        now = Leaves(leaves)
        return tree.unflatten(structure, own.apply(now, for_each(each, now)))


def _step_sizes(owner: Prox, step_size: Any, structure: tree.Structure) -> Any:
    """The step size of a call, or those of all leaves."""
    one = tree.flatten(step_size)[1] == tree.flatten(0)[1]
    try:
        each = (step_size,) if one or step_size is None else tuple(tree.flatten_up_to(structure, step_size))
    except (ValueError, TypeError) as error:
        raise StructureError(
            f"{type(owner).__name__}: step_size is {tree.describe(step_size)}", "a number, or a tree like params"
        ) from error
    for size in each:
        number = isinstance(size, float | int) and not isinstance(size, bool)
        if not isinstance(size, Tensor) and not (number and 0 <= size < math.inf):
            raise HyperparameterError(
                f"{type(owner).__name__}: step_size is {tree.brief(size)}", "a number >= 0, or a tensor"
            )
    return each[0] if one else each


def for_each(step_size: Any, params: Leaves) -> Leaves:
    """A step size as a tensor for every leaf, which broadcasts with it."""
    each = step_size if isinstance(step_size, tuple) else (step_size,) * len(params)
    return Leaves(
        [
            entry.to(leaf) if isinstance(entry, Tensor) else torch.full((), entry, dtype=leaf.dtype, device=leaf.device)
            for entry, leaf in zip(each, params, strict=True)
        ]
    )


@final
@dataclass(frozen=True)
class Proximal(Optimizer):
    r"""Proximal gradient descent: another optimizer's step, and then a prox with the same step size.

    .. math:: \phi^+ = \mathrm{prox}_{\eta h}\big(U(\phi, g)\big)

    With ``SGD(lr)`` it minimises the loss plus ``h`` (ISTA; with a projection, projected gradient descent). The step
    size is the inner optimizer's ``lr`` at that step: learned, scheduled or a tree like ``params``, and in ``Groups``
    that of each leaf. Optimizers without one step size, such as Adam, are refused: the prox would have to be that of
    their own metric. Optimizers of your own say theirs by the property ``proximal_step_size``.

    With momentum the velocity knows nothing of the prox: at rest it is ``1 / (1 - momentum)`` gradients, so the limit
    is the minimiser with ``(1 - momentum)`` times ``h``. A projection is the same for every factor.

    Hypergradients are those of the pieces that the steps went through: on the coordinates that are not at zero or at a
    bound (the active set), of ``params``, of what the loss reads, of ``lr`` and of the prox's own hyperparameters. They
    are exact unless a step ended at the very edge of two pieces. Under :class:`diffopt.estimators.Implicit` a prox
    makes a system that is not symmetric: give it ``GMRES``.

    Args:
        optimizer: the inner optimizer, whose buffers keep their names: ``SGD``, ``ProximalGD``, or these in ``Clip``,
            ``Groups``, ``EMA`` or ``Proximal``.
        prox: one of :mod:`diffopt.prox`, or your own.

    Raises:
        OptimizerError: ``optimizer`` is none, or has no one step size.
        HyperparameterError: ``prox`` is no :class:`diffopt.prox.Prox`.

    Reference: Parikh and Boyd (2014), "Proximal Algorithms", section 4.2.

    Example:
        A step of 1 on ``(w - a)**2 / 2`` goes to ``a``, and L1 takes 1 off: what is less becomes zero.

        >>> import torch, diffopt
        >>> a = torch.tensor([3.0, 0.5], requires_grad=True)
        >>> optimizer = diffopt.Proximal(diffopt.SGD(1.0), diffopt.prox.L1(1.0))
        >>> w = diffopt.solve(
        ...     lambda w, a: (w - a).square().sum() / 2, torch.zeros(2), a, optimizer=optimizer, steps=1
        ... ).params
        >>> w.detach()
        tensor([2., 0.])
        >>> torch.autograd.grad(w.sum(), a)
        (tensor([1., 0.]),)
    """

    optimizer: Optimizer
    prox: Prox

    def __post_init__(self) -> None:
        """Refuse an optimizer without one step size."""
        check_optimizer_field(self, "optimizer", self.optimizer)
        if not isinstance(self.prox, Prox):
            called = isinstance(self.prox, type)
            raise HyperparameterError(
                f"Proximal: prox is {tree.describe(self.prox)}",
                "a diffopt.prox.Prox such as diffopt.prox.L1(0.1)",
                "call it: that is the class" if called else "subclass it for one of your own",
            )
        if self.optimizer.proximal_step_size is None:
            raise OptimizerError(
                f"Proximal: {type(self.optimizer).__name__} has no one step size",
                "an optimizer whose step is a step size times the gradient, such as SGD",
                "a prox after another step has another fixed point than the minimiser; of an optimizer of your own, "
                "say its step size by proximal_step_size; in Groups, put Proximal around the groups that need it",
            )

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        """Whether both are."""
        return self.optimizer.elementwise and self.prox.elementwise

    @property
    def proximal_step_size(self) -> Any:
        """That of the inner optimizer."""
        return self.optimizer.proximal_step_size

    def init(self, params: Leaves) -> Buffers:
        """The inner optimizer's buffers."""
        return self.optimizer.init(params)

    def update(self, params: Leaves, grads: Leaves, buffers: Buffers, step: int) -> tuple[Leaves, Buffers]:
        """A step of the inner optimizer, and the prox there."""
        moved, buffers = self.optimizer.update(params, grads, buffers, step)
        after = self.prox.apply(moved, for_each(self.optimizer.proximal_step_size, moved))
        return after, buffers


def one_step_size(owner: Prox, step_size: Tensor) -> Tensor:
    """Refuse step sizes that differ within a leaf, for a prox that mixes the coordinates of one."""
    if step_size.ndim > 0:
        raise HyperparameterError(
            f"{type(owner).__name__}: the step sizes (or strengths) of a parameter have shape {tuple(step_size.shape)}",
            "one step size for each parameter",
            "its prox is that of the Euclidean norm, which step sizes of their own change",
        )
    return step_size
