"""Pytrees of tensors: flattening, paths for messages, and comparison. The only importer of ``optree``.

``None`` counts as a leaf (so that it can be refused by name) and dictionaries are ordered by their keys (so that
two dictionaries with the same keys always have the same structure).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import optree
import torch

Tree: TypeAlias = Any
Structure: TypeAlias = optree.PyTreeSpec


def flatten(tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], Structure]:
    """The leaves of ``tree`` in a fixed order, and the structure that puts them back."""
    return optree.tree_flatten(tree, is_leaf=is_leaf, none_is_leaf=True)


def unflatten(structure: Structure, leaves: Sequence[Any]) -> Tree:
    """The tree with this structure and these leaves."""
    return optree.tree_unflatten(structure, leaves)


def flatten_up_to(structure: Structure, tree: Tree) -> list[Any]:
    """The subtrees of ``tree`` that stand where ``structure`` has leaves; ``ValueError`` if it has other branches."""
    return structure.flatten_up_to(tree)


def paths(structure: Structure) -> list[str]:
    """One readable path per leaf, such as ``['layer']['weight']``; empty for a bare tensor."""
    return ["".join(f"[{key!r}]" for key in path) for path in structure.paths()]


def differences(name: str, value: Tree, structure: Structure, *, deeper: bool = False) -> list[str]:
    """The leaves that a tree called ``name`` lacks or has too many, in words; ``deeper``: it may go on below a leaf."""
    here, there = paths(flatten(value)[1]), dict.fromkeys(paths(structure))
    if deeper:
        here = [next((leaf for leaf in there if path.startswith(leaf)), path) for path in here]
    found = dict.fromkeys(here)
    return [
        *(f"{name}{path} is missing" for path in there if path not in found),
        *(f"{name}{path} is too many" for path in found if path not in there),
    ]


def map_leaves(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """``function`` applied to corresponding leaves of trees with one structure."""
    return optree.tree_map(function, tree, *others, none_is_leaf=True)


def describe(value: object) -> str:
    """A short account of a value for error messages."""
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)} on {value.device}"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
