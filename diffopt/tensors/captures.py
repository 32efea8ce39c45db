"""The tensors that a function holds besides its arguments, by the names a reader of its code would give them."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from diffopt.tensors import hints
from diffopt.tensors.tree import describe

_DEPTH = 5
"""How many objects inside one another are looked into."""


def named_tensors(function: object) -> dict[str, Tensor]:
    """Every tensor that can be reached from a function through closures, globals, defaults, attributes and modules."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    pending: list[tuple[str, Any, int]] = [("", function, 0)]
    while pending:
        name, value, depth = pending.pop(0)
        if id(value) in seen or depth > _DEPTH:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            found[name or "tensor"] = value
        else:
            deeper = depth + (not isinstance(value, torch.nn.Module))  # modules within modules are one object
            pending += ((inner, held, deeper) for inner, held in _held(name, value))
    return found


@final
@dataclass(frozen=True)
class Held:
    """What can be reached from some functions in the same way, without names, which are most of the work.

    Attributes:
        tensors: those that are not of an object that is skipped.
        modules: those inside others included.
        generators: of random numbers.
        containers: dictionaries and lists, of attributes too: whatever has places that can be filled anew.
        cells: variables of functions around them.
        names: global variables, each by the dictionary that has it and its name.
    """

    tensors: list[Tensor] = field(default_factory=list)
    modules: list[torch.nn.Module] = field(default_factory=list)
    generators: list[torch.Generator] = field(default_factory=list)
    containers: list[Any] = field(default_factory=list)
    cells: list[types.CellType] = field(default_factory=list)
    names: list[tuple[dict[str, Any], str]] = field(default_factory=list)

    def note(self, value: Any) -> Iterable[Any]:
        """Sort in one object that has been reached, and say what it holds."""
        if isinstance(value, types.FunctionType):  # (first, for torch's own classes are slow to ask)
            return self._of_function(value)
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return ()
        if isinstance(value, torch.nn.Module):
            return self._of_module(value)
        if isinstance(value, types.MethodType):
            return value.__self__, value.__func__
        if isinstance(value, functools.partial):
            return value.func, *value.args, *value.keywords.values()
        if isinstance(value, dict | list | deque):
            if len(value) <= LARGE:
                self.containers.append(value)
            return value.values() if isinstance(value, dict) else value
        if isinstance(value, tuple | set | frozenset):
            return value
        if isinstance(value, torch.Generator):
            self.generators.append(value)
            return ()
        own = None if isinstance(value, type) else getattr(value, "__dict__", None)
        if isinstance(own, dict):
            self.containers.append(own)
            return own.values()
        return value.values() if isinstance(value, Mapping) else ()

    def _of_module(self, outermost: torch.nn.Module) -> Iterable[Any]:
        """Sort in a module with those inside it, and say what else they hold."""
        inner: list[Any] = []
        modules, known = [outermost], {id(outermost)}
        for module in modules:  # which grow
            for own in (module._parameters, module._buffers):
                if own:
                    self.containers.append(own)
                    self.tensors.extend([x for x in own.values() if x is not None])
            if not _is_torchs(module):
                self.containers.append(module.__dict__)
                inner.extend([held for name, held in module.__dict__.items() if name not in OF_EVERY_MODULE])
            for child in module._modules.values():
                if child is not None and id(child) not in known:
                    known.add(id(child))
                    modules.append(child)
        self.modules.extend(modules)
        return inner

    def _of_function(self, function: types.FunctionType) -> Iterable[Any]:
        if _is_torchs(function):
            return ()
        inner: list[Any] = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        if function.__closure__:
            self.cells.extend(function.__closure__)
            inner += map(content_of, function.__closure__)
        if not (function.__module__ or "").startswith("diffopt."):  # whose globals keep no state
            space = function.__globals__
            names = [(space, name) for name in global_names(function.__code__) if name in space]
            self.names.extend(names)
            inner += [space[name] for _, name in names]
        return inner


