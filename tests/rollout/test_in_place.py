"""Losses and updates that change what they are given: refused by name, whatever torch says, or right all the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import diffopt
from diffopt.estimators import MultiStep, Reverse, Unrolled

Change = Callable[[Tensor], Any]
CHANGES: dict[str, Change] = {
    "mul_": lambda x: x.mul_(2),
    "add_": lambda x: x.add_(1),
    "+=": lambda x: x.__iadd__(1),
    "x[0] =": lambda x: x.__setitem__(0, 0.5),
    "x[:1] +=": lambda x: x[:1].add_(1),
    "view": lambda x: x.view(-1).mul_(2),
    "out=": lambda x: torch.mul(x, 2, out=x),
    "relu": lambda x: torch.nn.functional.relu(x, inplace=True),
    "sin_": lambda x: x.sin_(),
    "detached": lambda x: x.detach().mul_(2),
}
ESTIMATORS = {"reverse": Reverse(), "states": Reverse(1), "unrolled": Unrolled(), "window": MultiStep(2)}


def plain(run: Any, *given: Tensor) -> Any:
    leaves = [x.requires_grad_() for x in given]
    return torch.autograd.grad(run(*leaves), leaves[0])


STYLES: dict[str, Callable[..., Any]] = {
    "plain": plain,
    "no_grad": torch.no_grad()(lambda run, *given: run(*given)),
    "grad": lambda run, *given: grad(run)(*given),
    "vmap": lambda run, *given: vmap(run)(*(torch.stack([x, 2 * x]) for x in given)),
    "vmap of grad": lambda run, *given: vmap(grad(run))(*(torch.stack([x, 2 * x]) for x in given)),
}


def changed(change: Change, x: Tensor) -> Tensor:
    change(x)
    return x


def solved(loss: Any, optimizer: Any, estimator: Any) -> Callable[..., Tensor]:
    def run(w: Tensor, x: Tensor, batches: Tensor) -> Tensor:
        options = {"optimizer": optimizer, "steps": 3, "estimator": estimator}
        ends = diffopt.solve(loss, {"a": w, "b": 2 * w}, x, batches=batches, **options).params
        return sum((end.square().sum() for end in ends.values()), torch.zeros(()))

    return run


def square(w: Any, x: Tensor, b: Tensor) -> Tensor:
    return (w["a"] * x - w["b"]).square().sum() + (w["a"] * b).square().sum()


LOSSES: dict[str, Callable[[Change], Any]] = {
    "params": lambda change: lambda w, x, b: square({"a": changed(change, w["a"]), "b": w["b"]}, x, b),
    "args": lambda change: lambda w, x, b: square(w, changed(change, x), b),
    "batches": lambda change: lambda w, x, b: square(w, x, changed(change, b)),
}


@dataclass(frozen=True)
class Momentum(diffopt.Optimizer):
    """Gradient descent that changes one of the things that its update is given."""

    what: str
    change: str
    pure: bool = False

    def init(self, params: Any) -> Any:
        return {"velocity": params.zeros()}

    def update(self, params: Any, grads: Any, buffers: Any, step: int) -> Any:
        given = {"params": params, "grads": grads, "buffers": buffers["velocity"]}
        given[self.what] = given[self.what].map(lambda x: changed(CHANGES[self.change], x.clone() if self.pure else x))
        velocity = 0.5 * given["buffers"] + given["grads"]
        return given["params"] - 0.01 * velocity, {"velocity": velocity}


def given() -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.tensor([1.0, 2.0], dtype=torch.float64),
        torch.tensor([1.0, 3.0], dtype=torch.float64),
        torch.arange(1.0, 7.0, dtype=torch.float64).view(3, 2),
    )


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("what", LOSSES)
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_a_loss_that_changes_what_it_is_given_is_refused(estimator: Any, what: str, change: str, style: str) -> None:
    loss = LOSSES[what](CHANGES[change])
    with pytest.raises(diffopt.InPlaceError, match=r"in place, expected .* write x = x \+ y for x \+= y"):
        STYLES[style](solved(loss, diffopt.SGD(0.01), estimator), *given())


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "out="])  # torch refuses it under any gradient
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_a_loss_may_change_what_it_made_itself(estimator: Any, change: str) -> None:
    def loss(w: Any, x: Tensor, b: Tensor) -> Tensor:
        return square({"a": changed(CHANGES[change], 1.5 * w["a"]), "b": w["b"]}, changed(CHANGES[change], 1 * x), b)

    assert bool(plain(solved(loss, diffopt.SGD(0.01), estimator), *given())[0].isfinite().all())


def test_a_view_that_vmap_does_not_know_is_no_change_in_place() -> None:
    """Torch says of both that a fallback "doesn't work on out= or view ops"."""

    def loss(w: Tensor) -> Tensor:
        return torch.fft.fft(w).conj().imag.square().sum()

    def solved(w: Tensor) -> Tensor:
        return diffopt.solve(loss, w, optimizer=diffopt.SGD(0.1), steps=2).params

    with pytest.raises(diffopt.VmapError, match=r"_neg_view; .*write the operation in elementary ones"):
        vmap(solved)(torch.ones(3, 4))


@pytest.mark.parametrize("style", ["plain", "no_grad", "vmap of grad"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("what", ["params", "grads", "buffers"])
@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_an_update_that_changes_what_it_is_given_is_refused_or_right(
    estimator: Any, what: str, change: str, style: str
) -> None:
    """It is right where it changes its own copy, such as a gradient that nobody reads again."""
    try:
        found = STYLES[style](solved(square, Momentum(what, change), estimator), *given())
    except diffopt.InPlaceError:
        return
    assert what != "params"
    expected = STYLES[style](solved(square, Momentum(what, change, pure=True), estimator), *given())
    for one, other in zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]:
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)  # a tensor in another place may be rounded otherwise


@dataclass(frozen=True)
class Doubling(diffopt.Optimizer):
    """Gradient descent that doubles its params, or its buffer, where autograd does not see it."""

    what: str
    first: int

    def init(self, params: Any) -> Any:
        return {"count": params.zeros() + 1}

    def update(self, params: Any, grads: Any, buffers: Any, step: int) -> Any:
        given = {"params": params, "count": buffers["count"]}
        if step >= self.first:
            with torch.no_grad():
                given[self.what].map(lambda x: x.mul_(2))
        return params - 0.1 * grads, {"count": 1 + buffers["count"]}


@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("what", ["params", "count"])
@pytest.mark.parametrize("estimator", [Reverse(), Reverse(1), Reverse("sqrt"), MultiStep(1)], ids=str)
def test_a_write_that_no_graph_has_saved_is_refused(estimator: Any, what: str, first: int) -> None:
    """The loss is linear in its params, so that the backward pass reads none of them."""
    w, x = torch.ones(2, requires_grad=True), torch.tensor([1.0, 2.0], requires_grad=True)
    options = {"optimizer": Doubling(what, first), "steps": 4, "estimator": estimator}
    with pytest.raises(diffopt.InPlaceError, match="in place"):
        diffopt.solve(lambda w, x: (w * x).sum(), w, x, **options).params.sum().backward()
