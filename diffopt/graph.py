"""Walks over autograd's graphs: what a loss captured, what a graph saves, what a derivative would silently miss."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from diffopt.faults import missing_derivative, name_of_broken


def nodes(starts: Iterable[Any], seen: set[Any] | None = None) -> Iterator[Any]:
    """Every node that can be reached from ``starts``, once; ``None`` among them is passed over.

    Those in ``seen``, and what only they lead to, are passed over too; the others are added to it.
    """
    pending, seen = list(starts), set() if seen is None else seen
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        pending.extend(parent for parent, _ in node.next_functions)


def leaves_behind(loss: Tensor) -> list[Tensor]:
    """The leaf tensors that a loss depends on, in a fixed order."""
    return [node.variable for node in nodes([loss.grad_fn]) if hasattr(node, "variable")]


def refuse_broken_graph(graph: Iterable[Any]) -> None:
    """Refuse a graph, given by its nodes, with an operation whose derivative was declared missing."""
    for node in graph:
        if node.name().endswith(("Error", "NotImplemented")):
            raise missing_derivative(name_of_broken(node))


def captured_nodes(graph: Sequence[Any], roots: Sequence[Tensor]) -> list[Any]:
    """The nodes, of a graph given by its nodes and grown from ``roots``, of tensors that were there before them.

    An older node is recognised by its number. A leaf has none: it was there before if something besides the graph
    still holds it, for what a function makes for itself is let go when it returns (or, in a cycle, when collected).
    """
    if not _captured_nodes(graph, roots):
        return []
    gc.collect()
    return _captured_nodes(graph, roots)


def _captured_nodes(graph: Sequence[Any], roots: Sequence[Tensor]) -> list[Any]:
    own, found = {root.grad_fn for root in roots}, []
    born = cast("Any", roots[0].grad_fn)._sequence_nr()
    for node in graph:
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            if sys.getrefcount(leaf) > _references_of_a_forgotten_leaf():
                found.append(node)
        # (another thread numbers its nodes from the start, but only a new node can lead to a root)
        elif node._sequence_nr() < born and own.isdisjoint(nodes([node])):
            found.append(node)
    return found


@functools.cache
def _references_of_a_forgotten_leaf() -> int:
    """What ``sys.getrefcount`` says, in the place above, of a leaf that only its graph holds."""

    def forgetful() -> Tensor:
        return torch.zeros((), requires_grad=True) * 2

    with torch.enable_grad():
        node: Any = forgetful().grad_fn
    leaf = node.next_functions[0][0].variable
    return sys.getrefcount(leaf)


def saved_bytes(graph: Iterable[Any], ignored: Sequence[Tensor]) -> int:
    """The bytes that a graph, given by its nodes, keeps alive besides the tensors ``ignored``, each storage once.

    What cannot be looked into counts as nothing. Saved-tensor hooks would be simpler, but a loss that uses
    ``torch.func.grad`` itself refuses to run under them.
    """
    storages: dict[int, int] = {}
    others = {tensor.untyped_storage().data_ptr() for tensor in ignored if tensor.layout == torch.strided}
    for node in graph:
        for name in _saved_names(cast("Any", type(node))):
            value = getattr(node, name, None)
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(size for pointer, size in storages.items() if pointer not in others)


@functools.cache
def _saved_names(node_type: Any) -> tuple[str, ...]:
    names = [name for name in dir(node_type) if name.startswith("_saved_")]
    return ("saved_tensors",) if hasattr(node_type, "saved_tensors") else tuple(names)
