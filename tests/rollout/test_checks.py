"""Checks made while solving: the first bad step of a divergence, ``check=False``, and second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import diffopt
from diffopt.estimators import FirstOrder, ForwardMode, Reptile, Reverse, Truncated, Unrolled

ESTIMATORS: dict[str, Any] = {
    "reverse": Reverse(),
    "states": Reverse(1),
    "truncated": Truncated(2),
    "forward": ForwardMode(),
    "first_order": FirstOrder(),
    "reptile": Reptile(),
}


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def solve(loss: Any, params: Tensor, **options: Any) -> Tensor:
    """The final parameters; what is not given is right."""
    return diffopt.solve(loss, params, **{"optimizer": diffopt.SGD(0.1), "steps": 3, **options}).params


STYLES: dict[str, Callable[..., Any]] = {
    "plain": lambda run, bad=(1, 2), good=(0, 0): run(tensor(*bad)),
    "grad": lambda run, bad=(1, 2), good=(0, 0): grad(lambda w: run(w).sum())(tensor(*bad)),
    "vmap": lambda run, bad=(1, 2), good=(0, 0): vmap(run)(torch.stack([tensor(*good), tensor(*bad)])),
}
"""Ways of running from where it goes wrong; under vmap that is the second task only."""


@pytest.mark.parametrize("lr", [0.5, 3.0, 1e120])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("estimator", [*ESTIMATORS.values(), Unrolled()], ids=[*ESTIMATORS, "unrolled"])
def test_divergence_names_the_first_bad_step(estimator: Any, style: str, lr: float) -> None:
    """A plain loop finds the first step whose loss, or the state after it, is not finite."""
    w, steps, bad = tensor(1, 2), 12, 1
    while (finite := bool((w**4).sum().isfinite())) and (w := w - lr * 4 * w**3).isfinite().all():
        bad += 1
    what = "the state after" if finite else "the loss of"
    run = partial(solve, lambda w: (w**4).sum(), optimizer=diffopt.SGD(lr), steps=steps, estimator=estimator)
    with pytest.raises(diffopt.DivergenceError, match=f"{what} step {bad} of {steps} is .*check the learni") as caught:
        STYLES[style](run)
    assert caught.value.step == bad < steps


def rooted(w: Tensor) -> Tensor:
    """A root whose gradient at zero is NaN, though the loss is finite."""
    return w.square().sum().sqrt() + (w - 1).square().sum()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("estimator", [*ESTIMATORS.values(), Unrolled()], ids=[*ESTIMATORS, "unrolled"])
def test_a_first_gradient_that_is_not_finite_is_no_divergence(estimator: Any, style: str) -> None:
    with pytest.raises(diffopt.NonFiniteGradientError, match=r"is nan at the initial params.*roots, norms or log"):
        STYLES[style](partial(solve, rooted, estimator=estimator), bad=(0, 0), good=(1, 2))
    with pytest.raises(diffopt.DivergenceError, match="check the learning rate"):
        solve(lambda w: (w**4).sum(), tensor(1, 2), optimizer=diffopt.SGD(1e300), estimator=estimator)


def test_looking_for_a_bad_gradient_leaves_the_random_numbers_alone() -> None:
    """Torch's generator stands where the rollout left it."""

    def noisy(w: Tensor) -> Tensor:
        return rooted(w) + torch.rand(()) * w.sum()

    torch.manual_seed(3)
    expected = [torch.rand(()) for _ in range(3)][-1]
    torch.manual_seed(3)
    with pytest.raises(diffopt.NonFiniteGradientError):
        solve(noisy, tensor(0, 0), steps=2)
    assert torch.equal(torch.rand(()), expected)


def batch_is_bad(w: Tensor, b: Tensor) -> Tensor:
    return (w * b).square().sum()


def gradient_is_bad(w: Tensor, b: Tensor) -> Tensor:
    return (w * (w + 1)).sum() + torch.where(b > 1, 0 * w, 1).sqrt().sum()


@pytest.mark.parametrize("entry", [1, 3, 5])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("estimator", [*ESTIMATORS.values(), Unrolled()], ids=[*ESTIMATORS, "unrolled"])
def test_a_step_with_bad_data_is_named_and_so_is_its_batch(estimator: Any, style: str, entry: int) -> None:
    """Step ``t`` sees entry ``t - 1``, whether its loss is NaN or only its gradient."""
    for loss, bad, says in (
        (batch_is_bad, float("nan"), rf"the loss of step {entry + 1} of 6 is .*batches at step {entry + 1} is not fin"),
        (gradient_is_bad, 2.0, f"the state after step {entry + 1} of 6 is .*check the learning rate"),
    ):
        batches = torch.ones(6, 2, dtype=torch.float64)
        batches[entry, 0] = bad
        with pytest.raises(diffopt.DivergenceError, match=says) as caught:
            STYLES[style](lambda w, loss=loss, b=batches: solve(loss, w, steps=6, batches=b, estimator=estimator))
        assert caught.value.step == entry + 1


