"""``PrecisionWarning``: where a hypergradient is computed in half precision, and nowhere else."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from estimator_names import biased, exact
from torch import Tensor
from torch.func import grad, vmap

import diffopt
from diffopt.estimators import ESJacobian, ForwardMode, Implicit, MultiStep, Reverse, Unrolled

SECOND: list[Any] = [
    *exact(4, "default", "states", "unrolled", "forward").values(),
    *biased(1, "truncated", "binomial", "krylov", "windows").values(),
    *(MultiStep(2, Unrolled()), Implicit()),
]
FIRST: list[Any] = [*biased(0, "first order", "reptile", "truncated", "binomial").values(), ESJacobian(2, 0.1)]


def loss(w: Tensor, a: Tensor) -> Tensor:
    return ((a @ w) - 1).square().mean()


def told(estimator: Any, dtype: torch.dtype, *, autocast: bool, wanted: bool = True, **options: Any) -> list[str]:
    """What a solve and its backward pass warn of."""
    torch.manual_seed(0)
    w = torch.tensor([0.5, -0.25], dtype=dtype, requires_grad=wanted)
    a = torch.tensor([[1.0, 0.5], [0.25, 1.0]], dtype=dtype)
    given = {"optimizer": diffopt.SGD(0.125), "steps": 4, "estimator": estimator, **options}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
            end = diffopt.solve(loss, w, a, **given).params
        if end.requires_grad:
            end.float().sum().backward()
    return [str(w.message) for w in caught if issubclass(w.category, diffopt.PrecisionWarning)]


HALVES = {"autocast": (torch.float32, True), "bfloat16": (torch.bfloat16, False), "float16": (torch.float16, False)}


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("estimator", SECOND, ids=str)
def test_second_derivatives_in_half_precision_are_warned_of_once(estimator: Any, kind: str) -> None:
    dtype, autocast = HALVES[kind]
    messages = told(estimator, dtype, autocast=autocast)
    assert len(messages) == 1
    assert ("is computed in bfloat16 (torch.autocast)" if autocast else f"is computed in {kind} (params)") in messages[
        0
    ]
    assert "Use float32 where it matters, or silence diffopt.PrecisionWarning" in messages[0]


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("estimator", FIRST, ids=str)
def test_first_derivatives_in_half_precision_are_not(estimator: Any, kind: str) -> None:
    dtype, autocast = HALVES[kind]
    assert told(estimator, dtype, autocast=autocast) == []


@pytest.mark.parametrize("estimator", [*SECOND, *FIRST], ids=str)
def test_single_and_double_precision_are_not(estimator: Any) -> None:
    for dtype in (torch.float32, torch.float64):
        assert told(estimator, dtype, autocast=False) == []


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("estimator", [Reverse(), Unrolled(), ForwardMode()], ids=str)
def test_nothing_is_said_where_nothing_is_differentiated(estimator: Any, kind: str) -> None:
    dtype, autocast = HALVES[kind]
    assert told(estimator, dtype, autocast=autocast, wanted=False) == []
    with torch.no_grad():
        assert told(estimator, dtype, autocast=autocast) == []
    assert told(estimator, dtype, autocast=autocast, check=False) == []
    assert told(estimator, dtype, autocast=autocast, steps=0) == []


@pytest.mark.parametrize("style", ["grad", "vmap of grad", "vmap"])
@pytest.mark.parametrize("estimator", [Reverse(), ForwardMode()], ids=str)
def test_under_transforms_too(estimator: Any, style: str) -> None:
    """An estimator whose solve runs below the transforms is asked there."""

    def run(w: Tensor) -> Tensor:
        a = torch.ones(2, 2, dtype=torch.bfloat16)
        return diffopt.solve(loss, w, a, optimizer=diffopt.SGD(0.125), steps=2, estimator=estimator).params.sum()

    w = torch.ones(3, 2, dtype=torch.bfloat16)
    styles = {
        "grad": lambda: grad(run)(w[0]),
        "vmap of grad": lambda: vmap(grad(run))(w),
        "vmap": lambda: vmap(run)(w.requires_grad_()).sum().backward(),
    }
    with pytest.warns(diffopt.PrecisionWarning, match="bfloat16"):
        styles[style]()


@pytest.mark.parametrize("action", ["ignore", "error"])
def test_the_class_can_be_silenced_or_made_an_error(action: Any) -> None:
    w = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter(action, diffopt.PrecisionWarning)
        with pytest.raises(diffopt.PrecisionWarning) if action == "error" else nullcontext():
            diffopt.solve(lambda w: w.square().sum(), w, optimizer=diffopt.SGD(0.1), steps=2)
