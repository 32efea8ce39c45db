"""What no argument should be ends in a typed error that can be read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch
from bad_row import square
from odd_objects import OBJECTS, solve
from torch import Tensor
from torch.func import grad

import diffopt
from diffopt import SGD, Adagrad, Adam, AdamW, DiffoptError, Preconditioned, ProximalGD, RMSprop
from diffopt.estimators import (
    Binomial,
    Claims,
    ESJacobian,
    ForwardMode,
    Implicit,
    Keep,
    Krylov,
    MultiStep,
    Reverse,
    Truncated,
)
from diffopt.linear_solve import GMRES, ConjugateGradient, Dense, Neumann, Nystrom
from diffopt.tasks import Quadratic, Ridge, Sinusoid

MOST = 300

OPTIONS: list[tuple[Any, dict[str, Any]]] = [
    (SGD, {"lr": 0.1}),
    (Adam, {}),
    (AdamW, {}),
    (RMSprop, {}),
    (Adagrad, {}),
    (ProximalGD, {"lr": 0.1, "strength": 0.1}),
    (Preconditioned, {"lr": 0.1, "diagonal": 1.0}),
    (Reverse, {}),
    (Keep, {"first": 1}),
    (ForwardMode, {}),
    (Truncated, {"steps": 1}),
    (Binomial, {"order": 1}),
    (Krylov, {"order": 1}),
    (MultiStep, {"window": 2}),
    (Implicit, {}),
    (ESJacobian, {"directions": 2, "radius": 1e-3}),
    (Claims, {}),
    *((kind, {}) for kind in (ConjugateGradient, Dense, GMRES, Neumann)),
    (Nystrom, {"rank": 1, "damping": 0.1}),
]
COUNTS = ("order", "window", "chunk_size", "directions", "max_iterations", "terms", "power_iterations", "rank", "seed")
# the number of steps from the first one on is no option of a user's
FIELDS = [(k, base, f.name) for k, base in OPTIONS for f in fields(k) if f.name != "first"]


def use(kind: Any, options: dict[str, Any]) -> Any:
    """Make an optimizer, an estimator or a solver, and solve with it."""
    made = kind(**options)
    if isinstance(made, diffopt.Optimizer):
        return solve(optimizer=made)
    return solve(estimator=made) if isinstance(made, diffopt.estimators.Estimator) else made


def refused(call: Callable[..., Any], *args: Any, **options: Any) -> None:
    with pytest.raises(DiffoptError) as caught:
        call(*args, **options)
    assert "expected" in str(caught.value)
    assert len(str(caught.value)) < MOST


@pytest.mark.parametrize("odd", OBJECTS)
@pytest.mark.parametrize(("kind", "base", "name"), FIELDS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_an_option_of_any_kind_is_refused_by_a_short_typed_error(kind: Any, base: Any, name: str, odd: str) -> None:
    refused(use, kind, {**base, name: OBJECTS[odd]()})


@pytest.mark.parametrize("value", [True, False, np.bool_(True), 1.0, "1", torch.tensor(1)], ids=repr)
@pytest.mark.parametrize(("kind", "base", "name"), [row for row in FIELDS if row[2] in COUNTS])
def test_what_is_no_integer_counts_nothing(kind: Any, base: Any, name: str, value: Any) -> None:
    refused(kind, **{**base, name: value})


def mean(**options: Any) -> Tensor:
    return diffopt.mean_over_tasks(square, torch.ones(2, 2), **options)


def implicit(params: Any = None, **options: Any) -> Any:
    start = torch.zeros(2, dtype=torch.float64) if params is None else params
    return diffopt.implicit(square, start, **options)


def check(**options: Any) -> Any:
    return diffopt.check(square, torch.ones(2), **options)


def one(estimator: Any) -> Tensor:
    return torch.ones(())


def compare(**options: Any) -> Any:
    return diffopt.compare(one, [Reverse()], **options)


def cite(subject: Any) -> str:
    return diffopt.cite(subject)


def conjugate_gradient(matvec: Any) -> Any:
    return ConjugateGradient().solve(matvec, torch.ones(2))


ARGUMENTS: list[tuple[Callable[..., Any], str]] = [
    *((solve, name) for name in ("steps", "check", "compile", "estimator")),
    *((mean, name) for name in ("in_dims", "randomness", "check")),
    *((implicit, name) for name in ("params", "check", "stationarity", "solver")),
    *(
        (check, "directions"),
        (compare, "repeats"),
        (compare, "exact"),
        (cite, "subject"),
        (conjugate_gradient, "matvec"),
    ),
]


@pytest.mark.parametrize("odd", OBJECTS)
@pytest.mark.parametrize(("call", "name"), ARGUMENTS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_an_argument_of_any_kind_is_refused_by_a_short_typed_error(call: Any, name: str, odd: str) -> None:
    refused(call, **{name: OBJECTS[odd]()})


class Own:
    """A class: to call it is to make an object of it."""

    def __init__(self, *args: Any) -> None:
        raise AssertionError("was called")


@pytest.mark.parametrize("loss", [Own, int, torch.optim.Adam, torch.nn.Linear])
def test_a_class_is_no_loss(loss: Any) -> None:
    two = torch.ones(2, 2)
    calls = [(solve, two), (diffopt.implicit, two), (diffopt.mean_over_tasks, two), (diffopt.compare, [Reverse()])]
    for call, given in calls:
        with pytest.raises(diffopt.LossError, match="that is a class: pass an object of it"):
            call(loss, given)


@pytest.mark.parametrize("subject", [3, None, "Reverse", [Reverse()], torch.ones(2), torch.optim.SGD, square, 10**400])
def test_what_no_result_rests_on_cannot_be_cited(subject: Any) -> None:
    with pytest.raises(diffopt.EstimatorError, match=r"cite was given .*, expected an estimator"):
        diffopt.cite(Reverse(), subject)


def test_an_estimator_of_ones_own_is_cited_by_what_it_holds() -> None:
    @dataclass(frozen=True)
    class Mine(SGD.__mro__[1]):  # type: ignore[misc, name-defined]
        inner: Any

        def init(self, params: Any) -> Any:
            return {}

        def update(self, params: Any, grads: Any, buffers: Any, step: int) -> Any:
            return params, buffers

    assert "kingma2015" in diffopt.cite(Mine(Adam()))
    assert diffopt.cite(Mine) == diffopt.cite(diffopt.solve) == diffopt.cite()


def test_sizes_of_numpy_do_not_wrap_around() -> None:
    """``np.uint8(255) + 1`` is 0."""
    made = [Ridge.random(3, size, generator=torch.Generator().manual_seed(0)).targets for size in (np.uint8(255), 255)]
    assert torch.equal(*made)
    assert type(Sinusoid(np.int64(2), np.int16(3)).queries) is int


def test_what_is_taken_besides_is_named() -> None:
    with pytest.raises(diffopt.HyperparameterError, match="expected None, 'graph', 'sqrt', 'log' or an integer >= 1"):
        Reverse("all")
    with pytest.raises(diffopt.HyperparameterError, match="expected 'error', 'same' or 'different'"):
        mean(randomness=None)
    with pytest.raises(diffopt.HyperparameterError, match="expected None or a finite number >= 0 and < 1"):
        Neumann(rtol=1)
    assert isinstance(grad(lambda w: implicit(w).sum())(torch.zeros(2)), Tensor)


@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, torch.Tensor.to_mkldnn, lambda x: x.to("meta")])
def test_a_problems_tensor_that_is_not_dense_is_refused(make: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(DiffoptError, match=r"(hessian|target) is .*expected"):
        Quadratic(make(torch.eye(2)), torch.ones(2))


def test_the_largest_integer_is_an_option_like_any() -> None:
    """``sys.maxsize``, by which programs say "all of them"."""
    most = sys.maxsize
    binomial, neumann = Binomial(most, window=most, chunk_size=most), Neumann(terms=most, power_iterations=10_000)
    for made in (Reverse(most), binomial, MultiStep(most), neumann, ConjugateGradient(max_iterations=most)):
        assert most in vars(made).values()
