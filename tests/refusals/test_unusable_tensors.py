"""Tensors without arithmetic are refused by name; those of inference mode, and large numbers, are taken."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from bad_row import square
from odd_objects import escaped, fake, nested, solve
from torch import Tensor
from torch.func import vmap

import diffopt
from diffopt import SGD, Adam, DiffoptError, Preconditioned, ProximalGD, Schedule
from diffopt.estimators import Binomial, ESJacobian, ForwardMode, Reverse, Truncated, Unrolled
from diffopt.linear_solve import ConjugateGradient, Dense, Neumann, Nystrom

MOST = 300

UNUSABLE: dict[str, tuple[Callable[..., Tensor], str]] = {
    "escaped": (escaped, "vmap that has ended"),
    "fake": (fake, "FakeTensor|expected a dense|expected a d"),
    "mkldnn": (lambda *shape: torch.ones(*(shape or (2,))).to_mkldnn(), r"\.to_dense\(\)|expected a dense"),
    "nested": (lambda *shape: nested(), "nested|of no one shape|expected"),
    "lazy": (lambda *shape: torch.nn.LazyLinear(2).weight, "call the lazy module"),
}
PLACES: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
    "params": lambda make: solve(params={"w": make()}),
    "args": lambda make: solve(square, None, {"x": [make()]}),
    "batches": lambda make: solve(batches={"x": make(3)}),
    "lr": lambda make: solve(optimizer=SGD(make(1))),
    "lr_of_a_leaf": lambda make: solve(lambda p: square(p[0]), [torch.ones(2)], optimizer=SGD([make()])),
    "schedule": lambda make: solve(optimizer=SGD(Schedule(make(3)))),
    "factors": lambda make: solve(optimizer=Preconditioned(0.1, factors=(make(2, 2),))),
    "mean": lambda make: diffopt.mean_over_tasks(square, make(4)),
    "cotangent": lambda make: diffopt.implicit_gradients(square, torch.ones(2), cotangent=make()),
    "start": lambda make: diffopt.implicit_gradients(square, torch.ones(2), cotangent=torch.ones(2), start=make()),
    "b": lambda make: ConjugateGradient().solve(lambda v: v, {"b": make()}),
}


@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.parametrize("place", PLACES)
def test_a_tensor_without_arithmetic_is_refused_by_its_name(place: str, kind: str) -> None:
    make, says = UNUSABLE[kind]
    with pytest.raises(DiffoptError, match=says) as caught:
        PLACES[place](make)
    assert place.split("_")[0] in str(caught.value) or place in ("schedule", "mean")
    assert len(str(caught.value)) < MOST


def test_a_jagged_tensor_is_read_as_it_is() -> None:
    w, x = torch.ones(1, requires_grad=True), nested(torch.jagged)
    end = solve(lambda w, x: ((x * w).values() - 2).square().sum(), w, x, steps=1)
    torch.testing.assert_close(end, torch.ones(1) + 0.1 * 2 * 5)


def there(*values: float) -> Tensor:
    """A tensor made in inference mode, as a frozen network's features are."""
    with torch.inference_mode():
        return torch.tensor(values, dtype=torch.float64)


def distance(w: Tensor, x: Tensor) -> Tensor:
    return (w - x).square().sum() * (x * w).sum()


