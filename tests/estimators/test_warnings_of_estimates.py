"""What an estimator knows of its own estimate: ``EstimateWarning`` where it is bad, none where good or unchecked."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import diffopt
from diffopt.estimators import Binomial, Krylov, MultiStep

pytestmark = pytest.mark.filterwarnings("error::diffopt.errors.EstimateWarning")
STEPS = 6
CURVATURE = torch.tensor([1.0, 2.0], dtype=torch.float64)


def loss(w: Tensor, c: Tensor) -> Tensor:
    return 0.5 * (CURVATURE * c * w.square()).sum()


def solution(
    estimator: Any, lr: float | Tensor, *, check: bool = True, steps: int = STEPS, c: Tensor | None = None
) -> Any:
    c = torch.ones((), dtype=torch.float64, requires_grad=True) if c is None else c
    start = torch.tensor([1.0, -1.0], dtype=torch.float64)
    return diffopt.solve(loss, start, c, optimizer=diffopt.SGD(lr), steps=steps, estimator=estimator, check=check)


def last_order(order: int, lr: float, steps: int = STEPS) -> float:
    """What the last order adds, relative to those before, at the end of the first step.

    For gradient descent on a quadratic the orders there are ``binom(T - 1, l) (-lr h)^l`` of the cotangent.
    """
    h, cotangent = lr * CURVATURE, 2 * solution(Binomial(order), lr, steps=steps).params.detach()
    x, terms, coefficient = torch.ones_like(h), [], 1.0
    for k in range(order + 1):
        terms.append(coefficient * x * cotangent)
        coefficient, x = coefficient * (steps - 1 - k) / (k + 1), -h * x
    return float(terms[-1].norm() / sum(terms[:-1]).norm())


@pytest.mark.parametrize("lr", [0.02, 0.1, 0.3, 0.9])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_binomial_says_what_its_last_order_adds(order: int, lr: float) -> None:
    """The closed form of the series; a warning if and only if that is above 1."""
    expected, solved = last_order(order, lr), solution(Binomial(order), lr)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solved.params.square().sum().backward()
    assert float(solved.diagnostics["last_order"]) == pytest.approx(expected, rel=1e-9)
    assert [w.category for w in caught] == [diffopt.EstimateWarning] * (expected > 1)
    if expected > 1:
        assert f"Binomial(order={order}): what the last order adds" in str(caught[0].message)
        assert f"is {expected:.2g}, expected at most 1" in str(caught[0].message)


@pytest.mark.parametrize(
    "estimator",
    [*map(Binomial, [0, STEPS, STEPS + 3]), Binomial(2, window=0), Binomial(STEPS, scale=0.0), Binomial(0, window=3)],
    ids=str,
)
def test_binomial_without_curvature_or_with_all_of_it_reports_zero(estimator: Any) -> None:
    """There is no last order that adds anything, or nothing is left out."""
    solved = solution(estimator, 0.9)
    solved.params.square().sum().backward()
    assert float(solved.diagnostics["last_order"]) == 0


@pytest.mark.parametrize("estimator", [Binomial(1), Binomial(2, scale=0.5), Binomial(1, window=0)], ids=str)
def test_binomial_reports_zero_where_no_step_is_made(estimator: Any) -> None:
    solved = solution(estimator, 0.9, steps=0, c=torch.ones(()))
    assert solved.diagnostics == {}  # there is no backward pass yet
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    solved = diffopt.solve(loss, w, torch.ones(()), optimizer=diffopt.SGD(0.1), steps=0, estimator=estimator)
    solved.params.sum().backward()
    assert float(solved.diagnostics["last_order"]) == 0


@pytest.mark.parametrize(
    "estimator", [Binomial(2, window=4), Binomial(2, scale=0.01), Binomial(2, chunk_size=1)], ids=str
)
def test_options_of_binomial_are_in_what_it_says(estimator: Any) -> None:
    solved = solution(estimator, 0.05)
    solved.params.square().sum().backward()
    found = float(solved.diagnostics["last_order"])
    whole = last_order(2, 0.05)
    assert found == pytest.approx(whole, rel=1e-9) if estimator.chunk_size else 0 < found < whole


@pytest.mark.parametrize(
    ("order", "lr", "bad"), [(4, 0.02, False), (2, 0.05, False), (1, 0.9, True), (2, 0.9, True), (STEPS, 0.9, False)]
)
def test_krylov_warns_of_a_large_residual(order: int, lr: float, bad: bool) -> None:
    solved = solution(Krylov(order), lr)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solved.params.square().sum().backward()
    residual = float(solved.diagnostics["residual"])
    assert (residual > 0.5) == bad
    assert [w.category for w in caught] == [diffopt.EstimateWarning] * bad
    if bad:
        assert f"Krylov(order={order}): the relative residual" in str(caught[0].message)
        assert "expected at most 0.5" in str(caught[0].message)


@pytest.mark.parametrize("estimator", [Binomial(1), Krylov(1), MultiStep(2, Binomial(1))], ids=str)
def test_the_warning_is_silenced_by_class_and_by_check(estimator: Any) -> None:
    """The numbers are the same in each case."""
    found = []
    for check, category in ((True, diffopt.EstimateWarning), (False, None)):
        c = torch.ones((), dtype=torch.float64, requires_grad=True)
        end = solution(estimator, 0.9, check=check, c=c).params.square().sum()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if category is not None:
                warnings.simplefilter("ignore", category)
            found.append(torch.autograd.grad(end, c)[0])
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)
    fix = (
        "Take more orders or fewer steps, or Reverse()" if isinstance(estimator, Krylov) else "Use Krylov or Reverse()"
    )
    with pytest.warns(diffopt.EstimateWarning, match=re.escape(f"wrong in size and sign. {fix}")):
        solution(estimator, 0.9).params.square().sum().backward()


@pytest.mark.parametrize("estimator", [Binomial(1), Krylov(1)], ids=str)
@pytest.mark.parametrize("style", ["vmap", "vmap of grad"])
def test_one_task_of_many_is_enough(estimator: Any, style: str) -> None:
    """And none is not: the second of the two lists of tasks has no bad one."""

    def of_task(c: Tensor) -> Tensor:
        return solution(estimator, 0.05, c=c).params.square().sum()

    def run(c: Tensor) -> Tensor:
        if style == "vmap of grad":
            return vmap(grad(of_task))(c)
        c = c.requires_grad_()
        return torch.autograd.grad(vmap(of_task)(c).sum(), c)[0]

    with pytest.warns(diffopt.EstimateWarning):
        run(torch.tensor([0.1, 15.0, 0.2], dtype=torch.float64))
    run(torch.tensor([0.1, 0.3, 0.2], dtype=torch.float64))


@pytest.mark.parametrize(("rates", "bad"), [([0.01, 0.02], False), ([0.01, 0.9], True)])
def test_a_learning_rate_of_each_task_is_judged_by_its_own(rates: list[float], bad: bool) -> None:
    c = torch.ones((), dtype=torch.float64, requires_grad=True)
    ends = vmap(lambda lr: solution(Binomial(1), lr, c=c).params)(torch.tensor(rates, dtype=torch.float64))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ends.sum().backward()
    assert [w.category for w in caught] == [diffopt.EstimateWarning] * bad


def test_diagnostics_of_tasks_are_one_number_each() -> None:
    c = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    kept = []

    def of_task(c: Tensor) -> Tensor:
        solved = solution(Binomial(2), 0.1, c=c)
        kept.append(solved)
        return solved.params.square().sum()

    vmap(of_task)(c).sum().backward()
    found = kept[0].diagnostics["last_order"]
    assert found.shape == (3,)
    assert bool((found.diff() > 0).all())
