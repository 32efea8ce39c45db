"""Estimators by the names that the command line knows them under."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Literal, TypeAlias

from diffopt.errors import DiffoptError
from diffopt.estimators import (
    Binomial,
    ESJacobian,
    Estimator,
    FirstOrder,
    ForwardMode,
    Implicit,
    Krylov,
    MultiStep,
    Reptile,
    Reverse,
    Truncated,
    Unrolled,
)

_Make: TypeAlias = Callable[[], Estimator]


class EstimatorNameError(DiffoptError, ValueError):
    """A text is not the name of an estimator."""


_PLAIN: dict[str, _Make] = {
    "reverse": Reverse,
    "unrolled": Unrolled,
    "forward-mode": lambda: ForwardMode(chunk_size=64),
    "first-order": FirstOrder,
    "reptile": Reptile,
    "implicit": Implicit,
}
_VARIANTS: dict[str, tuple[str, Callable[[str], Estimator]]] = {
    "truncated": ("truncated:K", lambda steps: Truncated(int(steps))),
    "binomial": ("binomial:K", lambda order: Binomial(int(order))),
    "krylov": ("krylov:K", lambda order: Krylov(int(order))),
    "multi-step": ("multi-step:K", lambda window: MultiStep(int(window))),
    "es": ("es:K", lambda directions: ESJacobian(int(directions), 1e-3)),
    "reverse": ("reverse:graph|sqrt|K", lambda checkpoint: Reverse(_checkpoint(checkpoint))),
}
KNOWN_NAMES = ", ".join([*_PLAIN, *(shown for shown, _ in _VARIANTS.values())])


def estimator(name: str) -> Estimator:
    """The estimator called ``name``.

    Raises:
        EstimatorNameError: there is none, or its number is missing or out of range; the message lists all names.

    Example:
        >>> estimator("truncated:2")
        Truncated(steps=2, checkpoint=None)
    """
    kind, colon, variant = name.partition(":")
    try:
        if colon and kind in _VARIANTS:
            return _VARIANTS[kind][1](variant)
        return _PLAIN[name]()
    except (KeyError, ValueError) as error:
        raise EstimatorNameError(f"there is no estimator {name!r}; known: {KNOWN_NAMES}") from error


def estimator_name(text: str) -> str:
    """For ``argparse``: ``text``, once it is found to name an estimator."""
    try:
        estimator(text)
    except EstimatorNameError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _checkpoint(text: str) -> Literal["graph", "sqrt"] | int:
    if text == "graph":
        return "graph"
    return "sqrt" if text == "sqrt" else int(text)
