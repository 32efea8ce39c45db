"""What an optimizer holds: itself and, at any depth, the optimizers in its fields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass

from diffopt.optimizers.base import Optimizer
from diffopt.tensors import tree


def held(optimizer: Optimizer) -> Iterator[Optimizer]:
    """The optimizer, and all that it holds."""
    yield optimizer
    if is_dataclass(optimizer):
        for field in fields(optimizer):
            if field.metadata.get("hyperparameter") not in ("option", "placing"):
                for value in tree.flatten(getattr(optimizer, field.name))[0]:
                    if isinstance(value, Optimizer):
                        yield from held(value)
