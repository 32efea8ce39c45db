"""``check_estimator``: everything an estimator claims, tested both ways."""

from __future__ import annotations

import torch

from diffopt.claims import Claims
from diffopt.errors import ConformanceError, EstimatorError
from diffopt.estimator import Estimator
from diffopt.testing import conduct, numbers, tasks
from diffopt.testing.problem import Setting
from diffopt.testing.report import Report, run
from diffopt.testing.rule import Rule
from diffopt.tree import describe

_CHECKS = (
    numbers.derivatives,
    numbers.steps,
    numbers.exactness,
    numbers.inputs,
    numbers.forms,
    numbers.linearity,
    numbers.leaf_order,
    tasks.tasks,
    conduct.repeatability,
    conduct.side_effects,
    conduct.random_losses,
    conduct.second_derivatives,
    conduct.second_order,
    conduct.reports,
    conduct.work,
)


def check_estimator(estimator: Estimator, *, claims: Claims | None = None, steps: int = 4) -> Report:
    if not isinstance(estimator, Estimator):
        raise EstimatorError(f"estimator is {describe(estimator)}, expected a diffopt.estimators object")
    setting = Setting(steps)
    rule = Rule(estimator, estimator.claims(steps) if claims is None else claims, setting, setting.point(0))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        try:
            rule.found  # noqa: B018
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            raise ConformanceError(
                f"{estimator} does not run on {steps} steps ({text}); pass other steps", text
            ) from error
        return run(repr(estimator), rule, _CHECKS)
