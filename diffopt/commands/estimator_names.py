"""Estimators by the names that the command line knows them under."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

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


@final
@dataclass(frozen=True)
class _Rule:
    """What a name stands for: alone, and followed by a colon and an argument; ``None`` where it may not stand so."""

    alone: Callable[[], Estimator] | None = None
    form: str = ""
    """How the argument is written."""
    given: Callable[[str], Estimator] | None = None


def _reverse(text: str) -> Reverse:
    return Reverse(text) if text in ("graph", "sqrt", "log") else Reverse(int(text))  # type: ignore[arg-type]


_RULES: dict[str, _Rule] = {
    "reverse": _Rule(Reverse, "graph|sqrt|log|K", _reverse),
    "unrolled": _Rule(Unrolled),
    "forward-mode": _Rule(lambda: ForwardMode(chunk_size=64)),
    "first-order": _Rule(FirstOrder),
    "reptile": _Rule(Reptile),
    "implicit": _Rule(Implicit),
    "truncated": _Rule(None, "K", lambda steps: Truncated(int(steps))),
    "binomial": _Rule(None, "K", lambda order: Binomial(int(order))),
    "krylov": _Rule(None, "K", lambda order: Krylov(int(order))),
    "multi-step": _Rule(None, "K", lambda window: MultiStep(int(window))),
    "es": _Rule(None, "K", lambda directions: ESJacobian(int(directions), 1e-3)),
}
KNOWN_NAMES = ", ".join(
    shown
    for name, rule in _RULES.items()
    for shown in ([name] if rule.alone else []) + ([f"{name}:{rule.form}"] if rule.given else [])
)


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
    rule = _RULES.get(kind)
    if rule is None:
        raise EstimatorNameError(f"there is no estimator {name[:30]!r}", f"one of {KNOWN_NAMES}")
    if not colon and rule.alone is not None:
        return rule.alone()
    if rule.given is None:
        raise EstimatorNameError(f"the estimator {name!r} has an argument", "none", f"write {kind}")
    form = f"{kind}:{rule.form}, where K is an integer"
    if not argument:
        raise EstimatorNameError(f"the estimator {name!r} lacks its argument", form)
    try:
        return rule.given(argument)
    except DiffoptError as error:  # the rule's own check of its range
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
