"""Walks over autograd's graphs: what a loss captured, what a graph saves, what a derivative would silently miss."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor

from diffopt.tensors import transforms
from diffopt.tensors.torch_errors import missing_derivative, name_of_broken


def nodes(starts: Iterable[Any], seen: set[Any] | None = None) -> Iterator[Any]:
    """Every node that can be reached from ``starts``, once; ``None`` among them is passed over.

    Those in ``seen``, and what only they lead to, are passed over too; the others are added to it.
    """
    pending, seen = [(node, 0) for node in starts], set() if seen is None else seen
    while pending:
        node = pending.pop()[0]
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        pending += node.next_functions


def leaves_behind(loss: Tensor) -> list[Tensor]:
    """The leaf tensors that a loss depends on, in a fixed order."""
    return [node.variable for node in nodes([loss.grad_fn]) if hasattr(node, "variable")]


def refuse_broken_graph(graph: Iterable[Any]) -> None:
    """Refuse a graph, given by its nodes, with an operation whose derivative was declared missing."""
    for node in graph:
        if _is_broken(cast("Any", type(node))):
            raise missing_derivative(name_of_broken(node))


@functools.cache
def _is_broken(node_type: Any) -> bool:
    return bool(node_type.__name__.endswith(("Error", "NotImplemented")))


def number(node: Any) -> int:
    """The number of a node in the order in which its thread made nodes; -1 of none, and of a leaf's."""
    return -1 if node is None or hasattr(node, "variable") else int(node._sequence_nr())


def captured_nodes(starts: Iterable[Any], given: Sequence[Tensor], born: int = -1) -> list[Any]:
    """The nodes of tensors that were there before the graph behind ``starts``, besides those of the tensors ``given``.

    The graph grows from ``given``, behind which nothing is looked at. An older node is recognised by its number: it is
    below that of the first of them, or below ``born`` where that is a leaf. A leaf has no number: it was there before
    if something besides the graph still holds it, for what a function makes for itself is let go when it returns (or,
    in a cycle, when collected).
    """
    own, leaves = {x.grad_fn for x in given if x.grad_fn is not None}, {id(x) for x in given}
    if given[0].grad_fn is not None:
        born = number(given[0].grad_fn)
    seen, pending, suspects = {None, *own}, [(node, 0) for node in starts], []
    while pending:
        node = pending.pop()[0]
        if node in seen:
            continue
        seen.add(node)
        parents = node.next_functions
        pending += parents
        leaf = None if parents else getattr(node, "variable", None)
        if node._sequence_nr() < born if leaf is None else id(leaf) not in leaves:
            suspects.append(node)
    if not suspects or not _captured(suspects, own, leaves):
        return []
    gc.collect()
    return _captured(suspects, own, leaves)


def _captured(suspects: Sequence[Any], own: set[Any], leaves: set[int]) -> list[Any]:
    found = []
    for node in suspects:
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            if sys.getrefcount(leaf) > _references_of_a_forgotten_leaf():
                found.append(node)
        # (another thread numbers its nodes from the start, but only a new node can lead to a given tensor)
        elif not any(behind in own or id(getattr(behind, "variable", None)) in leaves for behind in nodes([node])):
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
    others = {transforms.storage(tensor) for tensor in ignored if tensor.layout == torch.strided}
    for node in graph:
        for name in _saved_names(cast("Any", type(node))):
            value = getattr(node, name, None)
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                    with suppress(
                        RuntimeError, NotImplementedError
                    ):  # zeros of forward mode, and subclasses, have none
                        storage = tensor.untyped_storage()
                        storages[storage.data_ptr()] = storage.nbytes()
    return sum(size for pointer, size in storages.items() if pointer not in others)


@functools.cache
def _saved_names(node_type: Any) -> tuple[str, ...]:
    names = [name for name in dir(node_type) if name.startswith("_saved_")]
    return ("saved_tensors",) if hasattr(node_type, "saved_tensors") else tuple(names)
