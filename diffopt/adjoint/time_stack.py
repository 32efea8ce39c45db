"""Stacks of adjoints: ``Leaves`` whose axis 0 runs over steps in a row."""

from __future__ import annotations

import torch

from diffopt.adjoint.update_derivatives import UpdateBlocks
from diffopt.tensors.leaves import Leaves


def repeated(leaves: Leaves, count: int) -> Leaves:
    """A stack of so many rows, all of them equal, that can be written to."""
    return leaves.map(lambda leaf: leaf.expand(count, *leaf.shape).clone())


def row(stack: Leaves, at: int) -> Leaves:
    """One row."""
    return stack.map(lambda leaf: leaf[at])


def copy_of_row(stack: Leaves, at: int) -> Leaves:
    """One row, as it is now."""
    return stack.map(lambda leaf: leaf[at].clone())


def rows(stack: Leaves, first: int, last: int) -> Leaves:
    """The rows ``first, ..., last``."""
    return stack.map(lambda leaf: leaf[first : last + 1])


def write(stack: Leaves, first: int, new: Leaves) -> None:
    """Put new rows in the place of ``first, first + 1, ...``."""
    for leaf, part in zip(stack, new, strict=True):
        leaf[first : first + len(part)] = part


def scan(updates: UpdateBlocks, stack: Leaves, first: int, last: int, pushes: Leaves | None = None) -> None:
    """``x_{t-1} = C_t' x_t + P' y_t`` for ``t = last, ..., first`` (none if ``last < first``): row ``t`` is ``x_t``.

    ``pushes`` is the stack ``y_first, ...``, of which what is behind ``y_last`` is left out; ``None``: zero.
    """
    if first <= last:
        own = None if pushes is None else rows(pushes, 0, last - first)
        write(stack, first - 1, updates.scan(row(stack, last), first, last, own))


def appended(stack: Leaves, last: Leaves) -> Leaves:
    """A stack with one more row; ``last`` may have more leaves, which are left out."""
    return Leaves([torch.cat([leaf, part[None]]) for leaf, part in zip(stack, last, strict=False)])
