"""Things that no argument should be, each made anew, and a call to give them to."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from bad_row import square
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import vmap

import diffopt
from diffopt import SGD


class NoRepr:
    """Cannot be shown."""

    def __repr__(self) -> str:
        raise ZeroDivisionError


class NoAnswers:
    """Compares with nothing and has no truth."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no ==")

    def __bool__(self) -> bool:
        raise RuntimeError("no bool")


def deep() -> list[Any]:
    held: list[Any] = []
    for _ in range(5000):
        held = [held]
    return held


def itself() -> list[Any]:
    held: list[Any] = []
    held.append(held)
    return held


def nested(layout: torch.layout = torch.strided) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a prototype
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


def escaped(*shape: int) -> Tensor:
    """A tensor of a vmap that has ended."""
    held: list[Tensor] = []
    vmap(lambda x: (held.append(x), x)[1])(torch.ones(2, *(shape or (2,))))
    return held[0]


def fake(*shape: int) -> Tensor:
    with FakeTensorMode():
        return torch.ones(*(shape or (2,)))


OBJECTS: dict[str, Callable[[], Any]] = {
    "no_repr": NoRepr,
    "no_answers": NoAnswers,
    "deep": deep,
    "itself": itself,
    "beyond_all_floats": lambda: 10**400,
    "beyond_all_digits": lambda: -(10**5000),
    "array": lambda: np.ones(2),
    "array_of_objects": lambda: np.array([None, "x"], dtype=object),
    "nested": nested,
    "escaped": escaped,
    "complex": lambda: 1j,
}


def solve(loss: Any = square, params: Any = None, *args: Any, **options: Any) -> Any:
    """The final parameters of a call in which what is not given is right."""
    start = torch.ones(2) if params is None else params
    return diffopt.solve(loss, start, *args, **{"optimizer": SGD(0.1), "steps": 3, **options}).params
