"""``from_torchopt``: a pair of functions ``(init, update)``, as TorchOpt writes optimizers, as an update rule."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from diffopt.errors import HyperparameterError, OptimizerError
from diffopt.lifting import buffers as kept_buffers
from diffopt.lifting import verification
from diffopt.lifting.buffers import Store
from diffopt.lifting.cells import AsPureFunction, cell, learned_cell
from diffopt.lifting.options import Options, defaults_of, taken_apart
from diffopt.optimizers.base import EACH, TREE, Buffers, Optimizer
from diffopt.tensors import tree
from diffopt.tensors.leaves import Leaves


def from_torchopt(transformation: Any, /, **options: Any) -> Optimizer:
    """Lift a pair of functions ``(init, update)``, such as a TorchOpt optimizer, into an update rule.

    ``init(params)`` returns a state and ``update(grads, state, params=params)`` returns ``(updates, state)``, to be
    added to ``params``; trees, of which ``params`` is a tuple of its leaves here. Give a function that makes the pair,
    and its options, to learn these: ``from_torchopt(torchopt.adam, lr=lr)``, where a scalar tensor or a
    :class:`diffopt.Schedule` is a hyperparameter. A tensor captured in a ready pair cannot be learned, and is refused
    where it requires grad.

    Checked as :func:`diffopt.from_torch` checks a class, once for each pair; so make a pair once, not in every step of
    an outer loop. TorchOpt itself is not needed here.

    Cost: a hypergradient takes 1.2 to 2.5 times as long as by a native rule (``python -m benchmarks.lifted``).

    Args:
        transformation: the pair, or a function that makes it from ``options``.
        options: only with a function.

    Raises:
        LiftError: the pair cannot be lifted, or came out different.
        HyperparameterError: an option is refused by the function, or differs from leaf to leaf.
        OptimizerError: neither a pair nor a function.

    Example:
        >>> import torch, diffopt
        >>> def descent(lr):
        ...     def update(grads, state, params=None):
        ...         return tuple(-lr * g for g in grads), state
        ...     return (lambda params: ()), update
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> optimizer = diffopt.from_torchopt(descent, lr=lr)
        >>> solution = diffopt.solve(lambda w: w**2, torch.tensor(1.0), optimizer=optimizer, steps=1)
        >>> torch.autograd.grad(solution.params, lr)
        (tensor(-2.),)
    """
    ready = _is_pair(transformation)
    makes = callable(transformation) and isinstance(transformation, Hashable)
    if not (ready or makes) or (ready and options):
        raise OptimizerError(
            f"from_torchopt got {tree.describe(transformation)}{' and options' if options else ''}",
            "a pair (init, update), or a function that makes one and its options",
        )
    taken, learned = taken_apart(options, {} if ready else defaults_of(transformation))
    for name, option in taken.learned().items():
        if option.per_leaf:
            raise HyperparameterError(
                f"{name} is {tree.describe(learned[name])}", "a number, a scalar tensor or a Schedule of them"
            )
    original = Pair(transformation, taken)
    _check(original)
    return LiftedPair(original, learned)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(callable, value))


@final
@dataclass(frozen=True)
class Pair:
    """A pair of functions, or the function that makes it with its options."""

    source: Any
    options: Options

    @property
    def name(self) -> str:
        """For messages."""
        return "the pair" if isinstance(self.source, tuple) else getattr(self.source, "__name__", "the function")

    advice = "write the rule as a diffopt.Optimizer; to clip gradients, put diffopt.Clip around the rest"

    def made(self, values: dict[str, Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """``init`` and ``update`` with these learned options."""
        try:
            pair = self.source if isinstance(self.source, tuple) else self.source(**self.options.at(values))
        except (TypeError, ValueError) as error:
            raise HyperparameterError(f"{self.name}: {str(error)[:200]}", "options that it takes") from error
        if not _is_pair(pair):
            raise OptimizerError(f"{self.name} returned {tree.describe(pair)}", "a pair (init, update)")
        init, update = pair
        names = inspect.signature(update).parameters
        options = {"inplace": False} if "inplace" in names else {}
        return init, functools.partial(update, **options)

    def observe(
        self, starts: Sequence[Tensor], gradients: verification.Gradients, steps: int, values: dict[str, Any]
    ) -> tuple[list[Tensor], list[Store]]:
        """The parameters after some steps of the pair itself, and glimpses of the state's leaves after each step."""
        init, update = self.made(values)
        params, seen = tuple(p.clone() for p in starts), []
        with torch.no_grad():
            state = init(params)
            for step in range(1, steps + 1):
                updates, state = update(tuple(gradients(params, step)), state, params=params)
                params = tuple(p + u for p, u in zip(params, updates, strict=True))
                seen.append(kept_buffers.glimpse(_store(state)))
        return list(params), seen

    def run(self, starts: list[Tensor], gradients: verification.Gradients, values: dict[str, Any]) -> list[Tensor]:
        """The parameters after :data:`lift_check.STEPS` steps of the pair itself."""
        return self.observe(starts, gradients, verification.STEPS, values)[0]


