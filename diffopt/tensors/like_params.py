"""The leaves of a buffer that a user gives, in the order of the leaves of ``params``."""

from __future__ import annotations

from typing import Any

from diffopt.errors import OptimizerError
from diffopt.tensors import tree


def buffer_leaves(name: str, buffer: Any, structure: tree.Structure) -> tuple[list[Any], list[str]]:
    """The leaves of a state's buffer, and what to call them.

    With as many leaves as ``params`` it is a tree of that structure, whose leaves are found by their keys and not by
    their places: equally many under other keys belong to other parameters. With fewer or more (those of one group, or
    what a lifted class keeps of some parameters) it is a tuple or a list.

    Raises:
        OptimizerError: it is neither.
    """
    leaves, form = tree.flatten(buffer)
    called, expected = f"buffers[{name!r}]", "a tree like params"
    differ = False
    if len(leaves) == structure.num_leaves:
        try:
            leaves, form = tree.flatten_up_to(structure, buffer), structure
        except ValueError:
            differ = True
    elif not isinstance(buffer, tuple | list):
        differ, expected = True, "a tree like params, or a tuple of other length"
    if differ:
        found = ", ".join(tree.differences(called, buffer, structure)[:3]) or "its branches are of other types"
        raise OptimizerError(
            f"the state's buffer {name!r} is {tree.describe(buffer)}",
            f"{expected} ({found})",
            "give the buffers of every parameter under its own key, as solution.state has them",
        )
    return leaves, [f"{called}{path}" for path in tree.paths(form)]
