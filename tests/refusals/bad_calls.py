"""Bad inputs: calls of solve, implicit, compare, check and mean_over_tasks with arguments of a wrong kind."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from bad_row import Refused, solve, square, tensor
from torch import Tensor
from torch.func import grad

import diffopt
from diffopt import SGD, DisconnectedError, EstimatorError, HyperparameterError, LossError, OptimizerError, StepsError
from diffopt.estimators import Binomial, Implicit, Reptile, Reverse, Truncated
from diffopt.linear_solve import ConjugateGradient, Neumann

refused = Refused("call")
ESTIMATOR = "expected a diffopt.estimators object"
COUNT = "steps is .*, expected an integer >= 0"


@refused(StepsError, COUNT, steps=-1)
@refused(StepsError, COUNT, steps=1.5)
@refused(StepsError, COUNT, steps=True)
@refused(StepsError, COUNT, steps="3")
@refused(StepsError, COUNT, steps=None)
@refused(StepsError, r"expected an integer >= 0 \(and below 2\*\*31", steps=10**20)
@refused(StepsError, r"is float 3.0, expected an integer >= 0.*write int\(steps\)", steps=np.float64(3))
@refused(StepsError, "int64 tensor .*expected an integer", steps=torch.tensor(3))
@refused(StepsError, "no step, expected at least one; take enough steps to reach the f", estimator=Implicit(), steps=0)
@refused(StepsError, "expected at most 3; the inner problem", estimator=Truncated(4))
@refused(StepsError, "is 9, expected at most 3.* only 3 steps", estimator=Binomial(1, window=9))
@refused(EstimatorError, rf"{ESTIMATOR}; call it: estimator=Reverse\(\.\.\.\)", estimator=Reverse)
@refused(EstimatorError, f"is str 'reverse', {ESTIMATOR}", estimator="reverse")
@refused(EstimatorError, ESTIMATOR, estimator=ConjugateGradient())
@refused(HyperparameterError, "check is str 'no', expected True or False", check="no")
def solve_with(**options: Any) -> None:
    solve(**options)


@refused(diffopt.GradModeError, "inference_mode, expected .*no_grad")
@torch.inference_mode()
def in_inference_mode() -> None:
    solve(square, tensor(1, 2))


@refused(diffopt.GradModeError, r"params was made in torch\.inference_mode, expected .*clone\(\) it")
def params_of_inference_mode() -> None:
    solve(square, torch.inference_mode()(tensor)(1, 2))


def quadratic(w: Tensor, a: Tensor) -> Tensor:
    return (w - a).square().sum() + w.square().sum()


def with_noise(w: Tensor, a: Tensor) -> Tensor:
    return w.square().sum() * torch.rand(())


def saddle(w: Tensor, a: Tensor) -> Tensor:
    return w[0] ** 2 - w[1] ** 2 + (0 * a).sum()


def badly_scaled(w: Tensor, a: Tensor) -> Tensor:
    return (tensor(1, 1e3) * w * (w - 2 * a)).sum()


def without_params(w: Tensor, a: Tensor) -> Tensor:
    return a.sum()


def of_a_vector(w: Tensor, a: Tensor) -> Tensor:
    return w * a


def capturing(w: Tensor, a: Tensor) -> Tensor:
    return quadratic(w, W)


SADDLE = "broke down .*expected a symmetric positive definite matrix; .*is the inner problem at a minimum"
UNCONVERGED = "did not converge: .*expected one within its tolerance; allow a larger max_iterations"
ONE_ITERATION = ConjugateGradient(max_iterations=1)


@refused(diffopt.StationarityError, "norm 1.2e.01, expected at most .*minimise further", params=tensor(1, 5))
@refused(HyperparameterError, "is int -1, expected None or a finite number >= 0", stationarity=-1)
@refused(HyperparameterError, "expected None or a finite number >= 0", stationarity=True)
@refused(HyperparameterError, "check is int 3, expected True or False", check=3)
@refused(EstimatorError, "str 'cg', expected None or a diffopt.linear_solve", solver="cg")
@refused(diffopt.RandomnessError, "a step with a fixed point .*use Reverse", with_noise, moves=True, stationarity=None)
@refused(EstimatorError, "expected None or a diffopt.linear_solve", solver=ConjugateGradient)
@refused(DisconnectedError, "does not depend on params", without_params)
@refused(LossError, r"shape \(2,\).*expected one floating scalar", of_a_vector)
@refused(diffopt.CapturedTensorError, "captured it, .*pass it in", capturing, params=tensor(0.5, 1))
@refused(diffopt.LinearSolveError, SADDLE, saddle, params=tensor(0, 0))
@refused(diffopt.LinearSolveError, UNCONVERGED, badly_scaled, params=tensor(2, 4), solver=ONE_ITERATION)
@refused(diffopt.LinearSolveError, r"expected step_size \* A between 0 and 2", solver=Neumann(step_size=10.0))
def implicit(loss: Any = quadratic, params: Any = None, **options: Any) -> None:
    """The gradient of a minimiser's sum."""
    a = tensor(2, 4).requires_grad_()
    diffopt.implicit(loss, tensor(1, 2) if params is None else params, a, **options).sum().backward()


