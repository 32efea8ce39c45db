"""The inner gradient and its pullback as compiled functions, for losses so small that overhead is all they cost."""

from __future__ import annotations

import importlib
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from diffopt import autodiff, randomness
from diffopt.dynamics import Dynamics
from diffopt.errors import CapturedTensorError, CompileWarning

TensorFunction: TypeAlias = Callable[..., tuple[Tensor, ...]]


class Gradient(NamedTuple):
    """What one evaluation of the compiled inner gradient gives: the losses, and the gradients of the params."""

    losses: Tensor
    grads: tuple[Tensor, ...]


def gradient(dynamics: Dynamics, params: Sequence[Tensor], current: Sequence[Tensor]) -> Gradient | None:
    """The inner losses and gradients, compiled; ``None`` if that cannot be done, of which a warning says why."""
    count, read = dynamics.params_count, list(current[: dynamics.hyperparameters_start])

    def evaluate(*tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            roots = [x.detach().requires_grad_() for x in tensors[:count]]
            losses = dynamics.losses(roots, tensors[count:])
            found = autodiff.gradient(losses.sum(), roots, differentiable=False)
        return (losses.detach(), *autodiff.or_zeros(found, roots))

    function = _compiled(dynamics, ("gradient",), evaluate, [*params, *read])
    if function is None:
        return None
    losses, *grads = function(*params, *read)
    return Gradient(losses, tuple(grads))


def product(
    dynamics: Dynamics,
    params: Sequence[Tensor],
    current: Sequence[Tensor],
    vectors: Sequence[Tensor],
    wanted: Sequence[int],
) -> tuple[Tensor, ...] | None:
    """``H u``, then ``M' u`` for the extras ``wanted``, compiled; ``None`` as for :func:`gradient`."""
    count, read = dynamics.params_count, list(current[: dynamics.hyperparameters_start])

    def evaluate(*tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            now = list(tensors[count : count + len(read)])
            for number in wanted:
                now[number] = now[number].detach().requires_grad_()
            roots = [x.detach().requires_grad_() for x in tensors[:count]]
            grads = autodiff.gradient(dynamics.losses(roots, now).sum(), roots, differentiable=True)
            inputs = [*roots, *(now[number] for number in wanted)]
            return autodiff.pullback(grads, inputs, tensors[count + len(read) :])

    arguments = [*params, *read, *vectors]
    function = _compiled(dynamics, ("product", *wanted), evaluate, arguments)
    return None if function is None else function(*arguments)


def refuse_stale(losses: Tensor, expected: Tensor) -> None:
    """Refuse a compiled loss that is no longer the loss: something that it read by closure has changed."""
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    if not torch.allclose(losses, expected, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise CapturedTensorError(
            "compile=True: the inner loss has changed since it was compiled: what it reads by closure, from a global "
            "or an attribute was frozen then. Pass it in *args (or batches)"
        )


_functions: weakref.WeakKeyDictionary[Any, dict[Hashable, TensorFunction | None]] = weakref.WeakKeyDictionary()
"""By loss (or the object whose method it is): a compiled function lives as long as what it was made from."""


def _compiled(
    dynamics: Dynamics, what: tuple[Any, ...], function: TensorFunction, arguments: Sequence[Tensor]
) -> TensorFunction | None:
    """``function``, compiled for these shapes the first time that it is asked for."""
    device = arguments[0].device.type
    shapes = tuple((x.shape, x.stride(), x.dtype, x.device) for x in arguments)
    autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    structures = dynamics.params_structure, dynamics.args_structure, dynamics.args_leaves
    loss = dynamics.loss
    key = (*what, getattr(loss, "__func__", None), shapes, dynamics.levels, structures, autocast)
    try:
        known = _functions.setdefault(_owner(loss), {})
        if key in known:
            return known[key]
    except TypeError as error:  # a loss that cannot be referred to weakly, an argument that cannot be hashed
        _warn(error)
        return None
    _warn_of_new_functions(dynamics.loss)
    try:
        place = arguments[0].device
        with warnings.catch_warnings(), randomness.replayed(randomness.snapshot(place), place):
            warnings.simplefilter("ignore")  # the compiler's own, of what it calls itself
            known[key] = _compile(function, arguments)
    except Exception as error:  # whatever the compiler stumbles over: the plain way is always there
        _warn(error)
        known[key] = None
    return known[key]


def _compile(function: TensorFunction, arguments: Sequence[Tensor]) -> TensorFunction:
    make_fx: Any = importlib.import_module("torch.fx.experimental.proxy_tensor").make_fx
    inductor: Any = importlib.import_module("torch._inductor")
    graph = make_fx(function)(*arguments)
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise NotImplementedError(f"the loss draws random numbers ({node.target})")
    with torch.no_grad():
        compiled: TensorFunction = inductor.compile(graph, list(arguments))
        return _checked(compiled, function, arguments)


def _checked(compiled: TensorFunction, function: TensorFunction, arguments: Sequence[Tensor]) -> TensorFunction:
    """The compiled function, once its answer has been seen to be that of the function itself."""
    for got, expected in zip(compiled(*arguments), function(*arguments), strict=True):
        tolerance = torch.finfo(expected.dtype).eps ** 0.5 * float(expected.abs().max())
        if not torch.allclose(got, expected, rtol=0.0, atol=tolerance, equal_nan=True):
            raise ArithmeticError(f"compiled, it is off by {float((got - expected).abs().max()):.1e}")
    return compiled


_compilations: Counter[Any] = Counter()
"""By the code of a loss: for how many functions that share it something has been compiled."""


def _owner(loss: Any) -> Any:
    """What lives as long as the loss: a method is made anew whenever it is asked for, its object is not."""
    return getattr(loss, "__self__", loss)


def _warn_of_new_functions(loss: Any) -> None:
    code = getattr(loss, "__code__", None)
    if code is not None and not _functions[_owner(loss)]:
        _compilations[code] += 1
        if _compilations[code] == 3:
            warnings.warn(
                f"compile=True: {loss.__qualname__} is a new function at every call and is compiled every time; define "
                "the loss once, outside, and pass it what it reads through its arguments",
                CompileWarning,
                stacklevel=2,
            )


def _warn(error: Exception) -> None:
    reason = " ".join(str(error).split())[:200]
    warnings.warn(
        f"compile=True has no effect: the inner gradient could not be compiled ({type(error).__name__}: {reason}); "
        "the solve runs without",
        CompileWarning,
        stacklevel=2,
    )
