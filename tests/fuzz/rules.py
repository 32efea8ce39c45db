"""The optimizers and the forms in which their hyperparameters are written, beside the plain loop's step of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import oracles
from fuzz import trees
from hypothesis import strategies as st
from torch import Tensor

import diffopt


def _adamw(p: Tensor, g: Tensor, b: dict[str, Tensor], t: int, **options: Any) -> Tensor:
    maximize = options.pop("maximize", False)
    return oracles.adam_step(p, -g if maximize else g, b, t, decoupled=True, **options)


def _climbing(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def either(p: Tensor, g: Tensor, b: dict[str, Tensor], t: int, maximize: bool = False, **options: Any) -> Tensor:
        return step(p, -g if maximize else g, b, t, **options)

    return either


def _centered(p: Tensor, g: Tensor, b: dict[str, Tensor], t: int, lr: Any, strength: Any, center: Any) -> Tensor:
    return p - lr * (g + strength * (p - center))


@dataclass(frozen=True)
class Kind:
    """An optimizer: its class, its plain step and buffers, numbers that may be learned, and switches."""

    make: Callable[..., diffopt.Optimizer]
    step: Callable[..., Tensor]
    numbers: dict[str, float]
    switches: tuple[dict[str, Any], ...] = ({},)
    buffers: Callable[..., dict[str, Tensor]] = lambda p, **options: {}


# A large eps: with the usual 1e-8 the first step is a sign step, whose derivative is round-off.
_ADAM = {"lr": 0.05, "beta1": 0.8, "beta2": 0.9, "eps": 0.1, "weight_decay": 0.03}
_UP = {"maximize": True}
KINDS: dict[str, Kind] = {
    "gd": Kind(diffopt.SGD, oracles.sgd_step, {"lr": 0.1}),
    "sgd": Kind(
        diffopt.SGD, oracles.sgd_step, {"lr": 0.07, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.04}, ({}, _UP)
    ),
    "nesterov": Kind(
        diffopt.SGD, oracles.sgd_step, {"lr": 0.06, "momentum": 0.7, "weight_decay": 0.02}, ({"nesterov": True},)
    ),
    "adam": Kind(diffopt.Adam, _climbing(oracles.adam_step), _ADAM, ({}, {"amsgrad": True}, _UP)),
    "adamw": Kind(diffopt.AdamW, _adamw, _ADAM, ({}, {"amsgrad": True}, _UP)),
    "rmsprop": Kind(
        diffopt.RMSprop,
        _climbing(oracles.rmsprop_step),
        {"lr": 0.02, "alpha": 0.8, "eps": 0.1, "weight_decay": 0.03, "momentum": 0.5},
        ({}, {"centered": True}, _UP),
    ),
    "adagrad": Kind(
        diffopt.Adagrad,
        _climbing(oracles.adagrad_step),
        {"lr": 0.1, "lr_decay": 0.2, "weight_decay": 0.03, "initial_accumulator_value": 0.3, "eps": 0.1},
        ({}, _UP),
        oracles.adagrad_buffers,
    ),
    "proximal": Kind(
        diffopt.ProximalGD, oracles.proximal_step, {"lr": 0.1, "strength": 0.4}, buffers=oracles.proximal_buffers
    ),
    "centered": Kind(diffopt.ProximalGD, _centered, {"lr": 0.1, "strength": 0.4, "center": 0.2}),
    "diagonal": Kind(diffopt.Preconditioned, oracles.preconditioned_step, {"lr": 0.1, "diagonal": 0.7}),
}
BUFFERS = {"velocity": "v", "mean": "m", "square": "s", "largest_square": "top", "center": "c"}
"""The library's names of buffers, and those of the plain steps."""

FORMS = ("float", "scalar", "tree", "scalars", "floats", "schedule", "schedule_floats", "schedule_tree")
"""A number; a tensor of one number; a tensor, a tensor of one number or a float for each leaf; and schedules."""


@dataclass(frozen=True)
class Rule:
    """An optimizer with the form of each of its numbers."""

    kind: str
    forms: tuple[tuple[str, str], ...]
    switches: tuple[tuple[str, Any], ...] = ()

    @property
    def of(self) -> Kind:
        return KINDS[self.kind]

    def shapes(self, leaves: list[tuple[int, ...]], steps: int) -> dict[str, tuple[int, ...]]:
        """The tensors that the forms need, by name."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, form in self.forms:
            if form == "scalar":
                shapes[f"{name}"] = ()
            elif form == "schedule":
                shapes[f"{name}"] = (steps,)
            elif form in ("tree", "scalars", "schedule_tree"):
                lead = (steps,) if form == "schedule_tree" else ()
                shapes |= {f"{name}/{i}": (*lead, *(() if form == "scalars" else s)) for i, s in enumerate(leaves)}
        return shapes

    def optimizer(self, held: dict[str, Tensor], skeleton: Any, count: int, steps: int) -> diffopt.Optimizer:
        """The library's optimizer."""
        options: dict[str, Any] = dict(self.switches)
        for name, form in self.forms:
            number = self.of.numbers[name]
            per_leaf = [held.get(f"{name}/{i}", number) for i in range(count)]
            options[name] = {
                "float": lambda number=number: number,
                "scalar": lambda name=name: held[name],
                "schedule": lambda name=name: diffopt.Schedule(held[name]),
                "schedule_floats": lambda number=number: diffopt.Schedule(_lowered(number, steps)),
                "schedule_tree": lambda per_leaf=per_leaf: diffopt.Schedule(trees.fill(skeleton, per_leaf)),
            }.get(form, lambda per_leaf=per_leaf: trees.fill(skeleton, per_leaf))()
        if "beta1" in options:
            options["betas"] = (options.pop("beta1"), options.pop("beta2"))
        return self.of.make(**options)

    def options(self, held: dict[str, Tensor], leaf: int, step: int, steps: int) -> dict[str, Any]:
        """The numbers of the plain step ``step`` (from 1) at a leaf."""
        options: dict[str, Any] = dict(self.switches)
        for name, form in self.forms:
            number: Any = self.of.numbers[name]
            if form in ("scalar", "schedule"):
                number = held[name]
            elif form in ("tree", "scalars", "schedule_tree"):
                number = held[f"{name}/{leaf}"]
            elif form == "schedule_floats":
                number = _lowered(number, steps)
            options[name] = number[step - 1] if form.startswith("schedule") else number
        if "beta1" in options:
            options["betas"] = (options.pop("beta1"), options.pop("beta2"))
        return options


def _lowered(number: float, steps: int) -> list[float]:
    return [number / (1 + 0.1 * t) for t in range(steps)]


@st.composite
def rules(draw: st.DrawFn, kinds: tuple[str, ...] = tuple(KINDS)) -> Rule:
    """An optimizer, its numbers in forms of all sorts."""
    kind = draw(st.sampled_from(kinds))
    forms = []
    for name in KINDS[kind].numbers:
        allowed = [form for form in FORMS if name != "center" or form in ("tree",)]
        simple = draw(st.booleans()) and name != "center"
        forms.append((name, draw(st.sampled_from(("float", "scalar") if simple else allowed))))
    return Rule(kind, tuple(forms), tuple(draw(st.sampled_from(KINDS[kind].switches)).items()))
