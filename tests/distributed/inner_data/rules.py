"""Every estimator finds the hypergradients of the problem in one process."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from beside import numbers, same
from inner_data.problem import STEPS, Problem, outer
from torch import Tensor

import diffopt
from diffopt.distributed import copied, summed
from diffopt.estimators import (
    Binomial,
    ESJacobian,
    FirstOrder,
    ForwardMode,
    Implicit,
    Krylov,
    MultiStep,
    Reptile,
    Reverse,
    Truncated,
    Unrolled,
)

ESTIMATORS: dict[str, Any] = {
    "reverse": Reverse(),
    "every_state": Reverse(1),
    "sqrt": Reverse("sqrt"),
    "log": Reverse("log"),
    "truncated": Truncated(2),
    "first_order": FirstOrder(),
    "binomial": Binomial(order=2),
    "krylov": Krylov(order=4),
    "multi_step": MultiStep(2),
    "reptile": Reptile(),
    "unrolled": Unrolled(),
}


def check_hypergradients_of_every_rule() -> None:
    problem = Problem()
    for name, estimator in ESTIMATORS.items():
        expected = problem.expected(estimator=estimator)
        for loss in (problem.shared, problem.spread):
            found = problem.gradients(loss, problem.own, estimator=estimator)
            apart = [float((a - b).norm() / b.norm().clamp(min=1)) for a, b in zip(found, expected, strict=True)]
            assert max(apart) < 1e-12, (name, loss.__name__, apart)


def check_hypergradients_of_tasks_under_vmap() -> None:
    problem = Problem()
    starts = numbers(3, 3, seed=8)

    def result(loss: Any, own: slice, start: Tensor, penalty: Tensor) -> Tensor:
        solution = diffopt.solve(
            loss,
            {"w": start, "b": problem.start["b"]},
            problem.weights[own],
            penalty,
            problem.x[own],
            problem.y[own],
            optimizer=diffopt.Adam(0.05),
            steps=STEPS,
        )
        return outer(solution.params)

    def grads(loss: Any, own: slice) -> Any:
        function = torch.func.grad(lambda *given: result(loss, own, *given), argnums=(0, 1))
        return torch.func.vmap(function, in_dims=(0, None))(starts, problem.penalty)

    same(grads(problem.shared, problem.own), grads(problem.whole, slice(None)))


def check_implicit_hypergradients() -> None:
    problem = Problem()
    start = {k: 0.1 * x for k, x in problem.start.items()}

    def strong(base: Any) -> Any:
        return lambda p, *args: base(p, *args) + p["w"].square().sum() + p["b"].square().sum()

    def at_the_end(loss: Any, own: slice) -> list[Tensor]:
        weights = problem.weights[own].clone().requires_grad_()
        penalty = problem.penalty.clone().requires_grad_()
        args = weights, penalty, problem.x[own], problem.y[own]
        options = {"optimizer": diffopt.SGD(0.05), "steps": 1000, "estimator": Implicit(), "tol": 1e-10}
        solution = diffopt.solve(strong(loss), start, *args, **options)
        found = list(torch.autograd.grad(outer(solution.params), (weights, penalty)))
        point = {k: x.detach() for k, x in solution.params.items()}
        attached = diffopt.implicit(strong(loss), point, *args)
        return [*found, *torch.autograd.grad(outer(attached), (weights, penalty))]

    whole = at_the_end(problem.whole, slice(None))
    same(at_the_end(problem.shared, problem.own), [x[problem.own] if x.ndim else x for x in whole], 1e-9)


def check_second_derivatives_of_a_hypergradient() -> None:
    problem = Problem()

    def curvature(loss: Any, own: slice) -> Tensor:
        penalty = problem.penalty.clone().requires_grad_()
        args = problem.weights[own], penalty, problem.x[own], problem.y[own]
        solution = diffopt.solve(loss, problem.start, *args, optimizer=diffopt.SGD(0.05), steps=3, estimator=Unrolled())
        (first,) = torch.autograd.grad(outer(solution.params), penalty, create_graph=True)
        return torch.autograd.grad(first, penalty)[0]

    same([curvature(problem.shared, problem.own)], [curvature(problem.whole, slice(None))])


def check_slow_compiled_steps() -> None:
    problem = Problem()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", diffopt.CompileWarning)
        found = problem.gradients(problem.shared, problem.own, compile=True)
    same(found, problem.expected())


def check_rules_that_move_their_inputs_by_the_shared_ones() -> None:
    problem = Problem()
    problem.weights = problem.weights.detach()

    def gradients(loss: Any, own: slice, estimator: Any) -> list[Tensor]:
        penalty, lr = (x.clone().requires_grad_() for x in (problem.penalty, problem.lr))
        args = problem.weights[own], penalty, problem.x[own], problem.y[own]
        solution = diffopt.solve(
            loss, problem.start, *args, optimizer=diffopt.SGD(lr), steps=STEPS, estimator=estimator
        )
        return list(torch.autograd.grad(outer(solution.params), (penalty, lr)))

    for loss in (problem.shared, problem.spread):
        same(gradients(loss, problem.own, ForwardMode()), gradients(problem.whole, slice(None), ForwardMode()))
    for loss in (problem.shared, problem.spread):
        found = [
            gradients(loss, own, ESJacobian(2, 1e-4, generator=torch.Generator().manual_seed(3)))
            for loss, own in ((loss, problem.own), (problem.whole, slice(None)))
        ]
        same(*found, tolerance=1e-9)
    own_seed = torch.Generator().manual_seed(problem.rank)
    with pytest.raises(diffopt.RanksError, match="other directions on each"):
        gradients(problem.spread, problem.own, ESJacobian(2, 1e-4, generator=own_seed))


def check_rules_that_move_their_inputs_refuse_those_held_apart() -> None:
    problem = Problem()
    for estimator in (ForwardMode(), ESJacobian(2, 1e-4, generator=torch.Generator().manual_seed(3))):
        for loss in (problem.shared, problem.spread):
            with pytest.raises(diffopt.EstimatorError, match=r"with args\[0\], which each rank holds for itself"):
                problem.gradients(loss, problem.own, estimator=estimator)


def check_micro_batches() -> None:
    problem = Problem()

    def gradient(loss: Any, own: slice, pieces: int | None) -> list[Tensor]:
        w, penalty = problem.start["w"].clone().requires_grad_(), problem.penalty.clone().requires_grad_()
        data = problem.x[own], problem.y[own]
        options = {"batches": lambda step: data, "optimizer": diffopt.SGD(0.1), "steps": 3, "micro_batches": pieces}
        solution = diffopt.solve(lambda p, penalty, batch: loss(p, penalty, *batch), w, penalty, **options)
        return list(torch.autograd.grad(solution.params.pow(3).sum(), (w, penalty)))

    def local(p: Tensor, penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (x @ p - y).square().add(1).log().mean() * penalty.exp()

    def shared(p: Tensor, penalty: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return summed(local(copied(p), copied(penalty), x, y) / problem.world)

    same(gradient(shared, problem.own, 5), gradient(local, slice(None), None))
