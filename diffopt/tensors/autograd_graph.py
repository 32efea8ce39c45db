"""Walks over autograd's graphs: what a loss captured, what a graph saves, what a derivative would silently miss."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.tensors import transforms
from diffopt.tensors.torch_errors import missing_derivative, name_of_broken


def nodes(starts: Iterable[Any], seen: set[Any] | None = None) -> Iterator[Any]:
    """Every node that can be reached from ``starts``, once; ``None`` among them is passed over.

    Those in ``seen``, and what only they lead to, are passed over too; the others are added to it.
    """
    seen = set() if seen is None else seen
    pending = [node for node in {*starts} if node is not None and node not in seen]
    seen.update(pending)
    while pending:
        node = pending.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                pending.append(parent)


def leaves_behind(loss: Tensor) -> list[Tensor]:
    """The leaf tensors that a loss depends on, in a fixed order."""
    return [node.variable for node in nodes([loss.grad_fn]) if hasattr(node, "variable")]


def refuse_broken_graph(starts: Iterable[Any]) -> None:
    """Refuse a graph, given by its last nodes, with an operation whose derivative was declared missing."""
    pending = [node for node in {*starts} if node is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        kind = type(node)
        if kind not in _sound and _may_be_broken(kind) and node.name().endswith(("Error", "NotImplemented")):
            raise missing_derivative(name_of_broken(node))
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                pending.append(parent)


_sound: set[type] = set()
"""Types of nodes that stand for one operation each, which has a derivative."""


def _may_be_broken(kind: type) -> bool:
    """Whether a node of this type may stand for a missing derivative; most operations have a type of their own."""
    if kind.__name__.endswith(("Backward0", "Backward1")):
        _sound.add(kind)
        return False
    return True


_NEVER = 2**63
"""From here on numbers are those of nodes that are not numbered, a leaf's."""


def number(node: Any) -> int:
    """The number of a node in the order in which its thread made nodes; -1 of a leaf's."""
    at = int(node._sequence_nr())
    return at if at < _NEVER else -1


class GraphPart(NamedTuple):
    """The part of a graph that has grown from some tensors; it holds none of them.

    Attributes:
        start: the node that it ends in.
        given: the nodes of the tensors that it has grown from, behind which nothing is looked at; ``None``: of a leaf.
        leaves: which leaves are among them, by ``id``; the graph keeps them.
    """

    start: Any
    given: Sequence[Any]
    leaves: frozenset[int]

    @staticmethod
    def of(output: Tensor, given: Sequence[Tensor]) -> GraphPart:
        """That behind ``output``, grown from the tensors ``given``."""
        leaves = [id(x) for x in given if x.requires_grad and x.grad_fn is None]
        return GraphPart(output.grad_fn, [x.grad_fn for x in given], frozenset(leaves))


def captured_nodes(parts: Iterable[GraphPart], born: int = -1) -> list[Any]:
    """The nodes of tensors that were there before these parts of a graph, besides those of the tensors given.

    The parts have grown one after the other. An older node is recognised by its number: it is below that of the first
    tensor given; where that is a leaf, below the number of the part before, or ``born``. A leaf has no number: it was
    there before if something besides the graph still holds it, for what a function makes for itself is let go when it
    returns (or, in a cycle, when collected).
    """
    suspects: list[tuple[Any, GraphPart]] = []
    for part in parts:
        first = part.given[0]
        born = born if first is None else number(first)
        seen: set[Any] = set(part.given)
        pending = [] if part.start is None or part.start in seen else [part.start]
        seen.update((None, part.start))
        push, add = pending.append, seen.add
        while pending:  # (the loop that these checks cost most: half a microsecond a node)
            node = pending.pop()
            at = node._sequence_nr()
            if at < born or (at >= _NEVER and hasattr(node, "variable")):
                suspects.append((node, part))
            for parent, _ in node.next_functions:
                if parent not in seen:
                    add(parent)
                    push(parent)
        born = born if part.start is None else max(born, number(part.start))
    if not suspects or not _captured(suspects):
        return []
    gc.collect()
    return _captured(suspects)


def _captured(suspects: Sequence[tuple[Any, GraphPart]]) -> list[Any]:
    found = []
    for node, part in suspects:
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            if id(leaf) not in part.leaves and sys.getrefcount(leaf) > _references_of_a_forgotten_leaf():
                found.append(node)
        # (another thread numbers its nodes from the start, but only a new node can lead to a given tensor)
        elif not any(
            behind in part.given or id(getattr(behind, "variable", None)) in part.leaves for behind in nodes([node])
        ):
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
        kind: Any = type(node)
        for name in _saved_names(kind):
            value = getattr(node, name, None)
            if value is None:
                continue
            if not isinstance(value, Tensor | tuple):  # and never will be
                _saved[kind] = [other for other in _saved[kind] if other != name]
                continue
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                    with suppress(
                        RuntimeError, NotImplementedError
                    ):  # zeros of forward mode, and subclasses, have none
                        storage = tensor.untyped_storage()
                        storages[storage.data_ptr()] = storage.nbytes()
    return sum(size for pointer, size in storages.items() if pointer not in others)


_saved: dict[Any, list[str]] = {}
"""What nodes of each type may have saved tensors under."""


def _saved_names(kind: Any) -> list[str]:
    known = _saved.get(kind)
    if known is None:
        names = [name for name in dir(kind) if name.startswith("_saved_")]
        known = _saved[kind] = ["saved_tensors"] if hasattr(kind, "saved_tensors") else names
    return known