@refused(diffopt.SecondDerivativeError, "the result of implicit_gradients is being differentiated, .*detach")
def implicit_gradients_differentiated() -> None:
    grad(lambda w: diffopt.implicit_gradients(square, w, cotangent=w).multiplier.sum())(torch.ones(2))


W = tensor(1, 2).requires_grad_()
REVERSE, DESCENT = Reverse(), SGD(0.1)
EXACT = (REVERSE,)
CALLS = itertools.count(1)


def problem(estimator: Any) -> Tensor:
    return solve(square, W, estimator=estimator).sum()


def without_argument() -> None:
    raise AssertionError("was called")


def number(estimator: Any) -> float:
    return 3.0


def vector(estimator: Any) -> Tensor:
    return W


def constant(estimator: Any) -> Tensor:
    return torch.tensor(1.0)


def forgetful(estimator: Any) -> Tensor:
    return problem(None)


def changing(estimator: Any) -> Tensor:
    return problem(estimator) * next(CALLS)


def zero(estimator: Any) -> Tensor:
    return 0 * problem(estimator)


def not_a_number(estimator: Any) -> Tensor:
    return problem(estimator) * float("nan")


FORGOTTEN = r"given \(Truncated\(steps=2\)\), expected .* write diffopt.solve\(..., estimator=estimator\)"
CHANGED = r"outer loss was .*, and \+1\.5e\+00 from there.* expected the same problem at every call; draw"


@refused(EstimatorError, "expected a list .*; put it in", estimators=Reverse())
@refused(EstimatorError, rf"estimators\[1\] .*{ESTIMATOR}", estimators=[Reptile(), Reverse])
@refused(EstimatorError, "exact is str .*expected None or", exact="reverse")
@refused(EstimatorError, FORGOTTEN, forgetful, [Reptile()], exact=Truncated(2))
@refused(HyperparameterError, "repeats is int 0, expected an integer >= 1", repeats=0)
@refused(LossError, "problem is int 3, expected a function of an estimator", 3)
@refused(LossError, "expected one argument, the estimator", without_argument)
@refused(LossError, "returned float 3.0, expected one floating scalar", number)
@refused(LossError, r"shape \(2,\).*expected one floating scalar", vector)
@refused(DisconnectedError, "expected one to compare the hypergradients of; make", constant)
@refused(DisconnectedError, "is zero, expected one to compare with", zero)
@refused(diffopt.RandomnessError, CHANGED, changing)
@refused(diffopt.NonFiniteGradientError, "expected finite numbers", not_a_number)
def compare(first: Any = problem, estimators: Any = EXACT, **options: Any) -> None:
    diffopt.compare(first, estimators, **options)


@refused(HyperparameterError, "directions is int 0, expected an integer", directions=0)
@refused(HyperparameterError, "vmap is int 1, expected True or F", vmap=1)
def check(**options: Any) -> None:
    diffopt.check(square, W, **options)


@refused(EstimatorError, r"expected a diffopt\.estimators object", Reverse)
@refused(EstimatorError, r"expected a diffopt\.estimators object", SGD(0.1))
@refused(EstimatorError, r"expected a diffopt\.estimators object", None)
@refused(StepsError, "expected an integer >= 2", steps=1)
@refused(StepsError, "expected an integer >= 2", steps=True)
@refused(StepsError, "expected an integer >= 2", steps=2.0)
@refused(StepsError, "expected an integer >= 2", steps=None)
def check_estimator(subject: Any = REVERSE, **options: Any) -> None:
    diffopt.testing.check_estimator(subject, **options)


@refused(OptimizerError, r"expected a diffopt\.Optimizer", SGD)
@refused(OptimizerError, r"expected a diffopt\.Optimizer", torch.optim.SGD([torch.ones(1)]), name="battery_of_torch")
@refused(OptimizerError, r"expected a diffopt\.Optimizer", None)
@refused(StepsError, "expected an integer >= 2", steps=1)
@refused(StepsError, "expected an integer >= 2", steps=True)
@refused(StepsError, "expected an integer >= 2", steps=2.0)
@refused(StepsError, "expected an integer >= 2", steps=None)
def check_optimizer(subject: Any = DESCENT, **options: Any) -> None:
    diffopt.testing.check_optimizer(subject, **options)
