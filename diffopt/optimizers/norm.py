"""The norm of all leaves together, as an update rule may take it."""

from __future__ import annotations

import torch
from torch import Tensor

from diffopt.tensors.leaves import Leaves, root


def norm(leaves: Leaves) -> Tensor:
    """The root of the sum of all squares, in single precision at least, where the first leaf lives.

    Its derivative at zero is zero, where that of ``torch.linalg.vector_norm`` leaves NaN in a second derivative.
    """
    first, *others = [leaf.square().sum() for leaf in leaves.widened()]
    for other in others:
        first = first + other.to(first.device)
    return root(first)


def times(leaves: Leaves, factor: Tensor) -> Leaves:
    """Every leaf times a number in a tensor, each in its own dtype and on its own device."""
    return leaves.map(lambda leaf: (leaf * factor.to(leaf.device)).to(leaf.dtype))


def one_number(value: Leaves | float, like: Tensor) -> Tensor | float:
    """A hyperparameter that is one number for all leaves, beside ``like``."""
    return value[0].to(like) if isinstance(value, Leaves) else value


def at_most(value: Tensor, most: float) -> Tensor:
    """``value``, or ``most`` where that is less; its derivative at a tie is that of ``value``."""
    return torch.where(value > most, torch.full_like(value, most), value)
