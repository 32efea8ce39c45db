"""The rule behind ``from_torch``: one step of a stateful optimizer class, on state that is handed in and out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from diffopt.errors import HyperparameterError, LiftError
from diffopt.lifting import buffers as kept_buffers
from diffopt.lifting import verification
from diffopt.lifting.buffers import Layout, Store
from diffopt.lifting.cells import AsPureFunction, cell, learned_cell
from diffopt.lifting.options import Options
from diffopt.optimizers.base import EACH, TREE, Buffers, Optimizer
from diffopt.tensors.leaves import Leaves


@final
@dataclass(frozen=True)
class TorchClass:
    """An optimizer class with its options."""

    kind: type[torch.optim.Optimizer]
    options: Options

    @property
    def name(self) -> str:
        """For messages."""
        return self.kind.__name__

    @property
    def advice(self) -> str:
        """What to use instead."""
        native = {"SGD", "Adam", "AdamW", "RMSprop", "Adagrad"} & {self.name}
        return "".join(f"use diffopt.{name}, or " for name in native) + "write the rule as a diffopt.Optimizer"

    def parts(self, count: int) -> list[list[int]]:
        """The leaves that share an instance of the class."""
        alone = any(option.per_leaf for option in self.options.learned().values())
        return [[i] for i in range(count)] if alone else [list(range(count))]

    def make(self, params: Sequence[Tensor], values: dict[str, Any]) -> torch.optim.Optimizer:
        """An instance."""
        return self.kind(list(params), **self.options.at(values))

    def run(self, starts: list[Tensor], gradients: verification.Gradients, values: dict[str, Any]) -> list[Tensor]:
        """The parameters after :data:`lift_check.STEPS` steps of the class itself."""
        return self.observe(starts, gradients, verification.STEPS, values)[0]

    def observe(
        self, starts: list[Tensor], gradients: verification.Gradients, steps: int, values: dict[str, Any]
    ) -> tuple[list[Tensor], list[list[Store]]]:
        """The parameters after some steps of the class itself, and glimpses of its stores after each step."""
        params = [torch.nn.Parameter(p.clone()) for p in starts]
        parts = [[params[i] for i in part] for part in self.parts(len(params))]
        try:
            instances = [self.make(part, values) for part in parts]
        except Exception as error:
            raise HyperparameterError(f"{self.name}: {str(error)[:200]}", "options that it takes") from error
        attributes = list(map(_attributes, instances))
        seen = []
        for step in range(1, steps + 1):
            with torch.no_grad():
                for p, g in zip(params, gradients(params, step), strict=True):
                    p.grad = g.clone()
            for instance in instances:
                instance.step()
            stores = [s for instance, part in zip(instances, parts, strict=True) for s in _stores(instance, part)]
            seen.append([kept_buffers.glimpse({k: None if k == "params" else v for k, v in s.items()}) for s in stores])
        if sum(len(instance.state) for instance in instances) > len(params):
            raise LiftError("it keeps state that belongs to no parameter", "state of each parameter")
        for before, after in zip(attributes, map(_attributes, instances), strict=True):
            changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
            if changed:
                raise LiftError(f"its attribute {changed[0]!r} changes from step to step", "changes of its state only")
        return [p.detach() for p in params], seen


def _stores(instance: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[Store]:
    """Where an instance remembers things: its state for each parameter, then its param groups."""
    return [*(instance.state[p] for p in params), *instance.param_groups]


def _attributes(instance: torch.optim.Optimizer) -> kept_buffers.Store:
    """What else an instance could remember by, as it looks now."""
    return {name: repr(value) for name, value in vars(instance).items() if name not in ("state", "param_groups")}


@final
@dataclass(frozen=True, eq=False, repr=False)
class LiftedClass(Optimizer):
    """One step of a ``torch.optim.Optimizer`` class as a pure function; made by :func:`diffopt.from_torch`.

    Every update makes a new instance of the class, gives it the buffers as its state and runs its ``step``: nothing is
    remembered anywhere else. The first update gives it no state, so that it makes its own.
    """

    original: TorchClass = field(metadata=TREE)
    learned: dict[str, Any] = field(metadata=EACH)

    def __repr__(self) -> str:
        """As it was made."""
        return f"from_torch({self.original.name}{self.original.options.shown(self.learned)})"

    def init(self, params: Leaves) -> Buffers:
        """Zeros, at which the first update does not look."""
        with verification.named(self.original.name, self.original.advice):
            return kept_buffers.empty(_layout(self.original, verification.form(params)), params[0].device)

    def update(self, params: Leaves, grads: Leaves, buffers: Buffers, step: int) -> tuple[Leaves, Buffers]:
        """One step."""
        with verification.named(self.original.name, self.original.advice):
            layout = _layout(self.original, verification.form(params))
            return _updated(self.original, self.learned, layout, params, grads, buffers, step)


def _updated(
    original: TorchClass,
    learned: dict[str, Any],
    layout: Layout,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Buffers,
    step: int,
) -> tuple[Leaves, Buffers]:
    cells = [cell(p) for p in params]
    for made, grad in zip(cells, grads, strict=True):
        made.grad = cell(grad)
    waiting = {name: iter(buffer) for name, buffer in buffers.items()}
    stores: list[Store] = []
    for part in original.parts(len(cells)):
        own = [cells[i] for i in part]
        values = {name: learned_cell(x, part[0]) for name, x in learned.items()}
        with AsPureFunction():
            instance = original.make(own, values)
        memories = layout[len(stores) :][: len(own) + len(instance.param_groups)]
        if step > 1:
            for store, kept in zip(_stores(instance, own), memories, strict=True):
                kept_buffers.restore(store, kept, waiting, step)
        before = [dict(vars(instance)), *map(dict, instance.param_groups)]
        with AsPureFunction():
            inspect.unwrap(original.kind.step)(instance)
        _refuse_late_changes(before, [vars(instance), *instance.param_groups], [(), *memories[len(own) :]])
        stores += [dict(instance.state[p]) for p in own]
        stores += [
            {m.key: g[m.key] for m in kept} for g, kept in zip(instance.param_groups, memories[len(own) :], strict=True)
        ]
    return Leaves(made.value for made in cells), kept_buffers.collected(stores, layout, step, params[0].device)


def _refuse_late_changes(
    before: list[Store], after: list[Store], layout: Sequence[Sequence[kept_buffers.Memory]]
) -> None:
    """Refuse a step that changed an attribute or an entry of a param group which earlier steps left alone."""
    for old, new, kept in zip(before, after, layout, strict=True):
        known = {memory.key for memory in kept}
        changed = [key for key in {**old, **new} if key not in known and old.get(key) is not new.get(key)]
        if changed:
            raise LiftError(f"it changes {changed[0]!r} only some steps after its first", "the same at every step")


@functools.lru_cache(maxsize=256)
def _layout(original: TorchClass, form: verification.Form) -> Layout:
    """What the class remembers for params of these shapes, after a comparison of some steps."""
    return verification.guarded(_examined, original, form)


def _examined(original: TorchClass, form: verification.Form) -> Layout:
    starts, *grads = verification.random_tensors(form, 4)
    samples = original.options.samples()
    expected, seen = original.observe(starts, lambda _, step: grads[step - 1], len(grads), samples)
    layout = tuple(map(_remembered, zip(*seen, strict=True)))
    now, buffers = Leaves(starts), kept_buffers.empty(layout, torch.device("cpu"))
    with torch.no_grad():
        for step, current in enumerate(grads, 1):
            now, buffers = _updated(original, samples, layout, now, current, buffers, step)
    verification.compare_values(now, expected, len(grads), bool(samples))
    return layout


def _remembered(seen: Sequence[Store]) -> tuple[kept_buffers.Memory, ...]:
    in_group = "params" in seen[0]
    return kept_buffers.memories(seen, "group " if in_group else "", constants=not in_group)
