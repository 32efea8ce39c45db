"""What an estimator makes of a vector field, whose Jacobian is not symmetric."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffopt.errors import DiffoptError
from diffopt.reports import Finding
from diffopt.testing.estimator_case import EstimatorCase
from diffopt.testing.findings import at_most, decided
from diffopt.testing.gradients import CONVERGED
from diffopt.testing.problem import errors


def whirl(params: Sequence[Tensor], weights: Tensor, idle: Tensor, fixed: Any, inputs: Tensor) -> tuple[Tensor, ...]:
    """A field around the regression's, in which the params turn each other as well; it is no loss's gradient."""
    bias, shift, matrix = params
    pull = torch.sigmoid(weights)[fixed["order"]][:, None] * errors(params, fixed, inputs).tanh() / 3
    return (
        pull.sum(0) + 0.4 * bias + 0.5 * matrix[0].sin(),
        pull.sum() + 0.4 * shift - 0.6 * bias[0],
        inputs.T @ pull + 0.4 * matrix - 0.5 * bias + 0.7 * matrix.flip(0).tanh(),
    )


def vector_fields(case: EstimatorCase) -> Iterator[Finding]:
    """An estimator that is exact for a loss is so for a vector field, or refuses it."""
    if case.claims.exact == "never" or case.claims.random:
        return
    setting = replace(case.setting, loss=whirl, field=True)
    if case.claims.exact == "at the fixed point":
        setting = replace(setting, steps=CONVERGED, stepped=False)
    point = setting.point(4)
    claim = "exact for a vector field"
    fix = "check where V and its transpose are taken for one: they are for the second derivatives of a loss only"
    try:
        found = case.sample(setting, point)
    except DiffoptError as error:
        yield decided(claim, True, type(error).__name__, "that, or a DiffoptError", fix)
        return
    expected = case.expected(setting, point)
    yield at_most(claim, case.error(found, expected), case.limit(found, expected), fix)