@pytest.mark.parametrize("estimator", [Reverse(), Reverse(1), Truncated(2), ForwardMode(), Unrolled(), Binomial(3)])
@pytest.mark.parametrize("place", ["args", "batches", "lr", "schedule", "tree", "vmap", "shared", "mean"])
def test_what_was_made_in_inference_mode_is_a_constant_like_any(place: str, estimator: Any) -> None:
    def run(made: Callable[..., Tensor]) -> list[Tensor]:
        w = torch.tensor([0.5, -0.5], dtype=torch.float64, requires_grad=True)
        start = partial(diffopt.solve, steps=3, estimator=estimator)
        x, three = torch.tensor([0.2, 0.3], dtype=torch.float64), made(0.1, 0.1, 0.1)
        calls: dict[str, Callable[[], Tensor]] = {
            "args": lambda: start(distance, w, made(0.2, 0.3), optimizer=SGD(0.1)).params,
            "batches": lambda: start(distance, w, batches=three, optimizer=SGD(0.1)).params,
            "lr": lambda: start(distance, w, x, optimizer=SGD(made(0.1)[0])).params,
            "schedule": lambda: start(distance, w, x, optimizer=SGD(Schedule(three))).params,
            "tree": lambda: start(lambda p: distance(p[0], x), [w], optimizer=SGD([made(0.1, 0.2)])).params[0],
            "vmap": lambda: vmap(lambda a: start(distance, w, a, optimizer=SGD(0.1)).params)(three),
            "shared": lambda: vmap(lambda v: start(distance, v, made(0.2, 0.3), optimizer=SGD(0.1)).params)(
                torch.stack([w, 2 * w])
            ),
            "mean": lambda: diffopt.mean_over_tasks(
                lambda v, a: start(distance, v, a, optimizer=SGD(0.1)).params.sum(), w, three, in_dims=(None, 0)
            ),
        }
        end = calls[place]()
        return [end, *torch.autograd.grad(end.sum(), w)]

    for got, expected in zip(run(there), run(lambda *values: there(*values).clone()), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        (ESJacobian, {"directions": 1}, "radius"),
        (Binomial, {"order": 1}, "scale"),
        (Dense, {}, "damping"),
        (Neumann, {}, "step_size"),
        (Nystrom, {"rank": 1}, "damping"),
    ],
)
def test_an_integer_beyond_64_bits_is_the_float_that_torch_would_take(kind: Any, options: Any, name: str) -> None:
    made = getattr(kind(**options, **{name: 2**70}), name)
    assert made == 2.0**70
    assert isinstance(made, float)


@pytest.mark.parametrize("place", ["lr", "momentum", "center", "diagonal", "tree"])
def test_hyperparameters_beyond_64_bits(place: str) -> None:
    big = 2**70
    optimizers = {
        "lr": SGD(big),
        "momentum": SGD(1e-25, momentum=big),
        "center": ProximalGD(1e-25, 1.0, big),
        "diagonal": Preconditioned(1e-25, diagonal=big),
        "tree": SGD([big]),
    }
    end = diffopt.solve(lambda p: square(p[0]), [torch.ones(2)], optimizer=optimizers[place], steps=1).params[0]
    floats = {
        "lr": 1 - 2.0 * big,
        "momentum": 1.0,
        "center": 1 + 1e-25 * big,
        "diagonal": 1 - 2e-25 * big,
        "tree": 1 - 2.0 * big,
    }
    torch.testing.assert_close(end, torch.full((2,), floats[place]))


@pytest.mark.parametrize("value", [-float("inf"), float("inf"), float("nan"), "x", True])
@pytest.mark.parametrize(
    "make",
    [
        lambda x: SGD(0.1, dampening=x),
        lambda x: ProximalGD(0.1, 0.1, x),
        lambda x: Preconditioned(0.1, diagonal=x),
        lambda x: Binomial(1, scale=x),
        lambda x: Adam(eps=x),
    ],
    ids=["dampening", "center", "diagonal", "scale", "eps"],
)
def test_what_is_no_finite_number_is_refused_also_where_it_is_not_read(make: Any, value: Any) -> None:
    with pytest.raises(diffopt.HyperparameterError, match="expected"):
        make(value)


def test_a_number_for_each_leaf_beside_a_view_with_torchs_negative_bit() -> None:
    """``x.new_tensor`` fails on such a view."""
    z = torch.tensor([1 + 2j, 1 - 1j], dtype=torch.complex128)
    got = diffopt.solve(lambda p: square(p[0]), [z.conj().imag], optimizer=SGD([0.1]), steps=2).params[0]
    torch.testing.assert_close(got, 0.64 * torch.tensor([-2.0, 1.0], dtype=torch.float64))
