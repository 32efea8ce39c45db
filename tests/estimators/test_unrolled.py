"""What ``Unrolled`` refuses as the adjoint rules do, and what it gives without a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

import diffopt
from diffopt.estimators import MultiStep, Reverse, Truncated, Unrolled

ESTIMATORS = {
    "unrolled": Unrolled(),
    "window": MultiStep(1, Unrolled()),
    "reverse": Reverse(),
    "truncated": Truncated(40),
}


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def exploding(w: Tensor, c: Tensor) -> Tensor:
    """Its solution stays small, and its derivative in ``c`` does not fit into single precision."""
    return -(c * w.square()).sum()


def run(loss: Any, w: Any, *args: Any, estimator: Any, steps: int = 40, lr: Any = 5.0, **options: Any) -> Any:
    return diffopt.solve(loss, w, *args, optimizer=diffopt.SGD(lr), steps=steps, estimator=estimator, **options).params


# ------------------------------------------------------------------------------------------------ overflow

LEARNED: dict[str, Callable[[Any], tuple[Tensor, Tensor]]] = {
    "an argument": lambda estimator: of_argument(estimator, check=True),
    "the start": lambda estimator: of_start(estimator),
    "the learning rate": lambda estimator: of_rate(estimator),
}


def of_argument(estimator: Any, *, check: bool) -> tuple[Tensor, Tensor]:
    c = tensor(1).requires_grad_()
    return run(exploding, tensor(1e-30), c, estimator=estimator, check=check).sum() * 1e8, c


def of_start(estimator: Any) -> tuple[Tensor, Tensor]:
    w = tensor(1e-30, 0).requires_grad_()
    return run(exploding, w, tensor(1), estimator=estimator).sum(), w


def of_rate(estimator: Any) -> tuple[Tensor, Tensor]:
    lr = torch.tensor(5.0, requires_grad=True)
    return run(exploding, tensor(1e-30), tensor(1), estimator=estimator, lr=lr).sum() * 1e9, lr


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("learned", LEARNED)
def test_a_hypergradient_that_overflows_is_refused(learned: str, estimator: Any) -> None:
    value, leaf = LEARNED[learned](estimator)
    value = value * 1e25 if learned == "the start" else value
    assert bool(value.isfinite()) or learned == "the start"
    with pytest.raises(diffopt.NonFiniteGradientError, match="hypergradient is NaN or infinite"):
        value.backward()
    assert leaf.grad is None


@pytest.mark.parametrize("estimator", [Unrolled(), Reverse(), Reverse(1)], ids=str)
def test_a_derivative_that_is_infinite_is_refused_though_the_loss_is_finite(estimator: Any) -> None:
    """That of a root at zero."""
    a = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    w = torch.tensor([0.5, -0.3], dtype=torch.float64)
    end = run(
        lambda w, a: w.square().sum() + a.abs().sqrt().sum() * w.sum(), w, a, estimator=estimator, steps=3, lr=0.1
    )
    assert bool(end.isfinite().all())
    with pytest.raises(diffopt.NonFiniteGradientError, match="is NaN or infinite"):
        torch.autograd.grad(end.sum(), a)


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_one_that_fits_is_not(estimator: Any) -> None:
    c = tensor(0.5).requires_grad_()
    estimator = Truncated(20) if isinstance(estimator, Truncated) else estimator
    value = run(exploding, tensor(1e-30), c, estimator=estimator, steps=20).sum()
    (found,) = torch.autograd.grad(value, c)
    assert float(found) == pytest.approx(20 * 10 * 1e-30 * (1 + 10 * 0.5) ** 19, rel=1e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_without_check_it_is_what_it_is(estimator: Any) -> None:
    value, c = of_argument(estimator, check=False)
    value.backward()
    assert not c.grad.isfinite().any()


@pytest.mark.parametrize("outer", ["infinite", "nan"])
def test_a_cotangent_that_is_not_finite_is_refused(outer: str) -> None:
    w = tensor(1, 2).requires_grad_()
    end = run(lambda w: w.square().sum(), w, estimator=Unrolled(), steps=2, lr=0.1)
    factor = torch.tensor(float("inf") if outer == "infinite" else float("nan"))
    with pytest.raises(diffopt.NonFiniteGradientError):
        (end * factor).sum().backward()


def test_higher_derivatives_are_refused_too_where_they_overflow() -> None:
    """The first derivative is 200 w^2 at most, the second overflows by a factor that is put in between."""
    w = tensor(1, 2).requires_grad_()
    end = run(lambda w: w.pow(4).sum(), w, estimator=Unrolled(), steps=2, lr=0.01)
    (first,) = torch.autograd.grad(end.sum(), w, create_graph=True)
    assert bool(first.isfinite().all())
    with pytest.raises(diffopt.NonFiniteGradientError):
        (first * 1e38).sum().mul(1e10).backward()


def test_a_gradient_batch_with_unrolled_is_no_false_alarm() -> None:
    w = tensor(1, 2).requires_grad_()
    end = run(lambda w: w.pow(4).sum(), w, estimator=Unrolled(), steps=2, lr=0.01)
    found = torch.autograd.grad(end, w, torch.eye(2), is_grads_batched=True, retain_graph=True)[0]
    rows = [torch.autograd.grad(end[i], w, retain_graph=True)[0] for i in range(2)]
    torch.testing.assert_close(found, torch.stack(rows))


# ------------------------------------------------------------------------------------------------ disconnected

DISCONNECTED: dict[str, Callable[[Tensor], Tensor]] = {
    "a constant": lambda w: torch.tensor(1.0),
    "detached": lambda w: w.detach().square().sum(),
    "an integer's": lambda w: w.long().sum() * 1.0,
}
STYLES: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "plain": lambda f: f(tensor(1, 2)),
    "grad": lambda f: grad(lambda w: f(w).sum())(tensor(1, 2)),
    "jacrev": lambda f: jacrev(f)(tensor(1, 2)),
    "vmap": lambda f: vmap(f)(torch.ones(3, 2)),
    "vmap of grad": lambda f: vmap(grad(lambda w: f(w).sum()))(torch.ones(3, 2)),
    "grad of vmap": lambda f: grad(lambda w: vmap(f)(w).sum())(torch.ones(3, 2)),
    "grad of grad": lambda f: grad(lambda w: grad(lambda w: f(w).sum())(w).sum())(tensor(1, 2)),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("loss", DISCONNECTED.values(), ids=DISCONNECTED)
def test_a_loss_that_does_not_depend_on_params_is_refused(loss: Any, style: str) -> None:
    with pytest.raises(diffopt.DisconnectedError, match="does not depend on params"):
        STYLES[style](lambda w: run(loss, w, estimator=Unrolled(), steps=2, lr=0.1))


@pytest.mark.parametrize("style", STYLES)
def test_a_loss_that_depends_on_one_leaf_of_two_is_not(style: str) -> None:
    """Nor one whose gradient is zero, nor one that reads an outer variable beside."""

    def solved(w: Tensor) -> Tensor:
        end = run(lambda p, a: (p["a"] * a).square().sum(), {"a": w, "b": w}, w, estimator=Unrolled(), steps=2, lr=0.1)
        flat = run(lambda p: (0 * p).sum(), w, estimator=Unrolled(), steps=2, lr=0.1)
        return end["a"] + end["b"] + flat

    STYLES[style](solved)


# ------------------------------------------------------------------------------------------------ no step

ALL: dict[str, Any] = {**ESTIMATORS, "truncated": Truncated(0), "window": MultiStep(2, Unrolled())}


@pytest.mark.parametrize("estimator", ALL.values(), ids=ALL)
def test_no_step_returns_a_copy(estimator: Any) -> None:
    w, v = tensor(1, 2).requires_grad_(), tensor(3)
    end = run(lambda p: p["w"].sum() * p["v"].sum(), {"w": w, "v": v}, estimator=estimator, steps=0)
    for one, start in ((end["w"], w), (end["v"], v)):
        assert one is not start
        assert torch.equal(one, start)
        assert one.untyped_storage().data_ptr() != start.untyped_storage().data_ptr()
    (end["w"] * tensor(5, 7)).sum().backward()
    assert torch.equal(w.grad, tensor(5, 7))
    with torch.no_grad():
        end["v"].add_(1)
    assert torch.equal(v, tensor(3))


@pytest.mark.parametrize("style", ["grad", "vmap", "vmap of grad"])
@pytest.mark.parametrize("estimator", ALL.values(), ids=ALL)
def test_no_step_under_transforms(estimator: Any, style: str) -> None:
    w = tensor(1, 2)

    def of(w: Tensor) -> Tensor:
        return run(lambda w: w.square().sum(), w, estimator=estimator, steps=0)

    if style == "grad":
        assert torch.equal(grad(lambda w: of(w).square().sum())(w), 2 * w)
    elif style == "vmap":
        end = vmap(of)(w[:, None])
        assert torch.equal(end, w[:, None])
        assert end.untyped_storage().data_ptr() != w.untyped_storage().data_ptr()
    else:
        assert torch.equal(vmap(grad(lambda w: of(w).square().sum()))(w[:, None]), 2 * w[:, None])
