"""Parts of a tree of params: which leaves belong to it, and what a tree of hyperparameters for it looks like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from diffopt.errors import StructureError
from diffopt.tensors import tree


@final
@dataclass(frozen=True)
class Branches:
    """The leaves of a tree of params that one optimizer sees.

    Attributes:
        structure: of the whole tree.
        places: its leaves among those of the tree, in their order.
        whole: whether these are all of them.
    """

    structure: tree.Structure
    places: tuple[int, ...]
    whole: bool = True

    @staticmethod
    def all(structure: tree.Structure) -> Branches:
        """Every leaf."""
        return Branches(structure, tuple(range(structure.num_leaves)))

    def part(self, places: Sequence[int]) -> Branches:
        """Those of its leaves at these places, counted among its own."""
        chosen = tuple([self.places[i] for i in places])
        return Branches(self.structure, chosen, len(chosen) == self.structure.num_leaves)

    def paths(self) -> list[str]:
        """The path of each leaf in the whole tree, its keys joined by dots."""
        found = tree.dotted_paths(self.structure)
        return [found[i] for i in self.places]

    def entries(self, value: Any) -> list[tuple[str, Any]]:
        """The path and the entry of a tree of hyperparameters for each leaf.

        The tree has the branches of the whole, of which only the own entries are read; or those of the part: without
        the entries of others, a list or a tuple that lacks some being a dict by position; or those of the smallest
        branch of it that has all of the leaves.

        Raises:
            ValueError, TypeError: it has none of these forms.
        """
        failure: Exception | None = None
        for structure, places in [(self.structure, self.places), *([] if self.whole else self._smaller())]:
            try:
                entries = tree.flatten_up_to(structure, value)
            except (ValueError, TypeError) as error:
                failure = failure or error
                continue
            named = list(zip(tree.paths(structure), entries, strict=True))
            return [named[i] for i in places]
        raise failure or ValueError(value)

    def _smaller(self) -> list[tuple[tree.Structure, tuple[int, ...]]]:
        """The structure of the part and of the branches that hold all of it, and where its leaves stand in each."""
        numbers, structure = tree.flatten(_without_others(self.structure, 0, frozenset(self.places)))
        where = tuple([numbers.index(i) for i in self.places])
        found = [(structure, where)]
        while structure.num_children == 1:
            (structure,) = structure.children()
            found.append((structure, where))
        return found


def _without_others(structure: tree.Structure, first: int, wanted: frozenset[int]) -> Any:
    """The tree of the numbers of its leaves, which start at ``first``, as far as they are wanted."""
    numbers = range(first, first + structure.num_leaves)
    if wanted.issuperset(numbers):
        return tree.unflatten(structure, numbers)
    kept = {}
    for key, child in zip(structure.entries(), structure.children(), strict=True):
        if not wanted.isdisjoint(range(first, first + child.num_leaves)):
            kept[key] = _without_others(child, first, wanted)
        first += child.num_leaves
    return kept


def other_structure(name: str, value: Any, branches: Branches, meant: str) -> StructureError:
    """The error for a tree of hyperparameters that does not look like the params."""
    found, odd = tree.flatten(value)[1], ""
    if found.type is not None and (not meant or found.type is branches.structure.type):
        named = tree.differences(name, value, branches.structure, deeper=True)
        odd = f" ({(named or ['it has other kinds of branches'])[0]})"
    of = "of params" if branches.whole else "of params, or of the group's part of them"
    return StructureError(
        f"{name} is {tree.describe(value)}{odd}",
        f"a float, a scalar tensor, a Schedule, or a tree with the structure {of}",
        meant,
    )
