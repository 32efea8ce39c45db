"""Pytrees of tensors: flattening, paths for messages, and comparison. The only importer of ``optree``.

``None`` counts as a leaf (so that it can be refused by name) and dictionaries are ordered by their keys (so that
two dictionaries with the same keys always have the same structure). A class that ``optree`` knows under the namespace
``"diffopt"`` (or everywhere) is a branch, any other object a leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, TypeAlias, TypeVar

import optree
import torch

from diffopt.errors import StructureError
from diffopt.tensors import transforms

Tree: TypeAlias = Any
Structure: TypeAlias = optree.PyTreeSpec

NAMESPACE = "diffopt"
Node = TypeVar("Node")


def flatten(tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], Structure]:
    """The leaves of ``tree`` in a fixed order, and the structure that puts them back."""
    try:
        return optree.tree_flatten(tree, is_leaf=is_leaf, none_is_leaf=True, namespace=NAMESPACE)
    except RecursionError as error:
        raise StructureError(
            f"a tree that was given holds itself, or has branches without end: {describe(tree)}",
            "branches that end in leaves",
            "look for a list or a dict that was put into itself",
        ) from error


def unflatten(structure: Structure, leaves: Sequence[Any]) -> Tree:
    """The tree with this structure and these leaves."""
    return optree.tree_unflatten(structure, leaves)


def flatten_up_to(structure: Structure, tree: Tree) -> list[Any]:
    """The subtrees of ``tree`` that stand where ``structure`` has leaves; ``ValueError`` if it has other branches."""
    return structure.flatten_up_to(tree)


def paths(structure: Structure) -> list[str]:
    """One readable path per leaf, such as ``['layer']['weight']``; empty for a bare tensor."""
    return ["".join(f"[{key!r}]" for key in path) for path in structure.paths()]


def dotted_paths(structure: Structure) -> list[str]:
    """The same with keys and fields joined by dots, as a module names its parameters: ``layer.weight``."""
    return [".".join([str(_key(entry)) for entry in accessor]) for accessor in structure.accessors()]


def _key(entry: optree.PyTreeEntry) -> Any:
    if isinstance(entry, optree.NamedTupleEntry):
        return entry.field
    return entry.name if isinstance(entry, optree.DataclassEntry) else entry.entry


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


def in_order_of_writing(tree: Tree) -> list[int]:
    """The numbers of the leaves in the order in which dictionaries were written, instead of that of their keys."""
    leaves, structure = flatten(tree)
    numbers = unflatten(structure, range(len(leaves)))
    with optree.dict_insertion_ordered(True, namespace=NAMESPACE):
        return flatten(numbers)[0]


def register_branch(
    kind: type[Node], parts: Callable[[Node], tuple[Sequence[Any], Any]], made: Callable[[Any, Iterable[Any]], Node]
) -> None:
    """Make a class of this library a branch of trees, here and to ``torch.func``.

    ``parts`` gives its children and what is constant of it, out of which ``made(constant, children)`` makes it anew.
    """
    optree.register_pytree_node(kind, parts, made, namespace=NAMESPACE)  # type: ignore[arg-type]

    def taken_apart(node: Node) -> tuple[list[Any], Any]:
        children, constant = parts(node)
        return list(children), constant

    transforms.register_branch(kind, taken_apart, lambda children, constant: made(constant, children))


def map_leaves(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """``function`` applied to corresponding leaves of trees with one structure."""
    return optree.tree_map(function, tree, *others, none_is_leaf=True, namespace=NAMESPACE)


def describe(value: object) -> str:
    """A short account of a value for error messages."""
    if isinstance(value, torch.Tensor) and torch.nn.parameter.is_lazy(value):
        return f"a {type(value).__name__}"
    if isinstance(value, torch.Tensor):
        with suppress(Exception):  # of a subclass of the user's own
            shape = "no one shape" if value.is_nested else f"shape {tuple(value.shape)}"
            return f"a {str(value.dtype).removeprefix('torch.')} tensor of {shape} on {value.device}"
    return f"{type(value).__name__} {brief(value)}"


def brief(value: object) -> str:
    """How a value represents itself, in one short line; ``object`` if it cannot, or goes on without end."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a repr of the user's own, too deep, or of too many digits; no message is about that
        return "object"
    return text if len(text) <= 40 else text[:37] + "..."
