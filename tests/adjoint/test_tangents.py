"""Forward mode around a solve: ``Unrolled`` passes tangents on, all else refuses them, and nothing drops them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracles import relative_error
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F  # noqa: N812  (its usual name)

import diffopt
from diffopt import SGD, Adam, Schedule, solve
from diffopt.estimators import Binomial, FirstOrder, ForwardMode, Krylov, Reverse, Truncated, Unrolled

AIM = torch.tensor([0.3, -0.8, 1.2], dtype=torch.float64)
START = torch.tensor([1.0, 0.4, -0.5], dtype=torch.float64)


@pytest.fixture(autouse=True)
def quietly() -> Iterator[None]:
    """What torch warns of when it first loads forward mode is its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def loss(w: Tensor, aim: Tensor) -> Tensor:
    return (w - aim).square().sum() + w.pow(4).sum() / 4


def unrolled(w: Tensor, aim: Tensor, **options: Any) -> diffopt.Solution[Tensor]:
    given = {"optimizer": SGD(0.1), "steps": 3, **options}
    return solve(loss, w, aim, estimator=Unrolled(), **given)


def with_momentum(x: Tensor) -> Tensor:
    return unrolled(START, x, optimizer=Adam(Schedule(x.exp() / 10))).params


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "an argument": lambda x: unrolled(START, x).params,
    "the start": lambda x: unrolled(x, AIM).params,
    "a schedule": with_momentum,
    "batches": lambda x: (
        solve(loss, START, batches=x.outer(x), optimizer=SGD(0.1), steps=3, estimator=Unrolled()).params
    ),
    "losses": lambda x: unrolled(START, x).losses,
    "observed": lambda x: unrolled(START, x, observe=lambda w, aim: (w * aim).sum()).observed,
    "tasks": lambda x: vmap(lambda y: unrolled(START, y).params)(x.outer(x)),
}


def differences(function: Callable[[Tensor], Tensor], at: Tensor, rate: Tensor) -> Tensor:
    return (function(at + 1e-6 * rate) - function(at - 1e-6 * rate)) / 2e-6


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_plain_unrolling_passes_tangents_on(name: str, recorded: bool) -> None:
    """Beside differences; of what ``torch.func.jvp`` makes, whatever autograd does around it."""
    rate = torch.tensor([0.5, -1.0, 0.7], dtype=torch.float64)
    with torch.set_grad_enabled(recorded):
        found = jvp(FUNCTIONS[name], (AIM,), (rate,))[1]
    assert relative_error([found], [differences(FUNCTIONS[name], AIM, rate)]) < 1e-7


@pytest.mark.parametrize("name", FUNCTIONS)
def test_columns_of_a_jacobian_are_its_rows(name: str) -> None:
    assert relative_error([jacfwd(FUNCTIONS[name])(AIM)], [jacrev(FUNCTIONS[name])(AIM)]) < 1e-12


@pytest.mark.parametrize("of_torch", [F.mse_loss, F.huber_loss])
def test_an_inner_gradient_without_forward_mode_is_named(of_torch: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Torch's own words are of zeros that cannot be written to."""

    def trained(aim: Tensor) -> Tensor:
        return solve(of_torch, START, aim, optimizer=SGD(0.1), steps=2, estimator=Unrolled()).params

    with pytest.raises(diffopt.MissingDerivativeError, match=r"no forward mode of the inner gradient.*jacrev"):
        jvp(trained, (AIM,), (AIM,))
    assert jacrev(trained)(AIM).shape == (3, 3)


ADJOINTS = [Reverse(), Reverse(1), Truncated(1), FirstOrder(), ForwardMode(), Binomial(2), Krylov(2)]
REFUSED = "carries a tangent of forward-mode differentiation"


def ends(aim: Tensor, estimator: Any) -> Tensor:
    return solve(loss, START, aim, optimizer=SGD(0.1), steps=3, estimator=estimator).params


@pytest.mark.parametrize("estimator", ADJOINTS, ids=repr)
def test_a_cotangent_with_a_tangent_is_refused(estimator: Any) -> None:
    """A part of the way back would pass it on, and the rest drop it."""
    aim = AIM.clone().requires_grad_()
    end = ends(aim, estimator)
    with forward_ad.dual_level(), pytest.raises(diffopt.MissingDerivativeError, match=REFUSED):
        torch.autograd.grad(end, aim, forward_ad.make_dual(torch.ones_like(end), torch.ones_like(end)))


@pytest.mark.parametrize("estimator", ADJOINTS, ids=repr)
@pytest.mark.parametrize(
    "hypergradient",
    [
        lambda weight, estimator: grad(lambda aim: (ends(aim, estimator) * weight).sum())(AIM),
        lambda weight, estimator: vjp(lambda aim: ends(aim, estimator), AIM)[1](weight)[0],
    ],
)
def test_so_is_one_of_a_transform(hypergradient: Callable[[Tensor, Any], Tensor], estimator: Any) -> None:
    with pytest.raises(diffopt.MissingDerivativeError, match=REFUSED):
        jvp(lambda weight: hypergradient(weight, estimator), (AIM,), (AIM,))


def test_plain_unrolling_passes_that_of_a_cotangent_on() -> None:
    """The hypergradient is linear in the cotangent."""

    def hypergradient(weight: Tensor) -> Tensor:
        return grad(lambda aim: (ends(aim, Unrolled()) * weight).sum())(AIM)

    assert relative_error([jvp(hypergradient, (AIM,), (START,))[1]], [hypergradient(START)]) < 1e-12


def squares(w: Tensor, aim: Tensor) -> Tensor:
    return (w - aim).square().sum()


TANGENTS: dict[str, Callable[[Tensor], Any]] = {
    "an argument of mean_over_tasks": lambda x: diffopt.mean_over_tasks(lambda y: y**2, x),
    "one that a task loss captures": lambda x: diffopt.mean_over_tasks(lambda y: y * x[0], AIM),
    "an argument of implicit": lambda x: diffopt.implicit(squares, AIM, x),
    "the cotangent of implicit_gradients": lambda x: diffopt.implicit_gradients(squares, AIM, AIM, cotangent=x),
    "weights of attribute": lambda x: diffopt.attribute(lambda w: ends(w, None), torch.sum, x),
}


@pytest.mark.parametrize("name", TANGENTS)
def test_tangents_elsewhere_are_refused(name: str) -> None:
    with forward_ad.dual_level():
        tangent = forward_ad.make_dual(AIM.clone(), torch.ones_like(AIM))
        with pytest.raises(diffopt.MissingDerivativeError, match=REFUSED):
            TANGENTS[name](tangent)


def test_implicit_gradients_are_numbers_in_forward_mode_too() -> None:
    with pytest.raises(diffopt.SecondDerivativeError, match="detach"):
        jvp(lambda x: diffopt.implicit_gradients(squares, x, x, cotangent=x).args[0], (AIM,), (AIM,))