def content_of(cell: types.CellType) -> Any:
    """What a variable of a function around another is; ``None``: it has not been set yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def everything_held(
    functions: Iterable[object],
    besides: Callable[[Any], Iterable[Any]] | None = None,
    is_own: Callable[[Any], bool] = lambda value: False,
) -> Held:
    """What some functions hold: a walk of some ten microseconds for a small module.

    ``besides`` says of each object that is reached what else it leads to (and is asked of classes, too); ``is_own``
    which ones do not count as depth, unless they are inside of others that do.
    """
    held, seen = Held(), set[int]()
    pending: list[tuple[Any, int]] = [(function, 0) for function in functions]
    while pending:
        value, depth = pending.pop()
        if id(value) in seen or depth > _DEPTH:
            continue
        seen.add(id(value))
        inner = held.note(value) if besides is None else (*held.note(value), *besides(value))
        nothing = _HOLD_NOTHING if besides is None else _HOLD_NOTHING - {type}
        deeper = depth if depth == 0 and is_own(value) else depth + 1
        pending.extend([(x, deeper) for x in inner if type(x) not in nothing])
    return held


def refill(container: Any, old: Any) -> None:
    """Let a dictionary, a list or a set hold what it held."""
    if not isinstance(container, dict):
        ids = set if isinstance(container, set) else list  # (a copy of a set may be in another order)
        if ids(map(id, container)) != ids(map(id, old)):
            container.clear()
            (container.update if isinstance(container, set) else container.extend)(old)
        return
    for key in [key for key in container if key not in old]:
        del container[key]
    for key, value in old.items():
        if container.get(key) is not value:
            container[key] = value


LARGE = 1000
"""Longer lists are data, which nobody looks at again and again."""

_HOLD_NOTHING = {
    *(type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size),
    *(types.ModuleType, types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType),
}


@final
@dataclass(frozen=True)
class Given:
    """What a function was given that is no tensor to a tree, by the names that a caller would use."""

    values: dict[str, Any]


def _held(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds, by name."""
    dot = f"{name}." if name else ""
    if isinstance(value, Given):
        yield from value.values.items()
        return
    if isinstance(value, torch.nn.Module):
        yield from _held_by_module(dot, value)
    elif isinstance(value, types.FunctionType):
        yield from _held_by_function(value)
    elif isinstance(value, types.MethodType):
        yield from ((name or "self", value.__self__), (name, value.__func__))
    elif isinstance(value, functools.partial):
        yield (name, value.func)
        yield from enumerate_named(name, value.args)
        yield from value.keywords.items()
    elif isinstance(value, Mapping):
        yield from ((f"{name}[{key!r}]", held) for key, held in value.items())
    elif isinstance(value, list | tuple | deque):
        yield from enumerate_named(name, value)
    elif not isinstance(value, type | types.ModuleType | types.BuiltinFunctionType):
        yield from ((dot + key, held) for key, held in getattr(value, "__dict__", {}).items())
        for key in (key for kind in type(value).__mro__ for key in _slots(kind)):
            with suppress(AttributeError):  # a slot that has not been filled
                yield dot + key, object.__getattribute__(value, key)


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _held_by_module(dot: str, module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    for own in (module._parameters, module._buffers, module._modules):
        yield from ((dot + key, held) for key, held in own.items() if held is not None)
    if not _is_torchs(module):  # torch's own keep all of their tensors in these
        yield from ((dot + key, held) for key, held in module.__dict__.items() if key not in OF_EVERY_MODULE)


OF_EVERY_MODULE = frozenset(torch.nn.Module().__dict__)


def _is_torchs(value: Any) -> bool:
    """Whether a function, or the class of an object, is one of torch's own."""
    kind = value if isinstance(value, types.FunctionType) else type(value)
    return (kind.__module__ or "").startswith("torch.")


def enumerate_named(name: str, values: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """The entries of a sequence, each under its place."""
    return ((f"{name}[{i}]", held) for i, held in enumerate(values))


def _held_by_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # a variable that has not been set yet
            yield name, cell.cell_contents
    for name in _names_of_globals(function):
        yield name, function.__globals__[name]
    if function.__defaults__:
        yield from enumerate_named("default", function.__defaults__)
    yield from (function.__kwdefaults__ or {}).items()


def _names_of_globals(function: types.FunctionType) -> list[str]:
    return [name for name in global_names(function.__code__) if name in function.__globals__]


@functools.lru_cache(maxsize=4096)
def global_names(code: types.CodeType) -> tuple[str, ...]:
    """The names of globals and attributes that some code mentions, that of functions inside it included."""
    inner = (global_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return (*code.co_names, *(name for names in inner for name in names))


def mend_for(nodes: Sequence[Any], functions: Sequence[object] = ()) -> str:
    """What to do about captured tensors at these nodes of a graph; a parameter may be a module's, called as it is.

    One that was given, inside an object whose contents a tree does not show, is at hand already.
    """
    for given in (function for function in functions if isinstance(function, Given)):
        for name, value in given.values.items():
            if any(_is_at(x, node) for x in named_tensors(value).values() for node in nodes):
                return f"`{name}` is {hints.for_arguments(value)}"
        for name, value in given.values.items():
            if isinstance(value, Iterator):
                return f"it may come from `{name}`, {hints.for_arguments(value)}"
    if any(isinstance(getattr(node, "variable", None), torch.nn.Parameter) for node in nodes):
        return "pass it in *args; if it is a module's, pass and call what diffopt.functional(module) returns"
    return "pass it in *args or batches; a constant: .detach() or requires_grad_(False)"


def _is_at(tensor: Tensor, node: Any) -> bool:
    leaf = getattr(node, "variable", None)
    return tensor is leaf or (leaf is None and tensor.grad_fn is node)


def names_of(nodes: Iterable[Any], functions: Sequence[object]) -> str:
    """What to call the tensors at these nodes of a graph: the names under which ``functions`` hold them."""
    held = {name: x for function in functions for name, x in named_tensors(function).items()}
    shown = []
    for node in nodes:
        leaf = getattr(node, "variable", None)
        name = next((name for name, x in held.items() if _is_at(x, node)), None)
        if name is not None and len(name) <= 60:
            shown.append(f"`{name}`")
        elif leaf is not None:
            shown.append(describe(leaf))
    shown = sorted(dict.fromkeys(shown))
    return ", ".join([*shown[:2], "..."] if len(shown) > 2 else shown) or "a tensor"
