"""Warnings of hypergradients that the library itself knows to be bad, and none of others."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import diffopt
from diffopt.estimators import Binomial, ESJacobian, FirstOrder, ForwardMode, Implicit, Krylov, Reverse, Unrolled

A = torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=torch.float64)


def solve(rule: Any, lr: float, dtype: torch.dtype = torch.float64, steps: int = 6, **options: Any) -> Any:
    w = torch.tensor([0.4, -0.2], dtype=dtype, requires_grad=True)

    def loss(w: Tensor) -> Tensor:
        return 0.5 * (w @ A.to(dtype) @ w) + 0.05 * w.pow(4).sum()

    return w, diffopt.solve(loss, w, optimizer=diffopt.SGD(lr), steps=steps, estimator=rule, **options)


def heard(kind: type[Warning], call: Any) -> list[str]:
    """The messages of one class of warnings; another one is an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", kind)
        call()
    return [str(warning.message) for warning in caught if warning.category is kind]


def backward(*given: Any, **options: Any) -> None:
    _, solution = solve(*given, **options)
    solution.params.sum().backward()


# T * lr * |H| is 7.8 or 0.3, to be compared with the order
@pytest.mark.parametrize(
    ("rule", "bad", "says"),
    [
        (Binomial(1), True, r"Binomial\(order=1\): what the last order adds"),
        (Binomial(2), True, r"Binomial\(order=2\)"),
        (Binomial(6), False, ""),  # exact
        (Krylov(1), True, "Krylov"),
    ],
)
def test_an_estimate_outside_its_range_says_so(rule: Any, bad: bool, says: str) -> None:
    messages = heard(diffopt.EstimateWarning, lambda: backward(rule, 0.62))
    assert bool(messages) == bad
    for message in messages:
        assert "expected at most" in message
        assert "Use a higher order, fewer or smaller steps, or Reverse()" in message
    if bad:
        with pytest.warns(diffopt.EstimateWarning, match=says):
            backward(rule, 0.62)
    assert not heard(diffopt.EstimateWarning, lambda: backward(rule, 0.62, check=False))


@pytest.mark.parametrize("rule", [Binomial(1), Binomial(2), Binomial(3, window=4), Krylov(2), Krylov(4)], ids=repr)
def test_one_inside_it_says_nothing(rule: Any) -> None:
    assert not heard(diffopt.EstimateWarning, lambda: backward(rule, 0.02))


def test_one_task_of_many_is_enough() -> None:
    def end(w: Tensor, lr: Tensor) -> Tensor:
        return diffopt.solve(
            lambda w: 0.5 * (w @ A @ w), w, optimizer=diffopt.SGD(lr), steps=6, estimator=Binomial(1)
        ).params

    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    for rates, bad in (([0.01, 0.02], False), ([0.01, 0.62], True)):
        lr = torch.tensor(rates, dtype=torch.float64)
        messages = heard(diffopt.EstimateWarning, lambda lr=lr: vmap(end, (None, 0))(w, lr).sum().backward())
        assert bool(messages) == bad


@pytest.mark.parametrize("rule", [Reverse(), Reverse(1), Unrolled(), ForwardMode(), Binomial(2), Krylov(2)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_says_so_once(rule: Any, dtype: torch.dtype) -> None:
    messages = heard(diffopt.PrecisionWarning, lambda: solve(rule, 0.02, dtype))
    assert len(messages) == 1
    assert f"is computed in {str(dtype).removeprefix('torch.')} (params)" in messages[0]
    assert "Use float32 where it matters, or silence diffopt.PrecisionWarning" in messages[0]


@pytest.mark.parametrize("rule", [Reverse(), Reverse(1), Unrolled()], ids=repr)
def test_so_does_autocast(rule: Any) -> None:
    def call() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            solve(rule, 0.02, torch.float32)

    messages = heard(diffopt.PrecisionWarning, call)
    assert len(messages) == 1
    assert "is computed in bfloat16 (torch.autocast)" in messages[0]


def test_what_is_not_differentiated_twice_or_at_all_says_nothing() -> None:
    half = torch.bfloat16
    calls: list[Any] = [lambda rule=rule: solve(rule, 0.02, half) for rule in (FirstOrder(), ESJacobian(1, 0.1))]
    calls += [lambda: solve(Reverse(), 0.02, torch.float32), lambda: solve(Reverse(), 0.02, half, check=False)]

    def without_grad() -> None:
        with torch.no_grad():
            solve(Reverse(), 0.02, half)

    for call in (*calls, without_grad):
        assert not heard(diffopt.PrecisionWarning, call)


def test_implicit_differentiation_in_half_precision_says_so() -> None:
    assert heard(diffopt.PrecisionWarning, lambda: solve(Implicit(), 0.02, torch.bfloat16))


def test_both_can_be_silenced() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", diffopt.EstimateWarning)
        warnings.simplefilter("ignore", diffopt.PrecisionWarning)
        backward(Binomial(1), 0.62)
        solve(Reverse(), 0.02, torch.bfloat16)
