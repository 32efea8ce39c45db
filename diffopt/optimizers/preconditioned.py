"""Gradient descent with a learned preconditioner, as pure dynamics; blocks C, E, D: derivations, section 2."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, final

from torch import Tensor

from diffopt.errors import HyperparameterError, ShapeError
from diffopt.optimizers.base import PREFIX, Buffers, Hyperparameter, Optimizer
from diffopt.optimizers.checks import FINITE, POSITIVE, check_range
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.plain_numbers import make_plain
from diffopt.tensors.tree import describe


@final
@dataclass(frozen=True)
class Preconditioned(Optimizer):
    r"""Gradient descent with a learned linear preconditioner, diagonal or Kronecker-factored (meta-curvature).

    .. math:: \phi^+ = \phi - \eta\,\mathcal M g,\qquad
              \mathcal M g = m \odot g \quad\text{or}\quad g \times_1 M_1 \times_2 M_2 \cdots

    Args:
        lr: step size ``eta``.
        diagonal: ``m``, a tree shaped like ``params``.
        factors: a tree with ``params``' branches and, for each leaf, a tuple of square matrices, one per axis of the
            leaf (``None`` for the identity): an axis of length ``n`` takes an ``[n, n]`` matrix.

    Give ``diagonal``, ``factors`` or both (the diagonal is applied first).

    Reference: Park and Oliva (2019), "Meta-Curvature", section 3; Li et al. (2017), "Meta-SGD", for the diagonal.
    """

    lr: Hyperparameter
    diagonal: Hyperparameter = None
    factors: Hyperparameter = field(default=None, metadata=PREFIX)
    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse a negative step size, and a preconditioner that is missing."""
        make_plain(self)
        check_range(self, "diagonal", lr=POSITIVE, diagonal=FINITE)
        if self.diagonal is None and self.factors is None:
            raise HyperparameterError("Preconditioned: diagonal and factors are None", "one or both", "SGD has neither")

    def init(self, params: Leaves) -> Buffers:
        """No buffers."""
        return {}

    def update(self, params: Leaves, grads: Leaves, buffers: Buffers, step: int) -> tuple[Leaves, Buffers]:
        """One step."""
        move = grads if self.diagonal is None else self.diagonal * grads
        if self.factors is not None:
            move = Leaves(_multiply_axes(g, m) for g, m in zip(move, self.factors, strict=True))
        return params.minus(self.lr, move), buffers


def _multiply_axes(tensor: Tensor, matrices: tuple[Tensor | None, ...]) -> Tensor:
    """``tensor`` with axis ``i`` multiplied by ``matrices[i]``."""
    if not isinstance(matrices, tuple | list) or len(matrices) != tensor.ndim:
        raise ShapeError(
            f"Preconditioned: factors holds {describe(matrices)} for a leaf of shape {tuple(tensor.shape)}",
            f"a tuple of {tensor.ndim} matrices, one per axis (None for the identity)",
        )
    for axis, matrix in enumerate(matrices):
        if matrix is not None:
            if not isinstance(matrix, Tensor) or matrix.shape != (tensor.shape[axis],) * 2:
                raise ShapeError(
                    f"Preconditioned: factor {axis} is {describe(matrix)}",
                    f"the shape {(tensor.shape[axis],) * 2} for a leaf of shape {tuple(tensor.shape)}",
                )
            moved = tensor.movedim(axis, 0)
            tensor = (matrix @ moved.reshape(len(moved), -1)).reshape(moved.shape).movedim(0, axis)
    return tensor
