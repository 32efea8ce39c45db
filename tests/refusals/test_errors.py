"""What must not be refused: numbers that look like faults and are none."""

from __future__ import annotations

import numpy as np
import torch
from bad_row import pair, solve, square, tensor
from bad_trees import EYES, factors

from diffopt import SGD


def test_what_is_finite_is_not_refused() -> None:
    """A coordinate without influence, a step of size zero, a gradient of zero, no step at all."""
    assert torch.equal(solve(lambda p: p["a"].square().sum(), pair())["b"], pair()["b"])
    assert torch.equal(solve(optimizer=SGD(0.0)), tensor(1, 2))
    assert torch.equal(solve(square, tensor(0, 0)), tensor(0, 0))
    assert torch.equal(solve(steps=0), tensor(1, 2))


def test_numbers_of_numpy_are_numbers() -> None:
    for params in (tensor(1, 2), tensor(1)):
        assert torch.equal(solve(square, params, optimizer=SGD(np.float64(0.1))), solve(square, params))


def test_a_vector_takes_a_matrix_as_its_factor() -> None:
    assert torch.allclose(factors((0.5 * EYES[1],), (None, EYES[3]))["a"], tensor(0.9**3))
