"""What functions read besides their arguments, looked at again before every call of a program made from them."""

from __future__ import annotations

import array
import functools
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, final

import numpy as np
import torch

from diffopt.tensors.captures import LARGE, OF_EVERY_MODULE, content_of, everything_held, global_names, refill
from diffopt.tensors.unseen import Unseen

_PLAIN = frozenset({bool, int, float, complex, str, bytes})


@final
class Reads:
    """The variables around some functions, their globals, and what is in the objects there, as they are now.

    Of imported modules that is looked at which the code of a function names. A tensor counts as the same
    while it is the same object, whatever its numbers; a number by its value, and a small array by those in it.

    Attributes:
        unseen: the name of something of which a change cannot be seen, such as an iterator; ``None``: nothing is known.
    """

    def __init__(self, functions: Iterable[object]) -> None:
        """Take note."""
        self._names: list[tuple[dict[str, Any], str]] = []
        self._attributes: list[tuple[type, str]] = []
        self._slots: list[tuple[object, types.MemberDescriptorType]] = []
        self._containers: list[Any] = []
        self._functions: list[types.FunctionType] = []
        self._asked: list[Callable[[], Any]] = []
        self._large: list[list[Any]] = []
        self._classes: set[type] = set()
        self._caches: list[Any] = []
        self._sized: list[dict[str, Any]] = []
        self._bare: list[dict[str, Any]] = []
        functions = [*functions]
        self._unseen = Unseen(functions)
        held = everything_held(functions, self._besides, _is_own)
        self.unseen = self._unseen.what()
        self._cells = held.cells
        self._names += held.names
        self._containers += held.containers
        self._seen = list(self._values())

    @property
    def unchanged(self) -> bool:
        """Whether all is as it was."""
        seen = iter(self._seen)
        for value in self._values():
            old = next(seen, self)  # (nothing is equal to this)
            # (by what is printed: 0.0 equals -0.0, and NaN not itself)
            if value is not old and not (
                type(value) is type(old) and type(value) in _PLAIN and repr(value) == repr(old)
            ):
                return False
        return next(seen, self) is self

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """What a block stores in one of the places that are looked at is gone afterwards."""
        names = [(space, name, space.get(name, self)) for space, name in self._names]
        attributes = [(kind, name, vars(kind).get(name)) for kind, name in self._attributes]
        slots = [(owner, slot, _in_slot(owner, slot, _EMPTY)) for owner, slot in self._slots]
        stores = [*self._containers, *self._sized, *self._bare]
        contents = [(x, _copied(x)) for x in stores if not isinstance(x, types.MappingProxyType)]
        known = [(kind, frozenset(vars(kind))) for kind in self._classes]
        misses = [(cache, cache.cache_info().misses) for cache in self._caches]
        lengths = [(x, len(x)) for x in self._large]
        try:
            yield
        finally:
            for space, name, old in names:
                if old is self:  # (it was not there)
                    space.pop(name, None)
                elif space.get(name) is not old:
                    space[name] = old
            for kind, name, old in attributes:
                if vars(kind).get(name) is not old:
                    setattr(kind, name, old)
            for kind, before in known:
                for name in [x for x in vars(kind) if x not in before and not x.startswith("__")]:
                    delattr(kind, name)
            for cache, count in misses:
                if cache.cache_info().misses != count:
                    cache.cache_clear()
            for owner, slot, old in slots:
                now = _in_slot(owner, slot, _EMPTY)
                if old is _EMPTY and now is not old:
                    slot.__delete__(owner)
                elif now is not old:
                    slot.__set__(owner, old)
            for container, held in contents:
                refill(container, held)
            for large, length in lengths:
                del large[length:]

    def _values(self) -> Iterator[Any]:
        yield from map(content_of, self._cells)
        for space, name in self._names:
            yield space.get(name)
        for kind, name in self._attributes:
            yield vars(kind).get(name)
        yield from map(len, self._large)
        yield from map(len, self._sized)
        for owner, slot in self._slots:
            yield _in_slot(owner, slot)
        for container in self._containers:
            yield len(container)
            if isinstance(container, dict | types.MappingProxyType):
                yield from container
                yield from container.values()
            elif isinstance(container, list | deque | set):
                yield from container
        for function in self._functions:  # whose code an editor may exchange
            yield from (function.__code__, function.__defaults__)
            yield from (function.__kwdefaults__ or {}).values()
        for ask in self._asked:
            yield ask()

    def _besides(self, value: Any) -> Iterator[Any]:
        """Take note of what else can be read of an object; yields what that leads to."""
        if not isinstance(value, types.FunctionType) or not _is_installed(value.__module__):
            self._unseen.note(value)
        if isinstance(value, types.FunctionType):
            self._functions.append(value)
            if vars(value):
                self._containers.append(vars(value))
                yield from vars(value).values()
            yield from self._of_modules(value)
        elif isinstance(value, torch.nn.Module):
            for module in value.modules():
                own = vars(module)  # of torch's modules too, whose numbers stand here
                self._names += [(own, name) for name in own if name == "training" or name not in OF_EVERY_MODULE]
                self._names.append((own, "forward"))  # which one may be given of its own
                hooks = [own[name] for name in _HOOKS]
                inner = [x for x in (own["_modules"], *hooks) if isinstance(x, dict)]
                self._containers += [x for x in inner if x]
                self._sized += [x for x in inner if not x]
                yield from (hook for x in hooks for hook in x.values())
                yield from self._of_class(type(module))
        elif isinstance(value, torch.Tensor):
            # (most have nothing, and there may be many)
            (self._containers if vars(value) else self._bare).append(vars(value))
            yield from vars(value).values()
        elif isinstance(value, type):
            yield from self._of_class(value)
        elif isinstance(value, weakref.ref):
            self._asked.append(value)
            yield value()
        elif isinstance(value, ContextVar):
            self._asked.append(functools.partial(value.get, None))
            yield value.get(None)
        elif isinstance(value, functools._lru_cache_wrapper):  # in which a trace would leave its tensors
            self._caches.append(value)
        elif isinstance(value, list) and len(value) > LARGE:
            self._large.append(value)
        elif isinstance(value, types.MappingProxyType) and len(value) <= LARGE:
            self._containers.append(value)
        elif isinstance(value, bytearray | array.array) and len(value) <= LARGE:
            self._asked.append(functools.partial(bytes, value))
        elif isinstance(value, set) and len(value) <= LARGE:
            self._containers.append(value)
        elif isinstance(value, np.ndarray) and value.size <= LARGE and not value.dtype.hasobject:
            self._asked.append(value.tobytes)
        else:
            yield from self._of_class(type(value))
            kinds = _own_classes(type(value))
            slots = [x for kind in kinds for x in vars(kind).values() if isinstance(x, types.MemberDescriptorType)]
            self._slots += [(value, slot) for slot in slots]
            yield from (_in_slot(value, slot) for slot in slots)

    def _of_modules(self, function: types.FunctionType) -> Iterator[Any]:
        """What the code of a function names of imported modules, and the classes that it names."""
        names, spaces = global_names(function.__code__), [function.__globals__]
        package = function.__globals__.get("__package__")
        around = [content_of(cell) for cell in function.__closure__ or ()]  # and those that it imports itself
        around += [sys.modules.get(x) for name in names for x in (name, f"{package}.{name}")]
        spaces += [vars(x) for x in around if isinstance(x, types.ModuleType) and not _is_installed(x.__name__)]
        for space in spaces if not _is_installed(function.__module__) else ():  # which grow
            for name in names:
                found = space.get(name)
                if isinstance(found, types.ModuleType) and not _is_installed(found.__name__):
                    spaces += [vars(found)] if not any(vars(found) is known for known in spaces) else []
                elif isinstance(found, type):
                    yield from self._of_class(found)
                elif space is not function.__globals__ and name in space:
                    self._names.append((space, name))
                    yield found

    def _of_class(self, kind: type) -> Iterator[Any]:
        """What a class and those it derives from have, and their methods."""
        for part in _own_classes(kind):
            if part not in self._classes:
                self._classes.add(part)
                for name, found in vars(part).items():
                    self._attributes.append((part, name))
                    method = getattr(found, "fget", None) or getattr(found, "__func__", found)
                    self._unseen.note_method(method)
                    yield method
                    if isinstance(found, type):
                        yield from self._of_class(found)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


