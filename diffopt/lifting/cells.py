"""Runs code that changes tensors in place, such as the step of a stateful optimizer, as a pure function of its inputs.

# NOTE [cells]
The code is handed cells instead of tensors. An operation reads the tensors in its cells and puts its result into a new
cell; an in-place operation puts the result into the cell it was called on, and no tensor ever changes. So autograd and
``torch.func`` see a pure function, whatever was done in place, under ``no_grad``, on ``.data`` or on ``.detach()``.

# NOTE [memory shared by two cells]
What this cannot imitate is a change that another cell should have seen, because both look at the same memory: a view
changed in place, or a view read after its base was changed. Both are refused when they happen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffopt.errors import LiftError
from diffopt.lifting.operations import RULES, apply_rule, first_in_place
from diffopt.tensors import transforms
from diffopt.tensors.leaves import Leaves


class BranchError(LiftError):
    """Code branches on a number that differs from task to task."""


class Cell(Tensor):
    """A tensor to the code that holds it; the numbers are in ``value``.

    Attributes:
        value: the tensor that it stands for at the moment.
        constant: made of nothing but numbers: then ``.item()`` loses no derivative.
        learned: a hyperparameter: it counts as positive, whatever its value, where code asks whether it is zero.
    """

    value: Tensor
    constant: bool
    learned: bool
    sources: tuple[tuple[Cell, Tensor], ...]
    """The cells it was computed from, with their values then: it may share memory with them."""
    grad: Any = None  # a plain attribute in place of torch's property

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse to compute with the scalar that a cell is by itself."""
        raise LiftError(f"its step hands a tensor to {_operation(func)[0]}", "operations of torch that can be followed")


# What a cell is by itself: a scalar, so that torch takes it where it wants a number, as in add(x, alpha=cell); and NaN,
# so that code which gets past torch's overrides to this number does not go on unnoticed.
_SCALAR = torch.full((), float("nan"))


def cell(value: Tensor, *, constant: bool = False, learned: bool = False) -> Cell:
    """A new cell with this tensor in it."""
    made: Any = Tensor._make_subclass(Cell, _SCALAR)
    made.value, made.constant, made.learned, made.sources = value, constant, learned, ()
    return made  # type: ignore[no-any-return]


def learned_cell(value: Leaves | float, leaf: int) -> Cell:
    """A hyperparameter in a cell: the number, or the tensor for this leaf of ``params``."""
    if isinstance(value, Leaves):
        return cell(value[leaf], learned=True)
    return cell(torch.tensor(value, dtype=torch.float64, device="cpu"), constant=True, learned=True)


_NUMBERS = frozenset({"__float__", "__int__", "__index__", "__complex__", "__array__", "numpy", "tolist"})
_NOTHING = object()


@functools.cache
def _operation(func: Any) -> tuple[str, bool]:
    """An operation's name without the mark of doing it in place, and whether it has that mark."""
    name = str(getattr(func, "__name__", func))
    if name == "__get__":  # of an attribute
        return func.__self__.__name__, False
    if name == "__set__":
        return f"set_{func.__self__.__name__}", True
    if name.endswith("_") and not name.startswith("_"):
        return name[:-1], True
    return name, name == "__setitem__"


class AsPureFunction(TorchFunctionMode):
    """Runs the operations of code that holds cells: see NOTE [cells]."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation."""
        name, in_place = _operation(func)
        if name == "_set_grad_enabled":
            return None
        args, options = first_in_place(name, in_place, args, kwargs or {})
        if args and isinstance(args[0], Cell):
            answer = _answer_about(args[0], name, in_place, args[1:])
            if answer is not _NOTHING:
                return answer
        if name.startswith(("_foreach", "_fused")):
            raise LiftError(
                f"its step calls torch.{name}", "operations that can be batched over tasks", "pass foreach=False"
            )
        target = args[0] if in_place else options.pop("out", None)
        read: list[Cell] = []
        values, options = _read(args, read), _read(options, read)
        constant = all(x.constant for x in read)
        if name == "__bool__":
            return _decide(values[0])
        if not constant and (name == "item" or name in _NUMBERS):
            return _number(name, values[0], read)
        if target is None:
            result = apply_rule(name, values, options) if name in RULES else func(*values, **options)
            return _wrapped(result, [] if name in ("clone", "__deepcopy__") else read, constant)
        _put(target, name, _functional(name, func, in_place)(*values, **options), constant)
        if name == "set_data":
            target.sources = tuple((x, x.value) for x in read if x is not target)
        return target


