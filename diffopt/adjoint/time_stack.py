"""Stacks of adjoints: ``Leaves`` whose axis 0 runs over steps in a row."""

from __future__ import annotations

import torch

from diffopt.tensors.leaves import Leaves


def repeated(leaves: Leaves, count: int) -> Leaves:
    """A stack of so many rows, all of them equal, that can be written to."""
    return leaves.map(lambda leaf: leaf.expand(count, *leaf.shape).clone())


def row(stack: Leaves, at: int) -> Leaves:
    """One row."""
    return stack.map(lambda leaf: leaf[at])


def rows(stack: Leaves, first: int, last: int) -> Leaves:
    """The rows ``first, ..., last``."""
    return stack.map(lambda leaf: leaf[first : last + 1])


def write(stack: Leaves, first: int, new: Leaves) -> None:
    """Put new rows in the place of ``first, first + 1, ...``."""
    for leaf, part in zip(stack, new, strict=True):
        leaf[first : first + len(part)] = part


def appended(stack: Leaves, last: Leaves) -> Leaves:
    """A stack with one more row; ``last`` may have more leaves, which are left out."""
    return Leaves([torch.cat([leaf, part[None]]) for leaf, part in zip(stack, last, strict=False)])
