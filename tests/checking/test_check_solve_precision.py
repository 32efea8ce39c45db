"""``diffopt.check`` of a whole solve: what a low precision loses is found, beside the same in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from check_cases import learned, numbers
from torch import Tensor

import diffopt
from diffopt import SGD, check

x, y = numbers(16, 4).double(), numbers(16).double().sin()


def lost(dtype: torch.dtype) -> tuple[Any, ...]:
    """Every update is below half the spacing of bfloat16 at one, so that nothing moves."""
    strength = learned(torch.full((4,), 2.0), dtype)
    return lambda w, a: (a * w.square()).sum() / 2, torch.ones(4, dtype=dtype), strength, SGD(9.4e-4), 250


def cancelled(dtype: torch.dtype) -> tuple[Any, ...]:
    """A variance as a difference of large numbers."""

    def loss(w: Tensor, scale: Tensor) -> Tensor:
        moved = scale * w * x.to(w.dtype) + 20
        return (moved.square().mean(0) - moved.mean(0).square() - 1).square().mean()

    return loss, torch.ones(4, dtype=dtype), learned(torch.ones(4), dtype), SGD(0.05), 20


def cast(dtype: torch.dtype) -> tuple[Any, ...]:
    """Params in float64, and the same difference in a lower precision, to which the loss itself casts."""

    def loss(w: Tensor, scale: Tensor) -> Tensor:
        moved = (scale * w).to(dtype) * x.to(dtype) + 20
        return (moved.square().mean(0) - moved.mean(0).square() - 1).square().mean().double()

    return loss, torch.ones(4).double(), learned(torch.ones(4)), SGD(0.05), 20


@pytest.mark.parametrize("make", [lost, cancelled, cast])
def test_a_hypergradient_that_half_precision_loses_is_found(make: Callable[..., tuple[Any, ...]]) -> None:
    loss, params, args, optimizer, steps = make(torch.bfloat16)
    half = check(loss, params, args, optimizer=optimizer, steps=steps, directions=1)
    assert half["precise"].outcome == "FAIL"
    assert isinstance(half["precise"].error, diffopt.errors.PrecisionError | diffopt.DivergenceError)
    assert half["smooth"].outcome == half["adjoint"].outcome == "ok"
    loss, params, args, optimizer, steps = make(torch.float32)
    assert check(loss, params, args, optimizer=optimizer, steps=steps, directions=1)["precise"].outcome == "ok"


NOISE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "randn_like": (torch.randn_like, "skipped"),
    "rand_like": (torch.rand_like, "skipped"),
    "randn": (lambda w: torch.randn(w.shape, dtype=w.dtype), "skipped"),
    "rsample": (lambda w: torch.distributions.Normal(0 * w, 1 + 0 * w).rsample(), "skipped"),
    "bernoulli": (lambda w: torch.bernoulli(torch.sigmoid(w.detach())), "skipped"),
    "normal_": (lambda w: torch.empty_like(w).normal_(), "skipped"),
    "in float32": (lambda w: torch.randn(w.shape), "ok"),
    "integers": (lambda w: torch.randperm(len(w)) / len(w), "ok"),
}


@pytest.mark.parametrize("name", NOISE)
def test_other_random_numbers_in_float64_are_no_lost_precision(name: str) -> None:
    """From one seed, torch draws others in another precision."""
    draw, outcome = NOISE[name]

    def loss(w: Tensor, v: Tensor) -> Tensor:
        return (v * (w - draw(w)).square()).sum()

    for dtype, expected in ((torch.float32, outcome), (torch.float64, "ok")):
        start, weights = torch.zeros(40, dtype=dtype), learned(torch.ones(40), dtype)
        report = check(loss, start, weights, optimizer=SGD(0.05), steps=5, vmap=False)
        assert report.ok
        assert (report["smooth"].outcome, report["precise"].outcome) == ("ok", expected), report
        assert ("other random numbers" in report["precise"].measured) == (expected == "skipped")


def test_what_a_loss_writes_or_casts_is_in_double_precision_too() -> None:
    """A loss that fills a tensor of its own in float32, and one that casts to half precision."""

    def writing(w: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros(16)
        out[:] = x.float() @ w - y.float()
        return (weights * out.square()).mean()

    def casting(w: Tensor, weights: Tensor) -> Tensor:
        return (weights * (x.bfloat16() @ w.bfloat16() - y.to(torch.bfloat16)).square()).mean()

    start, ones = numbers(4), learned(torch.ones(16), torch.float32)
    written = check(writing, start, ones, optimizer=SGD(0.1), steps=5)
    half = check(casting, start, ones, optimizer=SGD(0.1), steps=5)
    assert written["precise"].outcome == written["smooth"].outcome == "ok", written
    off = float(half["precise"].measured.split(",")[1].split()[0])
    assert 1e-3 < off < 0.1  # were both in bfloat16, it would be none
