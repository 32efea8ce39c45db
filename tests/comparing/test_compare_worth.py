"""``compare(..., directions=)``: what the exact hypergradient of a problem is worth, in its notes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from check_cases import learned
from torch import Tensor, nn

import diffopt
from diffopt import SGD, Adam
from diffopt.estimators import FirstOrder, Reverse, Truncated, Unrolled

Problem = Callable[[Any], Tensor]
torch_generator = torch.Generator().manual_seed(0)
x, y = torch.randn(16, 4, generator=torch_generator), torch.randn(16, generator=torch_generator)


def ridge(dtype: torch.dtype, steps: int = 10) -> tuple[Problem, list[Tensor]]:
    """Learned weights and rate, with a start and data that are made outside."""
    weights, lr = learned(torch.ones(16), dtype), learned(0.1, dtype)
    a, b, start = x.to(dtype), y.to(dtype), torch.zeros(4, dtype=dtype)

    def loss(w: Tensor, v: Tensor) -> Tensor:
        return (v * (a @ w - b).square()).mean()

    def problem(estimator: Any) -> Tensor:
        options = {"optimizer": SGD(lr, momentum=0.5), "steps": steps, "estimator": estimator}
        return (a @ diffopt.solve(loss, start, weights, **options).params - b.flip(0)).square().mean()

    return problem, [weights, lr]


def network(dtype: torch.dtype) -> tuple[Problem, list[Tensor]]:
    torch.manual_seed(0)
    function, params = diffopt.functional(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype))
    a, b = x.to(dtype), y.to(dtype)

    def loss(p: Any) -> Tensor:
        return (function(p, a)[:, 0] - b).square().mean()

    def problem(estimator: Any) -> Tensor:
        return loss(diffopt.solve(loss, params, optimizer=Adam(0.01), steps=6, estimator=estimator).params)

    return problem, list(params.values())


def chaotic(dtype: torch.dtype) -> tuple[Problem, list[Tensor]]:
    scale, start = learned(5.0, dtype), torch.linspace(0.1, 0.9, 8).to(dtype)

    def problem(estimator: Any) -> Tensor:
        return diffopt.solve(
            lambda w, s: (s * torch.sin(w)).sum(), start, scale, optimizer=SGD(1.0), steps=25, estimator=estimator
        ).params.sum()

    return problem, [scale]


def lost() -> tuple[Problem, list[Tensor]]:
    """Updates below half the spacing of bfloat16."""
    strength, start = learned(2.0, torch.bfloat16), torch.ones(4, dtype=torch.bfloat16)

    def problem(estimator: Any) -> Tensor:
        return diffopt.solve(
            lambda w, a: (a * w.square()).sum() / 2,
            start,
            strength,
            optimizer=SGD(9e-4),
            steps=300,
            estimator=estimator,
        ).params.sum()

    return problem, [strength]


@pytest.mark.parametrize("make", [ridge, network])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smooth_problems_have_nothing_to_beware_of(make: Any, dtype: torch.dtype) -> None:
    problem, leaves = make(dtype)
    before = [(leaf.data_ptr(), leaf._version, leaf.detach().clone()) for leaf in leaves]
    found = diffopt.compare(problem, [Truncated(2)], repeats=1, directions=2)
    assert found.worth.smoothness.error < 0.1
    assert found.worth.precision < 1e-4 if dtype == torch.float32 else found.worth.precision == 0
    assert f"in {str(dtype)[6:]} the exact hypergradient is" in found.notes[-1]
    assert found.notes[-2].endswith("of the size of the meta-parameters")
    for leaf, (address, version, value) in zip(leaves, before, strict=True):
        assert (leaf.data_ptr(), leaf._version, leaf.dtype, leaf.grad) == (address, version, dtype, None)
        assert torch.equal(leaf, value)


def test_a_rate_for_every_weight_has_the_precision_of_params_that_are_made_outside() -> None:
    logs, start = learned(torch.full((4,), 0.1).log(), torch.float32), {"w": torch.ones(4)}

    def problem(estimator: Any) -> Tensor:
        rates = {"w": logs.exp()}
        return (
            diffopt.solve(
                lambda p: (x @ p["w"] - y).square().mean(), start, optimizer=SGD(rates), steps=6, estimator=estimator
            )
            .params["w"]
            .square()
            .sum()
        )

    found = diffopt.compare(problem, [], directions=2)
    assert found.worth.precision is not None
    assert found.worth.precision < 1e-5
    assert found.worth.smoothness.error < 0.01
    assert logs.dtype == torch.float32


@pytest.mark.parametrize("exact", [Reverse(1), Reverse("sqrt"), Reverse("log"), Unrolled()])
def test_steps_taken_again_are_in_double_precision_too(exact: Any) -> None:
    found = diffopt.compare(ridge(torch.float32)[0], [], exact=exact, directions=1)
    assert found.worth.precision is not None
    assert 0 < found.worth.precision < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chaos_is_noted(dtype: torch.dtype) -> None:
    found = diffopt.compare(chaotic(dtype)[0], [FirstOrder()], repeats=1, directions=3)
    assert found.worth.smoothness.error > 0.5
    assert "chaotic or jumps, and no estimator's number says much; lower the learning rate" in str(found)


def test_lost_precision_is_noted() -> None:
    with pytest.warns(diffopt.PrecisionWarning):
        found = diffopt.compare(lost()[0], [], repeats=1, directions=1)
    assert found.worth.precision > 0.5
    assert "in bfloat16 the exact hypergradient is" in found.notes[-1]
    assert found.notes[-1].endswith("use a higher precision")


def test_what_does_not_follow_its_meta_parameters_is_noted() -> None:
    """What is made of them outside keeps its value when they are moved."""
    lr = learned(0.1, torch.float64)
    doubled = 2 * lr

    def problem(estimator: Any) -> Tensor:
        start = torch.ones(3, dtype=torch.float64)
        return diffopt.solve(
            lambda w: w.square().sum(), start, optimizer=SGD(doubled), steps=3, estimator=estimator
        ).params.sum()

    found = diffopt.compare(problem, [], repeats=1, directions=2)
    assert found.worth.smoothness.derivative is False
    assert "made outside the problem" in found.notes[-2]


@pytest.mark.parametrize("cut", [True, False])
def test_a_large_outer_loss_does_not_make_a_wrong_derivative_right(cut: bool) -> None:
    lr = learned(0.1, torch.float64)

    def at(offset: float) -> Problem:
        def problem(estimator: Any) -> Tensor:
            rate = (lr + lr.detach()) / 2 if cut else lr
            start, options = torch.ones(4, dtype=torch.float64), {"optimizer": SGD(rate), "steps": 3}
            given = {**options, "estimator": estimator}
            solution = diffopt.solve(lambda w: (x.double() @ w - y.double()).square().mean(), start, **given)
            return (x.double() @ solution.params - y.double()).square().mean() + offset

        return problem

    for offset in (0.0, 1e2, 1e5, 1e8):
        found = diffopt.compare(at(offset), [], repeats=1, directions=2)
        assert found.worth.smoothness.derivative is not cut
        assert abs(found.worth.smoothness.error - cut / 2) < 0.02
    hidden = diffopt.compare(at(1e12), [], repeats=1, directions=2)
    assert hidden.worth.smoothness.derivative is None
    assert "cannot be told" in hidden.notes[-2]


@pytest.mark.parametrize("like", [True, False])
def test_other_random_numbers_in_float64_are_no_lost_precision(like: bool) -> None:
    weights = learned(torch.ones(40), torch.float32)

    def loss(w: Tensor, v: Tensor) -> Tensor:
        return (v * (w - (torch.randn_like(w) if like else torch.randn(w.shape))).square()).sum()

    def problem(estimator: Any) -> Tensor:
        torch.manual_seed(0)
        options = {"optimizer": SGD(0.05), "steps": 5, "estimator": estimator}
        return diffopt.solve(loss, torch.zeros(40), weights, **options).params.square().sum()

    found = diffopt.compare(problem, [], repeats=1, directions=2)
    assert found.worth.smoothness.error < 0.1
    assert found.worth.drawn is like
    assert ("draws other random numbers in float64 than in float32" in found.notes[-1]) is like
    assert (found.worth.precision is None) is like
    if not like:
        assert found.worth.precision < 1e-5


def test_hooks_of_the_accumulators_stay() -> None:
    """As DistributedDataParallel has them; those would be lost with another precision."""
    problem, leaves = ridge(torch.float32)
    calls: list[int] = []
    nodes = [leaf.view_as(leaf).grad_fn.next_functions[0][0] for leaf in leaves]
    for node in nodes:
        node.register_hook(lambda *_: calls.append(1))
    diffopt.compare(problem, [], repeats=1, directions=2)
    calls.clear()
    problem(Reverse()).backward()
    assert len(calls) == len(leaves)


def test_an_outer_loss_that_is_not_defined_beside_its_place_is_called_that() -> None:
    edge = learned(1.0, torch.float64)

    def problem(estimator: Any) -> Tensor:
        start = (edge - 1 + 1e-7).sqrt() * torch.ones(3, dtype=torch.float64)
        options = {"optimizer": SGD(0.1), "steps": 3, "estimator": estimator}
        return diffopt.solve(lambda w: w.square().sum(), start, **options).params.sum()

    found = diffopt.compare(problem, [], repeats=1, directions=1)
    assert "not defined there" in found.notes[-2]


def test_a_problem_that_asks_for_its_precision_is_compared_in_it() -> None:
    problem, _ = ridge(torch.float32)
    wide = [torch.float64]

    def strict(estimator: Any) -> Tensor:
        value = problem(estimator)
        if value.dtype in wide:
            raise TypeError("float32, please")
        return value

    found = diffopt.compare(strict, [], repeats=1, directions=2)
    assert found.worth.precision is None
    assert found.worth.smoothness.error < 0.1
    assert "does not run in float64" in found.notes[-1]


def test_nothing_is_measured_unless_asked_for() -> None:
    calls: list[Any] = []
    problem, _ = ridge(torch.float64)
    counted = diffopt.compare(lambda estimator: calls.append(0) or problem(estimator), [], repeats=1)
    assert (counted.worth, len(calls)) == (None, 2)
    with pytest.raises(diffopt.HyperparameterError, match="directions is int -1, expected an integer >= 0"):
        diffopt.compare(problem, [], directions=-1)
