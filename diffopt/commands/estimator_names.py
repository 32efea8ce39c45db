"""Estimators by the names that the command line knows them under."""

from __future__ import annotations

import argparse
from collections.abc import Callable

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


class EstimatorNameError(DiffoptError, ValueError):
    """A text is not the name of an estimator."""


_ALONE: dict[str, Callable[[], Estimator]] = {
    "reverse": Reverse,
    "unrolled": Unrolled,
    "forward-mode": lambda: ForwardMode(chunk_size=64),
    "first-order": FirstOrder,
    "reptile": Reptile,
    "implicit": Implicit,
}
_WITH_ARGUMENT: dict[str, Callable[[str], Estimator]] = {
    "reverse": lambda text: Reverse(text if text in ("graph", "sqrt", "log") else int(text)),  # type: ignore[arg-type]
    "truncated": lambda steps: Truncated(int(steps)),
    "binomial": lambda order: Binomial(int(order)),
    "krylov": lambda order: Krylov(int(order)),
    "multi-step": lambda window: MultiStep(int(window)),
    "es": lambda directions: ESJacobian(int(directions), 1e-3),
}
_FORMS = {name: f"{name}:{'graph|sqrt|log|K' if name == 'reverse' else 'K'}" for name in _WITH_ARGUMENT}
KNOWN_NAMES = ", ".join([*_ALONE, *_FORMS.values()])


def estimator(name: str) -> Estimator:
    """The estimator called ``name``.

    Raises:
        EstimatorNameError: there is none, which the message answers with all names; or its argument is missing, not
            wanted, not a number, or out of range.

    Example:
        >>> estimator("truncated:2")
        Truncated(steps=2, checkpoint=None, memory=None, offload=False)
    """
    kind, colon, argument = name.partition(":")
    if kind not in _ALONE and kind not in _FORMS:
        raise EstimatorNameError(f"there is no estimator {name[:30]!r}", f"one of {KNOWN_NAMES}")
    if not colon and kind in _ALONE:
        return _ALONE[kind]()
    if kind not in _FORMS:
        raise EstimatorNameError(f"the estimator {name!r} has an argument", "none", f"write {kind}")
    form = f"{_FORMS[kind]}, where K is an integer"
    if not argument:
        raise EstimatorNameError(f"the estimator {name!r} lacks its argument", form)
    try:
        return _WITH_ARGUMENT[kind](argument)
    except DiffoptError as error:  # the estimator's own check of its range
        raise EstimatorNameError(f"the estimator {name!r} cannot be: {error.got}", error.expected, error.fix) from error
    except ValueError as error:
        raise EstimatorNameError(f"the estimator {name!r} has the argument {argument[:30]!r}", form) from error


def estimator_name(text: str) -> str:
    """For ``argparse``: ``text``, once it is found to name an estimator."""
    try:
        estimator(text)
    except EstimatorNameError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text
