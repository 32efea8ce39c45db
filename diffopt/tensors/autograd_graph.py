"""Walks over autograd's graphs: what a loss captured, what a graph saves, what a derivative would silently miss."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffopt.tensors import transforms
from diffopt.tensors.spread import is_spread
from diffopt.tensors.torch_errors import missing_derivative, name_of_broken


def nodes(starts: Iterable[Any], seen: set[Any] | None = None) -> list[Any]:
    """Every node that can be reached from ``starts``, once; ``None`` among them is passed over.

    Those in ``seen``, and what only they lead to, are passed over too; the others are added to it.
    """
    seen = set() if seen is None else seen
    seen.add(None)
    found = [node for node in dict.fromkeys(starts) if node not in seen]
    seen.update(found)
    return _grown(found, seen)


def _grown(found: list[Any], seen: set[Any]) -> list[Any]:
    """Add to ``found`` all that is behind it, besides what is in ``seen``, which holds ``None`` and ``found``."""
    push, add = found.append, seen.add
    for node in found:  # (the loop that the checks of a rollout cost most: half a microsecond a node)
        for parent, _ in node.next_functions:
            if parent not in seen:
                add(parent)
                push(parent)
    return found


def leaves_behind(loss: Tensor) -> list[Tensor]:
    """The leaf tensors that a loss depends on, in a fixed order."""
    return [node.variable for node in nodes([loss.grad_fn]) if hasattr(node, "variable")]


def refuse_broken_graph(starts: Iterable[Any]) -> None:
    """Refuse a graph, given by its last nodes, with an operation whose derivative was declared missing."""
    refuse_broken(nodes(starts))


def refuse_broken(graph: Sequence[Any]) -> None:
    """The same of a graph that is given by all its nodes."""
    suspects = [kind for kind in set(map(type, graph)) - _sound if _may_be_broken(kind)]
    for node in graph if suspects else ():
        if type(node) in suspects and node.name().endswith(("Error", "NotImplemented")):
            raise missing_derivative(name_of_broken(node))


_sound: set[type] = set()
"""Types of torch's own nodes that stand for one operation each, which has a derivative, or for a leaf."""


def _may_be_broken(kind: type) -> bool:
    """Whether a node of this type may stand for a missing derivative; most operations have a type of their own."""
    if kind.__name__.endswith(("Backward0", "Backward1", "AccumulateGrad")):
        _sound.add(kind)
        return False
    return not issubclass(kind, torch.autograd.function.BackwardCFunction)


_NEVER = 2**63
"""From here on numbers are those of nodes that are not numbered, a leaf's."""


def number(node: Any) -> int:
    """The number of a node in the order in which its thread made nodes; -1 of a leaf's."""
    at = int(node._sequence_nr())
    return at if at < _NEVER else -1


def newest() -> int:
    """The number that the next node of this thread will have."""
    return int(torch._C._autograd._get_sequence_nr())  # type: ignore[attr-defined, unused-ignore]  # pyright: ignore


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
        own = [x.grad_fn for x in given]
        if None not in own:
            return GraphPart(output.grad_fn, own, _NO_LEAVES)
        leaves = [id(x) for x, node in zip(given, own, strict=True) if node is None and x.requires_grad]
        return GraphPart(output.grad_fn, own, frozenset(leaves))


_NO_LEAVES: frozenset[int] = frozenset()


def ends_in_given(start: Any, given: Iterable[Any], leaves: Collection[int]) -> bool:
    """Whether all that a graph grows from was given to it, so that nothing is captured; see :class:`GraphPart`.

    (Half the work of :func:`captured_nodes`, which says what is captured, or that a leaf was made on the way.)
    """
    found, seen = [start], {None, start, *given}
    push, add = found.append, seen.add
    for node in found:
        behind = node.next_functions
        if not behind:
            return False
        for parent, _ in behind:
            if type(parent) is _LEAF:
                if id(parent.variable) not in leaves:
                    return False
            elif parent not in seen:
                add(parent)
                push(parent)
    return True


_LEAF: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined, unused-ignore]
"""The type of the nodes in which graphs end at leaves."""


def captured_nodes(parts: Sequence[GraphPart], born: int = -1) -> list[Any]:
    """The nodes of tensors that were there before these parts of a graph, besides those of the tensors given.

    The parts have grown one after the other. An older node is recognised by its number: it is below that of the first
    tensor given; where that is a leaf, below the number of the part before, or ``born``. A leaf has no number: it was
    there before if something besides the graph still holds it, for what a function makes for itself is let go when it
    returns (or, in a cycle, when collected).
    """
    if all([part.start is not None and ends_in_given(*part) for part in parts]):
        return []
    suspects: list[tuple[Any, GraphPart]] = []
    before: Any = None
    for part in parts:
        start, given, leaves = part
        first = given[0]
        if first is not None:
            born = number(first)
        elif before is not None:
            born = max(born, number(before))
        before = start
        if start is None:
            continue
        reached = [] if start in given else _grown([start], {None, start, *given})
        for node in reached:
            at = node._sequence_nr()
            if at < born or (at >= _NEVER and _is_leaf_besides(node, leaves)):
                suspects.append((node, part))
    if not suspects or not _captured(suspects):
        return []
    gc.collect()
    return _captured(suspects)


def _is_leaf_besides(node: Any, leaves: Collection[int]) -> bool:
    leaf = getattr(node, "variable", None)
    return leaf is not None and id(leaf) not in leaves


def _captured(suspects: Sequence[tuple[Any, GraphPart]]) -> list[Any]:
    found = []
    for node, part in suspects:
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            if sys.getrefcount(leaf) > _references_of_a_forgotten_leaf():
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
    others = {
        transforms.storage(x if type(x) is Tensor else _on_this_rank(x)) for x in ignored if x.layout == torch.strided
    }
    for node in graph:
        kind: Any = type(node)
        names = _saved.get(kind)
        for name in _saved_names(kind) if names is None else names:
            value = getattr(node, name, None)
            if value is None:
                continue
            if isinstance(value, Tensor):
                _add_storage(storages, value)
            elif type(value) is tuple and (not value or any([x is None or isinstance(x, Tensor) for x in value])):
                for x in value:
                    _add_storage(storages, x)
            else:  # a number, a shape: it will never be a tensor
                _saved[kind] = [other for other in _saved[kind] if other != name]
    return sum([size for pointer, size in storages.items() if pointer not in others])


def _add_storage(storages: dict[int, int], tensor: Tensor | None) -> None:
    """Add the storage of a tensor, by its address.

    Sparse tensors, zeros of forward mode and subclasses that hold others say by one of these errors that they have none
    of their own: torch has no other way to ask.
    """
    if tensor is None:
        return
    try:
        storage = (tensor if type(tensor) is Tensor else _on_this_rank(tensor)).untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError):
        return
    storages[address] = size


def _on_this_rank(tensor: Any) -> Tensor:
    """The part of a ``DTensor`` that this rank holds; any other tensor as it is."""
    return tensor.to_local() if is_spread(tensor) else tensor  # type: ignore[no-any-return]


_saved: dict[Any, list[str]] = {}
"""What nodes of each type may have saved tensors under."""


def _saved_names(kind: Any) -> list[str]:
    """Find out what nodes of a type may have saved tensors under."""
    names = [name for name in dir(kind) if name.startswith("_saved_")]
    known = _saved[kind] = ["saved_tensors"] if hasattr(kind, "saved_tensors") else names
    return known
