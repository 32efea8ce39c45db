"""The estimators that many tests run through, by names that say how each goes back."""

from __future__ import annotations

from typing import Any

from diffopt.estimators import (
    Binomial,
    ESJacobian,
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
from diffopt.linear_solve import GMRES


def exact(steps: int, *names: str) -> dict[str, Any]:
    """What is exact on so many steps: the estimators of these names, in their order, or all of them."""
    every = {
        "default": Reverse(),
        "graph": Reverse("graph"),
        "states": Reverse(1),
        "every second": Reverse(2),
        "every third": Reverse(3),
        "sqrt": Reverse("sqrt"),
        "log": Reverse("log"),
        "offloaded": Reverse(2, offload=True),
        "forward": ForwardMode(),
        "forward in chunks": ForwardMode(chunk_size=2),
        "truncated at all": Truncated(steps),
        "truncated in states": Truncated(steps, checkpoint=2),
        "binomial of all": Binomial(steps),
        "binomial in chunks": Binomial(steps, chunk_size=1),
        "krylov of all": Krylov(steps),
        "window of one": MultiStep(1),
        "unrolled": Unrolled(),
    }
    return {name: every[name] for name in names or every}


def biased(steps: int, *names: str) -> dict[str, Any]:
    """What looks at part of the steps only, at ``steps`` of them or to that order; or at differences."""
    every = {
        "truncated": Truncated(steps, checkpoint=1),
        "first order": FirstOrder(),
        "reptile": Reptile(),
        "binomial": Binomial(steps),
        "krylov": Krylov(steps),
        "windows": MultiStep(2),
        "implicit": Implicit(GMRES(throw=False)),
        "evolution": ESJacobian(4, 1e-3),
    }
    return {name: every[name] for name in names or every}