_EMPTY: Any = object()


def _in_slot(owner: object, slot: types.MemberDescriptorType, empty: Any = None) -> Any:
    """What an object has in a slot; ``empty``: it has not been filled."""
    try:
        return slot.__get__(owner, type(owner))
    except AttributeError:
        return empty


def _copied(container: Any) -> Any:
    """The same entries in a plain container: what ``copy`` does, a class of the user's may say otherwise."""
    if isinstance(container, dict):
        return dict(container)
    return set(container) if isinstance(container, set) else list(container)


def _own_classes(kind: type) -> list[type]:
    """A class and those it derives from, but for installed ones."""
    return [part for part in kind.__mro__ if not _is_installed(part.__module__)]


def _is_own(value: Any) -> bool:
    """Whether an object is the user's: however deep one lies within another, it may be read, and changed."""
    if isinstance(value, types.FunctionType):
        return not _is_installed(value.__module__)
    return type(value).__module__ in _OF_DATA or not _is_installed(type(value).__module__)


_OF_DATA = frozenset({"builtins", "types", "collections", "functools", "argparse"})


@functools.cache
def _is_installed(module: str) -> bool:
    """Whether a module is this library's, Python's or an installed one: these keep no numbers that change."""
    root = (module or "").partition(".")[0]
    if root == "diffopt" or root in sys.stdlib_module_names:
        return True
    file = Path(getattr(sys.modules.get(root), "__file__", None) or "")
    # (a virtual environment may also see the packages of the system, and each system names their folder so)
    return not {"site-packages", "dist-packages"}.isdisjoint(file.parts)
