"""Steps and their pullbacks as compiled functions, for losses so small that overhead is all they cost."""

from __future__ import annotations

import importlib
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields
from functools import partial
from types import MethodType
from typing import Any, NamedTuple, TypeAlias, final

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from diffopt.errors import CapturedTensorError, CompileWarning
from diffopt.optimizers.base import Bindable, Schedule
from diffopt.rollout import compiler_paths
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.field import as_written
from diffopt.rollout.inputs import Inputs, Place
from diffopt.rollout.step_graph import Block, Plain
from diffopt.tensors import agreement, derivatives, random_state, tree
from diffopt.tensors.leaves import Leaves

TensorFunction: TypeAlias = Callable[..., tuple[Tensor, ...]]


class Done(NamedTuple):
    """What one step gives: the losses, the gradients of the params, and the state after it."""

    losses: Tensor
    grads: Leaves
    after: Leaves


@final
class Steps:
    """The steps of one rollout, each one call of a compiled function."""

    def __init__(self, dynamics: Dynamics, inputs: Inputs) -> None:
        """Compile nothing yet: shapes are known once there is a state."""
        self._dynamics, self._inputs = dynamics, inputs
        self._function = _Lookup(dynamics, ("step",), self._evaluate)

    def take(self, ground: Block | Plain, step: int) -> Done | None:
        """Step ``step`` from where ``ground`` stands.

        ``None`` if it is to be taken with its graph, or cannot be compiled, of which a warning says why.
        """
        if ground.linked:
            return None
        read, hyperparameters = self._dynamics.layout.at_step(self._inputs, step)
        done = self._function(step, *ground.state, *read, *hyperparameters)
        if done is None:
            return None
        split = 1 + self._dynamics.layout.params_count
        return Done(done[0], Leaves(done[1:split]), Leaves(done[split:]))

    def _evaluate(self, updates: int, first: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        dynamics, now = self._dynamics, self._dynamics.layout.inputs(tensors, of_step=True)
        with torch.enable_grad():
            roots = [x.detach().requires_grad_() for x in now.params]
            losses = dynamics.losses(roots, now.read)
            grads = derivatives.or_zeros(derivatives.gradient(losses, roots, differentiable=False), roots)
        after = dynamics.updates(now.state, grads, now.hyperparameters, first, updates)
        return (losses.detach(), *grads, *after)


@final
class Pullbacks:
    """The pullbacks ``J_t' x`` and ``B_t' x`` of steps, each one call of a compiled function."""

    def __init__(self, dynamics: Dynamics, inputs: Inputs, wanted: Sequence[Place]) -> None:
        """``wanted`` are the inputs besides the state whose direct term is asked for."""
        self._dynamics, self._inputs, self._wanted = dynamics, inputs, tuple(wanted)
        self._function = _Lookup(dynamics, ("pullback", *wanted), self._evaluate)

    def pull(self, state: Leaves, step: int, adjoint: Leaves) -> tuple[Leaves, dict[Place, Tensor], Tensor] | None:
        """The adjoint of ``state`` and the direct terms by place, given the adjoint of the state after step ``step``.

        And the losses, by which a batch shows that is not the one of the rollout.

        ``None`` as for :meth:`Steps.take`.
        """
        read, hyperparameters = self._dynamics.layout.at_step(self._inputs, step)
        done = self._function(step, *state, *read, *hyperparameters, *adjoint)
        if done is None:
            return None
        direct = dict(zip(self._wanted, done[len(state) : -1], strict=True))
        return Leaves(done[: len(state)]), direct, done[-1]

    def _evaluate(self, updates: int, first: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        dynamics, layout = self._dynamics, self._dynamics.layout
        adjoint = tensors[len(tensors) - layout.state_count :]
        now = layout.inputs(tensors[: len(tensors) - layout.state_count], of_step=True)
        with torch.enable_grad():
            now = now.put({place: now.at(place).detach().requires_grad_() for place in self._wanted})
            roots = [x.detach().requires_grad_() for x in now.state]
            params = layout.params(roots)
            losses = dynamics.losses(params, now.read)
            found = derivatives.gradient(losses.sum(), params, differentiable=True)
            after = dynamics.updates(roots, derivatives.filled(found, params), now.hyperparameters, first, updates)
            sources = [*roots, *map(now.at, self._wanted)]
            terms = derivatives.or_zeros(derivatives.pullback(after, sources, adjoint), sources)
            return (*terms, losses.detach())


def refuse_stale(losses: Tensor, expected: Tensor) -> None:
    """Refuse a compiled loss that is no longer the loss: something that it read by closure has changed."""
    tolerance = agreement.tolerance(expected)
    if not torch.allclose(losses, expected, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise CapturedTensorError(
            "compile=True: the inner loss has changed since it was compiled",
            "the same loss: what it reads by closure, from a global or an attribute was frozen then",
            "pass it in *args (or batches)",
        )


_functions: Any = WeakIdKeyDictionary()
"""By loss (each its own) or the object whose method it is: a compiled function lives as long as that."""


class _Lookup:
    """A function of a step's number and tensors, compiled for these shapes the first time that any rollout calls it.

    ``function`` takes first how many updates the step makes (the last window may be short), for each of which it is
    compiled.
    """

    def __init__(self, dynamics: Dynamics, what: tuple[Any, ...], function: TensorFunction) -> None:
        self._dynamics, self._what, self._function = dynamics, what, function
        self._found: dict[Hashable, TensorFunction | None] = {}

    def __call__(self, number: int, *tensors: Tensor) -> tuple[Tensor, ...] | None:
        if any(x.layout != torch.strided for x in tensors):
            warn(_LayoutError("a tensor that the loss is given is sparse"))
            return None
        # A tensor, so that one function serves all steps; an update that looks at it as a number cannot be compiled.
        # Each an object of its own, for tracing tells arguments apart by object (two leaves may start at one tensor).
        first = torch.tensor(float(self._dynamics.layout.first_update(number)), dtype=torch.float64)
        arguments = [first, *(x.contiguous().view_as(x) for x in tensors)]
        updates: int = self._dynamics.layout.length(number)
        kind: Hashable = updates  # apart from that, the shapes of all steps of a rollout are the same
        if self._dynamics.layout.stream is not None:
            kind = updates, tuple([x.shape for x in arguments]), tuple([x.dtype for x in arguments])
        if kind not in self._found:
            # the window too: of one update hyperparameters that are scheduled come without their axis
            what, function = (*self._what, self._dynamics.layout.window, updates), partial(self._function, updates)
            self._found[kind] = _compiled(self._dynamics, what, function, arguments)
        found = self._found[kind]
        return None if found is None else found(*arguments)


def _compiled(
    dynamics: Dynamics, what: tuple[Any, ...], function: TensorFunction, arguments: Sequence[Tensor]
) -> TensorFunction | None:
    try:
        key = kind_of(dynamics, what, arguments)
        known: dict[Hashable, TensorFunction | None] = _functions.setdefault(owner(dynamics.loss), {})
        if key in known:
            return known[key]
    except TypeError as error:  # a loss that cannot be referred to weakly, an argument that cannot be hashed
        warn(error)
        return None
    _warn_of_new_functions(dynamics.loss)
    try:
        with warnings.catch_warnings(), random_state.preserved(arguments[-1].device):
            warnings.simplefilter("ignore")  # the compiler's own, of what it calls itself
            known[key] = _compile(function, arguments)
    except Exception as error:  # whatever the compiler stumbles over: the plain way is always there
        warn(error)
        known[key] = None
    return known[key]


def kind_of(dynamics: Dynamics, what: tuple[Hashable, ...], arguments: Sequence[Tensor]) -> tuple[Hashable, ...]:
    """What a function of these tensors, a part of one solve by a loss, is compiled for.

    Raises:
        TypeError: something cannot be hashed.
    """
    place = arguments[-1].device
    shapes = tuple([(x.shape, x.dtype, x.device) for x in arguments])
    autocast = torch.is_autocast_enabled(place.type), torch.get_autocast_dtype(place.type)
    layout, loss = dynamics.layout, dynamics.loss
    structures = layout.params_structure, layout.args_structure, _typed(layout.args_leaves)
    optimizer = _without_tensors(dynamics.optimizer.template), dynamics.optimizer.placed
    kind: tuple[Hashable, ...] = type(loss), getattr(as_written(loss), "__func__", None)  # type: ignore[assignment]
    return (*what, *kind, shapes, layout.levels, structures, autocast, optimizer)


def _without_tensors(optimizer: Any) -> Hashable:
    """What tells two optimizers apart besides their tensors, which the compiled functions are given."""
    parts: list[Any] = [type(optimizer)]
    for field in fields(optimizer):
        if field.metadata.get("hyperparameter") == "placing":  # a function, of which only the outcome matters
            continue
        value = getattr(optimizer, field.name)
        scheduled = isinstance(value, Schedule)
        leaves, structure = tree.flatten(value.values if scheduled else value)
        order = tuple(value) if isinstance(value, dict) else ()  # in which its tensors are taken
        parts.append((scheduled, structure, order, _typed(leaves)))
    return tuple(parts)


def _typed(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """What is not a tensor, with its type (``True`` equals 1), in a form that can be compared."""
    return tuple(map(_kind, leaves))


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Bindable | Schedule):
        return _without_tensors(leaf)
    if isinstance(leaf, float | complex):  # (by what is printed: 0.0 equals -0.0, and NaN not itself)
        return type(leaf), repr(leaf)
    return Tensor if isinstance(leaf, Tensor) else (type(leaf), leaf)


class _LayoutError(Exception):
    """The compiler takes dense tensors only."""


class _RandomLossError(Exception):
    """A compiled function draws other random numbers than the loss itself, so none is made."""


def _compile(function: TensorFunction, arguments: Sequence[Tensor]) -> TensorFunction:
    make_fx: Any = importlib.import_module("torch.fx.experimental.proxy_tensor").make_fx
    inductor: Any = importlib.import_module("torch._inductor")
    graph = make_fx(function)(*arguments)
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise _RandomLossError(f"the loss draws random numbers ({node.target})")
    with torch.no_grad():
        compiled: TensorFunction = inductor.compile(graph, list(arguments))
        return _checked(compiled, function, arguments)


def _checked(compiled: TensorFunction, function: TensorFunction, arguments: Sequence[Tensor]) -> TensorFunction:
    """The compiled function, once its answer has been seen to be that of the function itself.

    The arguments are others than those it was traced with: what it took for equal, or for zero, is so no longer.
    """
    others = [agreement.moved(x, i) for i, x in enumerate(arguments)]
    for got, expected in zip(compiled(*others), function(*others), strict=True):
        off = agreement.difference(got, expected)
        if off:
            raise ArithmeticError(f"compiled, it is off by {off:.1e}")
    return compiled


_compilations: Counter[Any] = Counter()
"""By the code of a loss: for how many functions that share it something has been compiled."""


def owner(loss: Any) -> Any:
    """What lives as long as the loss: a method is made anew whenever it is asked for, its object is not."""
    loss = as_written(loss)  # of a field as well, which may be made anew around it at every call
    return loss.__self__ if isinstance(loss, MethodType) else loss


def _warn_of_new_functions(loss: Any) -> None:
    loss = as_written(loss)
    code = getattr(loss, "__code__", None)
    if code is not None and not _functions[owner(loss)]:
        _compilations[code] += 1
        if _compilations[code] == 3:
            warnings.warn(
                f"compile=True: {loss.__qualname__} is a new function at every call and is compiled every time; define "
                "the loss once, outside, and pass it what it reads through its arguments",
                CompileWarning,
                stacklevel=2,
            )


def warn(error: Exception) -> None:
    """Say why something was not compiled."""
    reason = compiler_paths.explanation(error)
    if reason is None:
        # of a failed command, what it said: the command itself is a page long
        said = " ".join(str(error).rpartition("Output:")[2].split())[:200]
        reason = f"a step could not be compiled ({type(error).__name__}: {said})"
    warnings.warn(
        f"compile=True has no effect: {reason}; the solve runs without",
        CompileWarning,
        stacklevel=2,
    )
