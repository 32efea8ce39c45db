"""What functions read of which nobody can see later whether it has changed: iterators, files, the environment.

# NOTE [what is taken for read]
All methods of an object are looked at for changes, for any may be called. Here that would be too much: an object that
has a loss for a method may well have others that read files. So a method counts if a name like its own is mentioned by
what is called, and an attribute likewise.
"""

from __future__ import annotations

import builtins
import dis
import functools
import io
import os
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any, final

import numpy as np
import torch

from diffopt.tensors.captures import Given, content_of, global_names


@final
class Unseen:
    """Functions, methods and objects that have been reached, among which is looked for such reads."""

    def __init__(self, roots: Iterable[object]) -> None:
        """``roots`` are called, whatever their names."""
        roots = [*roots]
        given = [x for root in roots if isinstance(root, Given) for x in root.values.values()]
        self._given = any(map(_changes_unseen, (*roots, *given)))
        self._roots = {id(getattr(root, "__func__", root)) for root in roots}
        self._methods: set[int] = set()
        self._functions: list[types.FunctionType] = []
        self._objects: list[dict[str, Any]] = []

    def note_method(self, value: Any) -> None:
        """Take note of something that a class has."""
        if isinstance(value, types.FunctionType):
            self._methods.add(id(value))

    def note(self, value: Any) -> None:
        """Take note of something that has been reached."""
        if isinstance(value, types.FunctionType):
            self._functions.append(value)
        elif isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, type):
            self._objects.append(value.__dict__)

    def what(self) -> str | None:
        """The first such read, as code would name it; ``None``: there is none."""
        if self._given:
            return "an argument"
        mentioned: set[str] = set()
        waiting, called = self._functions, list[types.FunctionType]()
        while True:
            now = [f for f in waiting if self._is_called(f, mentioned)]
            if not now:
                break
            called += now
            waiting = [f for f in waiting if f not in now]
            mentioned.update(*(global_names(f.__code__) for f in now))
        read = [name for function in called for name in _read_by(function)]
        read += [key for own in self._objects for key, x in own.items() if key in mentioned and _changes_unseen(x)]
        return read[0] if read else None

    def _is_called(self, function: types.FunctionType, mentioned: set[str]) -> bool:
        name, key = function.__name__, id(function)
        by_itself = name in ("__call__", "forward") or key in self._roots
        return by_itself or key not in self._methods or name in mentioned


def _read_by(function: types.FunctionType) -> Iterator[str]:
    """What one function reads."""
    code, space = function.__code__, function.__globals__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        if _changes_unseen(content_of(cell)):
            yield name
    names, variables = global_names(code), _variables(code)
    for name in names:
        imported = sys.modules.get(name)  # by the function itself
        found = space.get(name, getattr(builtins, name, imported)) if name in variables else None
        if _changes_unseen(found) or _is_reader(found) or name in _METHODS:
            yield name
        elif isinstance(found, types.ModuleType) and found.__name__ in _MODULES:
            yield from (f"{name}.{inner}" for inner in names if _is_reader(vars(found).get(inner)))


@functools.lru_cache(maxsize=4096)
def _variables(code: types.CodeType) -> frozenset[str]:
    """The names that code reads as variables, not as attributes: ``eval``, but not that of ``model.eval()``."""
    inner = [_variables(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    own = [x.argval for x in dis.get_instructions(code) if x.opname in ("LOAD_GLOBAL", "LOAD_NAME", "IMPORT_NAME")]
    return frozenset(own).union(*inner)


def _changes_unseen(value: Any) -> bool:
    """Whether an object, or one in a list, keeps a place in something that nobody can look at."""
    if isinstance(value, list | tuple):
        return any(map(_changes_unseen, value[:_FEW]))
    if isinstance(value, io.IOBase):
        return True
    return isinstance(value, Iterator) and type(value).__module__ in ("builtins", "itertools")


_FEW = 16
_METHODS = frozenset({"read_text", "read_bytes"})
_MODULES = frozenset({"os", "io", "numpy", "torch", "builtins"})
_READERS = (
    *(open, input, eval, exec, globals, os.getenv, os.environ, os.listdir, os.stat),
    *(np.load, np.loadtxt, np.genfromtxt, np.fromfile, np.memmap, torch.load),
)


def _is_reader(value: Any) -> bool:
    return any([value is reader for reader in _READERS])
