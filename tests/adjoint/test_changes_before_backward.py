"""What is changed in place between a solve and its backward pass is named; what is changed after it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ridge_by_hand import EXACT, assert_same, leaves, outer, solved, wanted
from torch import Tensor

import diffopt
from diffopt.estimators import Binomial, ESJacobian, FirstOrder, Implicit, Reptile, Truncated

CHANGES: dict[str, Callable[[Tensor, list[Tensor]], Any]] = {
    "an outer step": lambda end, inputs: stepped(torch.optim.SGD(inputs[:1], 0.1), inputs[0]),
    "an outer step of Adam": lambda end, inputs: stepped(torch.optim.Adam(inputs[:2], 0.1), inputs[1]),
    "a hyperparameter": lambda end, inputs: torch.no_grad()(inputs[2].mul_)(0.5),
    "the solution": lambda end, inputs: end.detach().add_(1),
}


def stepped(optimizer: torch.optim.Optimizer, leaf: Tensor) -> None:
    leaf.grad = torch.ones_like(leaf)
    optimizer.step()


ESTIMATORS: dict[str, Any] = {name: estimator for name, estimator in EXACT.items() if name != "unrolled"} | {
    "first_order": FirstOrder(),
    "reptile": Reptile(),
    "shortened": Truncated(1),
    "implicit": Implicit(),
    "one_order": Binomial(1),
    "differences": ESJacobian(4, 1e-4),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_change_between_solve_and_backward_is_named(name: str, change: str) -> None:
    inputs = leaves()
    end = solved(*inputs, estimator=ESTIMATORS[name])
    CHANGES[change](end, inputs)
    with pytest.raises(
        diffopt.InPlaceError, match=r"changed in place before the backward pass .*step\(\) before backw"
    ):
        end.sum().backward()


@pytest.mark.parametrize("name", EXACT)
def test_an_outer_step_after_backward_is_no_change_in_between(name: str) -> None:
    inputs = leaves()
    optimizer = torch.optim.SGD(inputs, lr=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        outer(solved(*inputs, estimator=EXACT[name])).backward()
        assert_same([x.grad for x in inputs], wanted())  # type: ignore[misc]
        optimizer.step()