def _answer_about(x: Cell, name: str, in_place: bool, others: tuple[Any, ...]) -> Any:
    """What an operation gives that needs no tensor, or the cell itself where it hands it through."""
    if name in ("detach", "data", "retain_grad") or (name == "requires_grad" and in_place):
        return x
    if name in ("is_leaf", "requires_grad"):
        return name == "is_leaf" or not x.constant
    if not x.learned:
        return _NOTHING
    if name in ("squeeze", "numel"):  # one for each coordinate looks like one number, and keeps its shape
        return x if name == "squeeze" else 1
    # NOTE [a learned zero counts as positive]: the term that it is a factor of has a derivative.
    question = name.strip("_")
    if question == "bool":
        return True
    if len(others) == 1 and isinstance(others[0], int | float) and others[0] == 0:
        if question in ("eq", "ne"):
            return question == "ne"
        if question in ("gt", "ge", "lt", "le"):
            return _decide(x.value >= 0) == question.startswith("g")
    return _NOTHING


def _number(name: str, value: Tensor, read: list[Cell]) -> Cell:
    """A Python number, kept as a tensor of its precision, so that it keeps its derivative."""
    if name != "item":
        raise LiftError(
            f"its step makes a Python number of a tensor ({name}, as math.sqrt does)",
            "operations of torch, which keep the derivative",
        )
    return _wrapped(value.double() if value.is_floating_point() else value, read)  # type: ignore[no-any-return]


def _read(x: Any, read: list[Cell]) -> Any:
    """``x`` with the values of the cells in it, which are noted in ``read``."""
    if isinstance(x, Cell):
        for source, seen in x.sources:
            if source.value is not seen and _share_memory(x.value, seen):
                raise LiftError(
                    "its step reads a view of a tensor that was changed in place after the view was made",
                    "a view made after it",
                )
        read.append(x)
        return x.value
    if isinstance(x, Tensor) and x.requires_grad:
        raise LiftError(
            "its step reads a tensor that requires grad and that it was not given",
            "it among the options",
            "give it as one, as in from_torchopt(torchopt.adam, lr=lr)",
        )
    if isinstance(x, list | tuple):
        items = [_read(item, read) for item in x]
        return items if isinstance(x, list) else tuple(items)
    return {key: _read(item, read) for key, item in x.items()} if isinstance(x, dict) else x


def _wrapped(result: Any, read: list[Cell], constant: bool = False) -> Any:
    """The result with a cell around every tensor in it."""
    if isinstance(result, Tensor):
        made = cell(result, constant=constant)
        made.sources = tuple((source, source.value) for source in read)
        return made
    if isinstance(result, list | tuple) and any(isinstance(x, Tensor) for x in result):
        items = [_wrapped(x, read, constant) for x in result]
        return items if isinstance(result, list) else type(result)(items)
    return result


def _put(target: Any, name: str, value: Tensor, constant: bool) -> Cell:
    """Put a value into the cell of an in-place operation."""
    if not isinstance(target, Cell):
        raise LiftError(f"its step changes another tensor in place ({name})", "changes of parameters and of state only")
    if any(source is not target and _share_memory(target.value, seen) for source, seen in target.sources):
        raise LiftError(f"its step changes a view of another tensor in place ({name})", "changes of whole tensors")
    if value.shape != target.value.shape and "squeeze" not in name:
        raise LiftError(
            f"its step changes a tensor in place into one of shape {tuple(value.shape)}",
            f"its own shape {tuple(target.value.shape)}",
        )
    target.value, target.constant, target.sources = value.to(target.value.dtype), constant, ()
    return target


def _functional(name: str, func: Any, in_place: bool) -> Callable[..., Any]:
    """The operation that returns what this one would write."""
    if name in RULES:
        return lambda *values, **options: apply_rule(name, values, options)
    found: Callable[..., Any] | None = getattr(Tensor, name, None) if in_place else func
    if found is None:
        raise LiftError(f"its step calls {name}_", "operations that torch has in a form that is not in place")
    return found


def _decide(condition: Tensor) -> bool:
    """The one truth value of a condition, which under vmap must be the same for all tasks."""
    plain = transforms.plain(condition).bool()
    if bool(plain.all()) != bool(plain.any()):
        raise BranchError(
            "its step branches on a number in which the tasks of a vmap differ",
            "the same branch for all",
            "loop over the tasks",
        )
    return bool(plain.all())


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a is b or transforms.storage(a) == transforms.storage(b) != 0