def _store(state: Any) -> Store:
    """The leaves of a state by their paths."""
    leaves, structure = tree.flatten(state)
    return dict(zip(tree.paths(structure), leaves, strict=True))


@final
@dataclass(frozen=True, eq=False, repr=False)
class LiftedPair(Optimizer):
    """One step of a pair ``(init, update)``; made by :func:`diffopt.from_torchopt`."""

    original: Pair = field(metadata=TREE)
    learned: dict[str, Any] = field(metadata=EACH)

    def __repr__(self) -> str:
        """As it was made."""
        return f"from_torchopt({self.original.name}{self.original.options.shown(self.learned)})"

    def init(self, params: Leaves) -> Buffers:
        """Zeros, at which the first update does not look."""
        with verification.named(self.original.name, self.original.advice):
            return kept_buffers.empty((_layout(self.original, verification.form(params)),), params[0].device)

    def update(self, params: Leaves, grads: Leaves, buffers: Buffers, step: int) -> tuple[Leaves, Buffers]:
        """One step."""
        with verification.named(self.original.name, self.original.advice):
            layout = _layout(self.original, verification.form(params))
            return _updated(self.original, self.learned, layout, params, grads, buffers, step)


def _updated(
    original: Pair,
    learned: dict[str, Any],
    layout: tuple[kept_buffers.Memory, ...],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Buffers,
    step: int,
) -> tuple[Leaves, Buffers]:
    cells = tuple(cell(p) for p in params)
    values = {name: learned_cell(x, 0) for name, x in learned.items()}
    with AsPureFunction():
        init, update = original.made(values)
        leaves, structure = tree.flatten(init(cells))
        if step > 1 and not isinstance(original.source, tuple):
            # TorchOpt's momentum keeps to itself whether it was called before, and takes its first step if not.
            one = (cells[0].new_zeros(1),)
            update(one, init(one), params=one)
    if step > 1:
        store = dict(zip(tree.paths(structure), leaves, strict=True))
        kept_buffers.restore(store, layout, {name: iter(buffer) for name, buffer in buffers.items()}, step)
        leaves = list(store.values())
    with AsPureFunction():
        updates, state = update(tuple(map(cell, grads)), tree.unflatten(structure, leaves), params=cells)
        moved = [p + u for p, u in zip(cells, updates, strict=True)]
    return Leaves(p.value for p in moved), kept_buffers.collected([_store(state)], (layout,), step, params[0].device)


@functools.lru_cache(maxsize=64)
def _layout(original: Pair, form: verification.Form) -> tuple[kept_buffers.Memory, ...]:
    """What the state holds for params of these shapes, after a comparison of some steps."""
    return verification.guarded(_examined, original, form)


def _examined(original: Pair, form: verification.Form) -> tuple[kept_buffers.Memory, ...]:
    starts, *grads = verification.random_tensors(form, 4)
    samples = original.options.samples()
    expected, seen = original.observe(starts, lambda _, step: grads[step - 1], len(grads), samples)
    layout = kept_buffers.memories(seen)
    now, buffers = Leaves(starts), kept_buffers.empty((layout,), torch.device("cpu"))
    with torch.no_grad():
        for step, current in enumerate(grads, 1):
            now, buffers = _updated(original, samples, layout, now, current, buffers, step)
    verification.compare_values(now, expected, len(grads), bool(samples))
    return layout


@functools.lru_cache(maxsize=64)
def _check(original: Pair) -> None:
    """Compare the rule with its pair, once for each."""
    made = functools.partial(LiftedPair, original)
    verification.check(
        verification.Lift(original.name, original.advice, original.run, made, original.options.samples())
    )
