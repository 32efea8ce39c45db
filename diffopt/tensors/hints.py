"""What to write instead of an argument of a kind that is often passed in its place: the last part of a message."""

from __future__ import annotations

import functools
import sys
from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from diffopt.tensors.plain_numbers import plain_list
from diffopt.tensors.tree import NAMESPACE

NATIVE = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad")
"""The classes of ``torch.optim`` that this library has by the same names."""

_OF_MODULE = "write function, params = diffopt.functional(module): pass params, call function(params, x) in the loss"


def for_params(value: Any) -> str:
    """The fix for a leaf of ``params`` that cannot be optimised; empty if none is known."""
    if isinstance(value, torch.nn.Module):
        return _OF_MODULE
    if isinstance(value, Tensor):
        return _for_tensor(value)
    if isinstance(value, torch.optim.Optimizer):
        return _OF_MODULE
    if isinstance(value, Iterator | ItemsView | KeysView | ValuesView):
        if not _is_of_module(value):
            return "pass list(...) of it, or dict(...) of pairs"
        whole = "dict(...)" if "named" in str(getattr(value, "__qualname__", "")) else "list(...)"
        return f"{_OF_MODULE} (or pass {whole} of it)"
    if isinstance(value, str):
        return "pass dict(...) of pairs of names and tensors"
    if isinstance(value, torch.utils.data.DataLoader | torch.utils.data.Dataset):
        return "data goes in *args or batches"
    if isinstance(value, int | float) or type(value).__module__ == "numpy":
        return "convert it with torch.as_tensor (a constant of the loss goes in *args)"
    return f"it is {for_object(value)}" if holds_by_name(value) else ""


def _is_of_module(value: Any) -> bool:
    """Whether it is what ``module.parameters()`` returns, a generator that carries its method's name."""
    return str(getattr(value, "__qualname__", "")) in ("Module.parameters", "Module.named_parameters")


def _for_tensor(value: Tensor) -> str:
    if torch.nn.parameter.is_lazy(value):
        return "call the lazy module once, on data, before you take its parameters"
    if value.layout != torch.strided and not value.is_nested:
        return "convert it with .to_dense()"
    if value.is_complex():
        return "optimise torch.view_as_real of it"
    return "convert it with .to(), or pass it in *args if it is a constant of the loss" if not value.is_nested else ""


def holds_by_name(value: Any) -> bool:
    """Whether an object keeps others in its attributes, and so is likely meant as a tree."""
    plain = isinstance(value, type) or callable(value)
    return not plain and (isinstance(value, Mapping) or bool(getattr(value, "__dict__", None)) or _has_slots(value))


def _has_slots(value: Any) -> bool:
    return any(getattr(kind, "__slots__", ()) for kind in type(value).__mro__) and type(value).__module__ != "builtins"


def for_object(value: Any) -> str:
    """The fix for tensors inside an object that is no tree."""
    kind = type(value).__name__
    how = "dict(...)" if isinstance(value, Mapping) else "vars(...)" if getattr(value, "__dict__", None) else ""
    form = f"a dict, as {how}" if how else "a dict of its fields"
    return f"no tree: pass {form}, or optree.register_pytree_node({kind}, ..., namespace={NAMESPACE!r})"


def for_arguments(value: Any) -> str:
    """The fix for tensors that the loss has found inside an argument, where a tree does not show them."""
    if isinstance(value, torch.nn.Module):
        return (
            "a module, no tree: write function, params = diffopt.functional(module), pass params, and call "
            "function(params, x) in the loss"
        )
    if isinstance(value, Iterator):
        return f"a {type(value).__name__}, which hides its tensors and is used up by the first step: pass a list"
    return for_object(value)


def for_batches(value: Any, steps: int) -> str:
    """The fix for batches that are not stacked; empty if none is known."""
    if isinstance(value, list | tuple) and len(value) > 0:
        many = isinstance(value, list) or not isinstance(value[0], Tensor)
        return f"if it is a list of batches, {stacked(value, steps)}" if many else ""
    data = torch.utils.data
    taken = f"take {steps} batches in a list and stack them: tuple(torch.stack(x) for x in zip(*list_of_batches))"
    if isinstance(value, data.DataLoader) and not isinstance(value.dataset, data.IterableDataset):
        return f"write diffopt.Batches(loader.dataset, batch_size={value.batch_size}), or {taken}"
    if isinstance(value, data.Dataset) and not isinstance(value, data.IterableDataset):
        return "write diffopt.Batches(dataset, batch_size)"
    if isinstance(value, data.DataLoader | data.Dataset | Iterator):
        return taken
    return "convert it with torch.as_tensor" if type(value).__module__ == "numpy" else ""