@pytest.mark.parametrize("estimator", [Reverse(), Unrolled()])
def test_a_random_loss_is_looked_at_again_with_its_own_numbers(estimator: Any) -> None:
    """The loss is infinite where its draw is above 0.9; the plain loop draws one number a step, too."""
    torch.manual_seed(1)
    bad = next(t for t in range(1, 100) if torch.rand(()) > 0.9)
    assert bad > 2
    torch.manual_seed(1)
    with pytest.raises(diffopt.DivergenceError) as caught:
        solve(lambda w: (w / (torch.rand(()) < 0.9)).sum(), tensor(1, 2), steps=50, estimator=estimator)
    assert caught.value.step == bad


@pytest.mark.parametrize("style", STYLES)
def test_divergence_in_the_last_step(style: str) -> None:
    """The state overflows where no inner loss sees it."""
    with pytest.raises(diffopt.DivergenceError, match="step 1 of 1") as caught:
        STYLES[style](lambda w: solve(lambda w: (w**4).sum(), w, optimizer=diffopt.SGD(1e308), steps=1))
    assert caught.value.step == 1


@pytest.mark.parametrize("estimator", [*ESTIMATORS.values(), Unrolled()], ids=[*ESTIMATORS, "unrolled"])
def test_without_check_values_are_not_looked_at(estimator: Any) -> None:
    for loss in (lambda w: (w * float("nan")).sum(), lambda w: (w / 0).sum()):
        assert not solve(loss, tensor(1, 2), check=False, estimator=estimator).isfinite().any()
    start = tensor(1, 2).requires_grad_()
    end = solve(lambda w: torch.tensor(1.0), start, check=False, estimator=estimator)
    assert torch.equal(end, start)
    end = solve(lambda w: (w**4).sum(), start, check=False, estimator=estimator, optimizer=diffopt.SGD(3.0), steps=12)
    assert not end.isfinite().any()


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("style", ["plain", "func", "vmap"])
def test_a_second_derivative_is_refused(name: str, style: str) -> None:
    def objective(w: Tensor) -> Tensor:
        return solve(lambda w: w.pow(4).sum(), w, estimator=ESTIMATORS[name], optimizer=diffopt.SGD(0.01)).pow(3).sum()

    def differentiate_twice() -> None:
        if style == "func":
            grad(lambda w: grad(objective)(w).sum())(tensor(1, 2))
        elif style == "vmap":
            vmap(grad(lambda w: grad(objective)(w).sum()))(torch.stack([tensor(1, 2), tensor(2, 1)]))
        else:
            w = tensor(1, 2).requires_grad_()
            (first,) = torch.autograd.grad(objective(w), w, create_graph=True)
            first.sum().backward()

    with pytest.raises(
        diffopt.SecondDerivativeError, match=r"use estimator=diffopt\.estimators\.Unrolled\(\)"
    ) as caught:
        differentiate_twice()
    assert len(str(caught.value)) < 350


class Once(torch.autograd.Function):
    """Doubles, and can be differentiated once only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 2 * cotangent


class BadlyNamed(torch.autograd.Function):
    """Doubles, and has every derivative, whatever its name says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 2 * cotangent


BadlyNamed.__name__ = BadlyNamed.__qualname__ = "NotImplemented"

LACKING: dict[str, Callable[[Tensor], Tensor]] = {
    "multi_margin": lambda w: torch.nn.functional.multi_margin_loss(w[None], torch.tensor([0])),
    "once": lambda w: Once.apply(w).square().sum(),
    "among_others": lambda w: w.pow(4).sum() + Once.apply(w[:1]).square().sum() + w.sin().sum(),
}


@pytest.mark.parametrize("loss", LACKING.values(), ids=LACKING)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("estimator", [Reverse(), Reverse(1), Reverse("sqrt"), Truncated(1), Unrolled()], ids=str)
def test_a_missing_second_derivative_is_refused(estimator: Any, steps: int, loss: Any) -> None:
    """At the latest in the backward pass, which would give the number without it."""
    start = tensor(1, 2).requires_grad_()
    with pytest.raises(diffopt.MissingDerivativeError):
        solve(loss, start, steps=steps, estimator=estimator).square().sum().backward()
    assert start.grad is None


@pytest.mark.parametrize("estimator", [Reverse(), Reverse(1), Truncated(2), Unrolled()], ids=str)
def test_an_operation_that_is_differentiated_once_only_is_right(estimator: Any) -> None:
    """It has what the meta-parameter ``x`` needs: the inner gradient ``2 w + 2 x`` is linear in it."""
    start, x = tensor(1, 2).requires_grad_(), tensor(3, 4).requires_grad_()
    loss = lambda w, x: (w.square() + w * Once.apply(x)).sum()  # noqa: E731
    end = diffopt.solve(loss, start, x, optimizer=diffopt.SGD(0.1), steps=2, estimator=estimator).params
    end.sum().backward()
    # w' = 0.8 w - 0.2 x, twice
    assert torch.allclose(start.grad, torch.full_like(start, 0.64), rtol=1e-12)
    assert torch.allclose(x.grad, torch.full_like(x, -0.36), rtol=1e-12)


@pytest.mark.parametrize("estimator", [Reverse(), Reverse(1), Unrolled()], ids=str)
def test_an_operation_with_a_bad_name_is_right(estimator: Any) -> None:
    start = tensor(1, 2).requires_grad_()
    solve(lambda w: BadlyNamed.apply(w).square().sum(), start, steps=2, estimator=estimator).sum().backward()
    assert torch.allclose(start.grad, torch.full_like(start, 0.04), rtol=1e-10)  # (1 - 0.1 * 8)^2
