"""What functions read besides their arguments, looked at again before every call of a program made from them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, final

from diffopt.tensors.captures import content_of, everything_held

_PLAIN = frozenset({bool, int, float, complex, str, bytes})


@final
class Reads:
    """The variables around some functions, their globals, and what is in the objects there, as they are now.

    A tensor counts as the same while it is the same object, whatever its numbers; a number by its value.
    """

    def __init__(self, functions: Iterable[object]) -> None:
        """Take note."""
        held = everything_held(functions)
        self._cells, self._names = held.cells, held.names
        self._containers, self._modules = held.containers, held.modules
        self._seen = list(self._values())

    @property
    def unchanged(self) -> bool:
        """Whether all is as it was."""
        seen = iter(self._seen)
        for value in self._values():
            old = next(seen, self)  # (nothing is equal to this)
            if value is not old and not (type(value) is type(old) and type(value) in _PLAIN and value == old):
                return False
        return next(seen, self) is self

    def _values(self) -> Iterator[Any]:
        yield from map(content_of, self._cells)
        for space, name in self._names:
            yield space.get(name)
        for container in self._containers:
            yield len(container)
            if isinstance(container, dict):
                yield from container
                yield from container.values()
            elif isinstance(container, list | deque):
                yield from container
        for module in self._modules:
            yield module.training
