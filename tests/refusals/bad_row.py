"""What the tables of bad inputs are written with: a decorator, and calls in which everything not given is right."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import diffopt
from diffopt import SGD, DiffoptError

STEPS = 3
MOST = 300


@dataclass(frozen=True)
class Row:
    """One bad input.

    ``says`` is what the message must match; ``path`` the place, in a tree or among the arguments, that it must name;
    ``moves`` whether the call draws from torch's generator, as a plain loop would.
    """

    family: str
    call: Callable[[], Any]
    error: type[Exception]
    says: str
    path: str = ""
    moves: bool = False

    def check(self) -> DiffoptError:
        """It is refused as it says, by a message that can be read."""
        with pytest.raises(self.error) as caught:
            self.call()
        message = str(caught.value)
        assert type(caught.value) is self.error
        assert re.search(self.says, message, re.DOTALL), message
        assert self.path in message
        assert len(message) < MOST
        assert isinstance(caught.value, DiffoptError)
        return caught.value


class Refused:
    """A table of bad inputs, filled by its decorator: that function is refused, called with these arguments.

    ::

        @refused(diffopt.HyperparameterError, "check is str 'no', expected True or False", check="no")
        @refused(diffopt.EstimatorError, "call it: estimator=Reverse", estimator=Reverse)
        def solve_with(**options): ...
    """

    def __init__(self, family: str) -> None:
        self.family = family
        self.rows: dict[str, Row] = {}

    def __call__(
        self,
        error: type[Exception],
        says: str,
        *args: Any,
        path: str = "",
        moves: bool = False,
        name: str = "",
        **kwargs: Any,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            told = name or function.__name__ + described(args, kwargs)
            self.add(told, partial(function, *args, **kwargs), error, says, path, moves)
            return function

        return add

    def add(self, name: str, call: Callable[[], Any], *expected: Any) -> None:
        """Add a row; of several with one name, the later ones are numbered."""
        alike = sum(known.partition("#")[0] == name for known in self.rows)
        self.rows[f"{name}#{alike + 1}" if alike else name] = Row(self.family, call, *expected)


def described(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Arguments in the name of a row: short, and the same in every run."""
    parts = [*map(_shown, args), *(f"{key}={_shown(value)}" for key, value in kwargs.items())]
    return f"({', '.join(parts)})" if parts else ""


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)}"
    name = getattr(value, "__name__", "") or re.sub(r" at 0x\w+|tensor\(.*?\)", "", repr(value))
    return textwrap.shorten(name[:1000], 30)  # (which is slow where a list of thousands is shown)


def tensor(*values: float, **options: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, **options)


def elsewhere(*shape: int) -> Tensor:
    """A tensor on another device."""
    return torch.zeros(shape, dtype=torch.float64, device="meta")


def square(w: Tensor, *args: Any) -> Tensor:
    return w.square().sum()


def product(w: Tensor, x: Tensor) -> Tensor:
    return (w * x).sum()


def both(p: dict[str, Tensor], *args: Any) -> Tensor:
    return p["a"].square().sum() + p["b"].square().sum()


def pair() -> dict[str, Tensor]:
    return {"a": tensor(1.0), "b": torch.ones(2, 3, dtype=torch.float64)}


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a tree, as far as it is one."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [x for held in value.values() for x in tensors_of(held)]
    if isinstance(value, list | tuple):
        return [x for held in value for x in tensors_of(held)]
    return tensors_of(vars(value)) if isinstance(value, diffopt.Optimizer | diffopt.Schedule) else []


def solve(loss: Any = square, params: Any = None, *args: Any, **options: Any) -> Any:
    """The final parameters; whatever becomes of the call, the tensors that it was given stay as they were."""
    options = {"optimizer": SGD(0.1), "steps": STEPS, **options}
    params = tensor(1, 2) if params is None else params
    given = [x for x in tensors_of([params, args, options]) if x.device.type == "cpu" and x.layout == torch.strided]
    given = [x for x in given if not (torch._C._functorch.is_functorch_wrapped_tensor(x) or x.is_nested)]
    before = [x.detach().clone() for x in given]
    try:
        return diffopt.solve(loss, params, *args, **options).params
    finally:
        for x, old in zip(given, before, strict=True):
            assert x.grad is None
            assert torch.equal(_comparable(x.detach()), _comparable(old)), "was changed"


def _comparable(x: Tensor) -> Tensor:
    return x.nan_to_num(7.0) if x.is_floating_point() else x


def backward(end: Callable[[Tensor], Tensor] = square, loss: Any = square, start: Tensor | None = None, **options: Any):
    """Backward through a solve."""
    start = (tensor(1, 2) if start is None else start).requires_grad_()
    args = options.pop("args", ())
    end(solve(loss, start, *args, **options)).sum().backward()
