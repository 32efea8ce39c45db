"""Bad inputs: calls of solve, implicit, compare, check and mean_over_tasks with arguments of a wrong kind."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from bad_row import Row, solve, square, tensor
from torch import Tensor
from torch.func import grad

import diffopt
from diffopt.estimators import (
    Binomial,
    Implicit,
    Reptile,
    Reverse,
    Truncated,
)
from diffopt.linear_solve import ConjugateGradient, Neumann


def implicit(params: Tensor | None = None, **options: Any) -> Tensor:
    """The gradient of a minimiser's sum."""
    a = tensor(2, 4).requires_grad_()
    loss = options.pop("loss", lambda w, a: (w - a).square().sum() + w.square().sum())
    diffopt.implicit(loss, tensor(1, 2) if params is None else params, a, **options).sum().backward()
    return a


W = tensor(1, 2).requires_grad_()
COUNT = itertools.count(1)


def problem(rule: Any) -> Tensor:
    return solve(square, W, estimator=rule).sum()


def compared(first: Any = problem, rules: Any = None, **options: Any) -> Any:
    return diffopt.compare(first, [Reverse()] if rules is None else rules, **options)


ESTIMATOR = "expected a diffopt.estimators object"
OTHERS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "estimator_class": (
        lambda: solve(estimator=Reverse),
        diffopt.EstimatorError,
        rf"{ESTIMATOR}; call it: estimator=Reverse\(\.\.\.\)",
    ),
    "estimator_name": (lambda: solve(estimator="reverse"), diffopt.EstimatorError, f"is str 'reverse', {ESTIMATOR}"),
    "estimator_solver": (lambda: solve(estimator=ConjugateGradient()), diffopt.EstimatorError, ESTIMATOR),
    "truncated_long": (
        lambda: solve(estimator=Truncated(4)),
        diffopt.StepsError,
        "expected at most 3; the inner problem",
    ),
    "window_long": (
        lambda: solve(estimator=Binomial(1, window=9)),
        diffopt.StepsError,
        "is 9, expected at most 3",
    ),
    "implicit_no_step": (
        lambda: solve(estimator=Implicit(), steps=0),
        diffopt.StepsError,
        "no step, expected at least one",
    ),
    "steps_huge": (lambda: solve(steps=10**20), diffopt.StepsError, r"expected an integer >= 0 \(and below 2\*\*31"),
    "steps_numpy": (
        lambda: solve(steps=np.float64(3)),
        diffopt.StepsError,
        r"is float 3.0, expected an integer >= 0.*write int\(steps\)",
    ),
    "steps_tensor": (lambda: solve(steps=torch.tensor(3)), diffopt.StepsError, "int64 tensor .*expected an integer"),
    "check": (lambda: solve(check="no"), diffopt.HyperparameterError, "check is str 'no', expected True or False"),
    "inference_mode": (
        torch.inference_mode()(lambda: solve(square, tensor(1, 2))),
        diffopt.GradModeError,
        "inference_mode, expected .*no_grad",
    ),
    "inference_params": (
        lambda: solve(square, torch.inference_mode()(tensor)(1, 2)),
        diffopt.GradModeError,
        r"params was made in torch\.inference_mode, expected .*clone\(\) it",
    ),
    "implicit_far": (
        lambda: implicit(tensor(1, 5)),
        diffopt.StationarityError,
        "norm 1.2e.01, expected at most .*minimise further",
    ),
    "implicit_stationarity": (
        lambda: implicit(stationarity=-1),
        diffopt.HyperparameterError,
        "stationarity is int -1, expected None or a finite number >= 0",
    ),
    "implicit_stationarity_bool": (
        lambda: implicit(stationarity=True),
        diffopt.HyperparameterError,
        "expected None or a finite number >= 0",
    ),
    "implicit_solver": (
        lambda: implicit(solver="cg"),
        diffopt.EstimatorError,
        "str 'cg', expected None or a diffopt.linear_solve",
    ),
    "implicit_check": (
        lambda: implicit(check=3),
        diffopt.HyperparameterError,
        "check is int 3, expected True or False",
    ),
    "implicit_random": (
        lambda: implicit(loss=lambda w, a: w.square().sum() * torch.rand(()), stationarity=None),
        diffopt.RandomnessError,
        "expected a step with a fixed point to differentiate; use Reverse",
    ),
    "implicit_indefinite": (
        lambda: implicit(0 * W.detach(), loss=lambda w, a: w[0] ** 2 - w[1] ** 2 + (0 * a).sum()),
        diffopt.LinearSolveError,
        "broke down .*expected a symmetric positive definite matrix; .*is the inner problem at a minimum",
    ),
    "implicit_unconverged": (
        lambda: implicit(
            2 * W.detach(),
            loss=lambda w, a: (tensor(1, 1e3) * w * (w - 2 * a)).sum(),
            solver=ConjugateGradient(max_iterations=1),
        ),
        diffopt.LinearSolveError,
        "did not converge: .*expected one within its tolerance; allow a larger max_iterations",
    ),
    "implicit_diverging_series": (
        lambda: implicit(solver=Neumann(step_size=10.0)),
        diffopt.LinearSolveError,
        r"expected step_size \* A between 0 and 2",
    ),
    "implicit_gradients_differentiated": (
        lambda: grad(lambda w: diffopt.implicit_gradients(square, w, cotangent=w).multiplier.sum())(torch.ones(2)),
        diffopt.SecondDerivativeError,
        "the result of implicit_gradients is being differentiated, .*detach",
    ),
    "compare_one_estimator": (
        lambda: compared(rules=Reverse()),
        diffopt.EstimatorError,
        "expected a list .*; put it in",
    ),
    "compare_class": (
        lambda: compared(rules=[Reptile(), Reverse]),
        diffopt.EstimatorError,
        rf"estimators\[1\] .*{ESTIMATOR}",
    ),
    "compare_exact": (lambda: compared(exact="reverse"), diffopt.EstimatorError, "exact is str .*expected None or"),
    "compare_repeats": (
        lambda: compared(repeats=0),
        diffopt.HyperparameterError,
        "repeats is int 0, expected an integer >= 1",
    ),
    "compare_no_problem": (
        lambda: compared(3),
        diffopt.LossError,
        "problem is int 3, expected a function of an estimator",
    ),
    "compare_no_argument": (lambda: compared(lambda: 3), diffopt.LossError, "expected one argument, the estimator"),
    "compare_number": (
        lambda: compared(lambda r: 3.0),
        diffopt.LossError,
        "returned float 3.0, expected one floating scalar",
    ),
    "compare_vector": (lambda: compared(lambda r: W), diffopt.LossError, r"shape \(2,\).*expected one floating scalar"),
    "compare_constant": (
        lambda: compared(lambda r: torch.tensor(1.0)),
        diffopt.DisconnectedError,
        "expected one to compare the hypergradients of; make",
    ),
    "compare_forgets": (
        lambda: compared(lambda r: problem(None), [Reptile()], exact=Truncated(2)),
        diffopt.EstimatorError,
        r"given \(Truncated\(steps=2\)\), expected .* write diffopt.solve\(..., estimator=estimator\)",
    ),
    "compare_changes": (
        lambda: compared(lambda r: problem(r) * next(COUNT)),
        diffopt.RandomnessError,
        r"outer loss was .*, and \+1\.5e\+00 from there.* expected the same problem at every call; draw",
    ),
    "compare_zero": (
        lambda: compared(lambda r: 0 * problem(r)),
        diffopt.DisconnectedError,
        "is zero, expected one to compare with",
    ),
    "compare_nan": (
        lambda: compared(lambda r: problem(r) * float("nan")),
        diffopt.NonFiniteGradientError,
        "expected finite numbers",
    ),
    "check_directions": (
        lambda: diffopt.check(square, W, directions=0),
        diffopt.HyperparameterError,
        "directions is int 0, expected an integer",
    ),
    "check_vmap": (
        lambda: diffopt.check(square, W, vmap=1),
        diffopt.HyperparameterError,
        "vmap is int 1, expected True or F",
    ),
    "tasks_chunk": (
        lambda: diffopt.mean_over_tasks(square, torch.ones(2, 2), task_chunk=0),
        diffopt.HyperparameterError,
        "task_chunk is int 0, expected None or an integer >= 1",
    ),
}
ROWS: dict[str, Row] = {
    **{
        f"steps_{x}": Row("steps", partial(solve, steps=x), diffopt.StepsError, "steps is .*, expected an integer >= 0")
        for x in (-1, 1.5, True, "3", None)
    },
    **{
        name: Row(name.partition("_")[0], call, error, says, moves=name == "implicit_random")
        for name, (call, error, says) in OTHERS.items()
    },
}