def stacked(batches: Any, steps: int) -> str:
    """How to make one tree of a list of batches."""
    some = "batches" if len(batches) <= steps else f"batches[:{steps}]"
    first = batches[0]
    if isinstance(first, Mapping):
        how = f"{{key: torch.stack([b[key] for b in {some}]) for key in batches[0]}}"
    elif isinstance(first, list | tuple):
        how = f"tuple(torch.stack(x) for x in zip(*{some}))"
    else:
        how = f"torch.stack({some})"
    few = f" (there are {len(batches)} for {steps} steps)" if len(batches) < steps else ""
    return f"stack them, as collate does with samples: {how}{few}"


def name_of_torch(kind: type[torch.optim.Optimizer]) -> str:
    """What a class of ``torch.optim``, or one like it, is called in a program."""
    return f"torch.optim.{kind.__name__}" if kind.__module__.startswith("torch.optim") else kind.__name__


def for_optimizer(value: Any) -> str:
    """The fix for what is not a :class:`diffopt.Optimizer`."""
    value = value.func if isinstance(value, functools.partial) else value
    kind = value if isinstance(value, type) else type(value)
    if issubclass(kind, torch.optim.Optimizer):
        name = name_of_torch(kind)
        if name == "torch.optim.Muon":
            return "write diffopt.Muon(lr=...)"
        native = f"write diffopt.{kind.__name__}(lr=...), or " if kind.__name__ in NATIVE and "." in name else ""
        return f"{native}lift the class: diffopt.from_torch({name}, lr=...)"
    if issubclass(kind, LRScheduler):
        return "a learning rate that changes is lr=diffopt.Schedule(values), one a step"
    if isinstance(value, tuple) and len(value) == 2 and all(map(callable, value)):
        return "lift a pair (init, update): diffopt.from_torchopt(pair)"
    return "call it, as in SGD(lr=0.1)" if isinstance(value, type) else ""


def for_hyperparameter(value: Any, steps: int, scheduled: bool) -> str:
    """What to write for several values, or a function, where one value is expected; empty if it is neither."""
    if _is_of_module(value):
        return "an optimizer takes no parameters here: they are solve's second argument, solve(loss, params, ...)"
    if isinstance(value, LRScheduler):
        return "a scheduler's values, one for each step: diffopt.Schedule(values)"
    if callable(value) and not isinstance(value, type | Tensor | torch.nn.Module):
        return "a function of the step: diffopt.Schedule([lr(t) for t in range(steps)])"
    listed = isinstance(plain_list(value), list | tuple)
    if scheduled:
        return "torch.stack the entries of a Schedule into one tensor" if listed else ""
    one_each = isinstance(value, Tensor) and value.ndim == 1 and len(value) == steps
    own = "; a field of several numbers: metadata=diffopt.optimizers.EACH" if listed else ""
    return f"one value for each step: diffopt.Schedule(values){own}" if listed or one_each else ""


def for_loss(value: Any) -> str:
    """What to do about something that a loss returned and that is not one floating scalar."""
    if isinstance(value, tuple | list | Mapping):
        return (
            "return the scalar alone, or a pair (loss, aux) with has_aux=True (what is like params, a gradient or "
            "another field, goes in as diffopt.VectorField(v))"
        )
    if value is None:
        return "end it with return"
    if not isinstance(value, Tensor):
        return "keep it a tensor: .item(), float() and numpy leave torch"
    if value.ndim == 0:
        return "take a real number of it, such as .real" if value.is_complex() else "make it floating with .float()"
    return "reduce it with .mean() or .sum()"


def for_measured(value: Any) -> str:
    """What to do about something that a metric returned and that is neither a floating scalar nor a vector."""
    if isinstance(value, tuple | list | Mapping):
        return "put the numbers into one tensor with torch.stack"
    return "measure something" if isinstance(value, Tensor) and not value.numel() else for_loss(value)


def in_inference_mode() -> str:
    """Who may have entered ``torch.inference_mode``, if that is known."""
    lightning = any(name in sys.modules for name in ("lightning", "pytorch_lightning"))
    return "; under Lightning, Trainer(inference_mode=False)" if lightning else ""
