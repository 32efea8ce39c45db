"""Odd trees: containers inside one another, and leaves whose memory is laid out in every way that torch knows."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import optree
import torch
from hypothesis import strategies as st
from torch import Tensor


class Pair(NamedTuple):
    """A container with names."""

    left: Any
    right: Any


Point = namedtuple("Point", ["x"])


class Registered:
    """A container that optree and torch are told of."""

    def __init__(self, *held: Any) -> None:
        self.held = held


optree.register_pytree_node(
    Registered,
    lambda r: (r.held, None),
    lambda _, held: Registered(*held),
    namespace=optree.registry.__GLOBAL_NAMESPACE,
)


@dataclass(frozen=True)
class Skeleton:
    """A tree without its leaves: a container, what it holds (``int``: the leaf of that number), and its keys."""

    kind: str
    held: tuple[Any, ...] = ()
    keys: tuple[Any, ...] = ()

    def fill(self, leaves: Sequence[Any]) -> Any:
        """The tree with these leaves."""
        held = [part.fill(leaves) if isinstance(part, Skeleton) else leaves[part] for part in self.held]
        return _MAKE[self.kind](held, self.keys)

    def pick(self, tree: Any, into: dict[int, Any]) -> dict[int, Any]:
        """The leaves of a tree by their numbers, found by walking down; the containers are of the kinds they were."""
        if type(tree) is not type(_MAKE[self.kind]([None] * len(self.held), self.keys)):
            raise AssertionError(f"a {self.kind} came back as {type(tree)}")
        for place, part in enumerate(self.held):
            found = _TAKE[self.kind](tree, place, self.keys)
            if isinstance(part, Skeleton):
                part.pick(found, into)
            else:
                into[part] = found
        return into


def _by_key(tree: Any, place: int, keys: tuple[Any, ...]) -> Any:
    return tree[keys[place]]


def _by_place(tree: Any, place: int, keys: tuple[Any, ...]) -> Any:
    return tree[place]


_MAKE: dict[str, Callable[[list[Any], tuple[Any, ...]], Any]] = {
    "dict": lambda held, keys: dict(zip(keys, held, strict=True)),
    "ordered": lambda held, keys: OrderedDict(zip(keys, held, strict=True)),
    "defaultdict": lambda held, keys: defaultdict(list, zip(keys, held, strict=True)),
    "list": lambda held, keys: held,
    "tuple": lambda held, keys: tuple(held),
    "deque": lambda held, keys: deque(held),
    "pair": lambda held, keys: Pair(*held),
    "point": lambda held, keys: Point(*held),
    "registered": lambda held, keys: Registered(*held),
}
_TAKE = {kind: _by_key if kind in ("dict", "ordered", "defaultdict") else _by_place for kind in _MAKE}
_TAKE["registered"] = lambda tree, place, keys: tree.held[place]
KEYS = (("b", "a", "c"), (2, 1, 10), ("x.y", "", "z"), (("t", 1), ("t", 0), ("s", 5)), (1.5, 0.5, -1.0), ("b", 1, None))


@st.composite
def skeletons(draw: st.DrawFn, count: int, bare: bool = True) -> Any:
    """A tree of ``count`` leaves; containers that hold nothing stand here and there. ``int``: no container at all."""
    if bare and count == 1 and draw(st.booleans()):
        return 0
    return draw(_over(tuple(draw(st.permutations(range(count)))), 2))


@st.composite
def _over(draw: st.DrawFn, numbers: tuple[int, ...], depth: int) -> Skeleton:
    """A container over these leaves."""
    kinds = ["dict", "ordered", "defaultdict", "list", "tuple", "deque", "registered"]
    parts: list[Any] = list(numbers)
    if depth and len(parts) > 1 and draw(st.booleans()):
        cut = draw(st.integers(1, len(parts) - 1))
        parts = [draw(_over(tuple(parts[:cut]), depth - 1)), *parts[cut:]]
    elif depth and draw(st.integers(0, 3)) == 0:
        parts = [draw(_over(tuple(parts), depth - 1))]
    if len(parts) < 3 and draw(st.integers(0, 4)) == 0:
        parts.append(Skeleton(draw(st.sampled_from(["dict", "list", "tuple"]))))
    kinds += {1: ["point"], 2: ["pair"]}.get(len(parts), [])
    kind = draw(st.sampled_from(kinds))
    keys = draw(st.sampled_from(KEYS))[: len(parts)] if "dict" in kind or kind == "ordered" else ()
    if len(parts) > 3:
        kind, keys = "list", ()
    return Skeleton(kind, tuple(parts), keys)


def fill(skeleton: Any, leaves: Sequence[Any]) -> Any:
    """The tree with these leaves; a bare leaf is one."""
    return leaves[0] if isinstance(skeleton, int) else skeleton.fill(leaves)


def pick(skeleton: Any, tree: Any) -> list[Any]:
    """The leaves of a tree, by their numbers."""
    if isinstance(skeleton, int):
        return [tree]
    found = skeleton.pick(tree, {})
    return [found[i] for i in sorted(found)]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "transposed": lambda x: x.t() if x.ndim == 2 else x,
    "every_second": lambda x: x[::2] if x.ndim else x,
    "expanded": lambda x: x.expand(2, *x.shape) if x.ndim < 2 else x,
    "row": lambda x: x[0] if x.ndim == 2 else x,
    "unsqueezed": lambda x: x.unsqueeze(-1) if x.ndim < 2 else x,
    "first_number": lambda x: x.reshape(-1)[0],
    "diagonal": lambda x: x.diagonal() if x.ndim == 2 else x,
    "negative": lambda x: torch.conj(torch.complex(0 * x, x)).imag,  # a view with torch's negative bit
    "flipped": lambda x: x.flip(0) if x.ndim else x,
}
"""What a leaf is to the tensor that is learned."""

SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (2,), (3,), (2, 2), (1, 3), (3, 1))
