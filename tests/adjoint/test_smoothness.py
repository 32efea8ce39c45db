"""Hypergradients beside differences: the errors are those of closed forms, and the three kinds of failure are told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffopt.adjoint.smoothness import smoothness

ONE = torch.ones(1, dtype=torch.float64)


def move() -> float:
    """The first random direction of a tensor of one number of size one."""
    return float(torch.randn(1, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def test_the_error_of_a_cube_is_that_of_its_third_derivative() -> None:
    """``((1 + hu)**3 - (1 - hu)**3) / 2h = 3u + h**2 u**3``."""
    found = smoothness(lambda x: x[0].pow(3).sum(), [ONE], [3 * ONE], 1)
    square = move() ** 2
    for size in (0.1, 0.01):
        expected = size**2 * square / (3 + size**2 * square)
        assert abs(found.errors[size] - expected) < 1e-9
    assert list(found.errors) == [0.1, 0.01]
    assert found.derivative is True
    assert found.error == found.errors[0.01]


def test_a_move_has_the_size_of_what_is_moved() -> None:
    seen: list[Tensor] = []

    def value(x: list[Tensor]) -> Tensor:
        seen.append(torch.cat(list(x)))
        return x[0].sum() + x[1].sum()

    leaves = [torch.full((2,), 1e3, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
    smoothness(value, leaves, [torch.ones_like(x) for x in leaves], 1)
    moved = (seen[0] - torch.cat(leaves)).abs()
    assert (moved[:2] > 1).all()
    assert 1e-3 < float(moved[2]) < 1


def test_an_entry_moves_by_its_own_size() -> None:
    """Numbers of two scales under a root; one at the edge of where it is defined."""
    x = torch.tensor([1e-4, 100.0, 0.0], dtype=torch.float64)
    found = smoothness(lambda x: x[0][:2].sqrt().sum(), [x], [torch.tensor([50.0, 0.05, 0.0]).double()], 2)
    assert found.error < 0.1
    assert found.derivative is True
    edge = smoothness(lambda x: (x[0] - 1 + 1e-7).sqrt().sum(), [ONE], [0.5 * 1e-7**-0.5 * ONE], 1)
    assert edge.undefined
    assert not found.undefined


@pytest.mark.parametrize("directions", [1, 3])
def test_a_wrong_derivative_is_told_from_a_rough_function(directions: int) -> None:
    wrong = smoothness(lambda x: x[0].pow(2).sum(), [ONE], [3 * ONE], directions)
    assert wrong.derivative is False
    assert abs(wrong.error - 1 / 3) < 1e-6
    rough = smoothness(
        lambda x: x[0].sum() + torch.sin(1e6 * x[0]).sum(), [ONE], [ONE + 1e6 * torch.cos(1e6 * ONE)], directions
    )
    assert rough.derivative is True
    assert rough.error > 0.9
    assert rough.errors[1e-8] < 0.01


def test_noise_does_not_settle() -> None:
    generator = torch.Generator().manual_seed(0)
    found = smoothness(lambda x: x[0].sum() + torch.rand((), generator=generator).double(), [ONE], [ONE], 3)
    assert found.derivative is None
    assert found.errors[1e-8] > 0.9


def test_what_round_off_can_make_is_neither_error_nor_agreement() -> None:
    """A derivative that is all but zero beside a large value, right or wrong."""
    for right in (1e-18, -1e-18, 0.0):
        found = smoothness(lambda x: 1e3 + 1e-18 * x[0].sum(), [ONE], [(right or 1e-17) * ONE], 3)
        assert (found.hidden, found.derivative, found.errors) == (True, None, {})
        assert found.error > 0.5


def test_no_influence_is_no_round_off() -> None:
    found = smoothness(lambda x: 0 * x[0].sum() + 1e3, [ONE], [0 * ONE], 3)
    assert found.error == 0
    assert found.derivative is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_a_large_value_does_not_make_a_wrong_derivative_right(dtype: torch.dtype, factor: float) -> None:
    """Half and twice the derivative are off by a half beside values of any size, until nothing can be told of it."""
    x, verdicts = torch.ones(1, dtype=dtype), []
    for offset in (0.0, 1e2, 1e5, 1e8, 1e15):
        found = smoothness(lambda x, offset=offset: offset + x[0].pow(2).sum(), [x], [factor * 2 * x], 2)
        verdicts.append(None if found.hidden else found.error)
        assert found.hidden or found.derivative in ((True,) if factor == 1 else (False, None))
    told = [error for error in verdicts if error is not None]
    assert len(told) == (4 if dtype == torch.float64 else 2)
    assert all(abs(error - (0 if factor == 1 else 0.5)) < 0.03 for error in told)
    assert verdicts[len(told) :] == [None] * (5 - len(told))


def test_a_move_that_is_rounded_to_none_says_nothing() -> None:
    x = torch.ones(1)
    found = smoothness(lambda x: x[0].pow(2).sum(), [x], [x], 1)
    assert 1e-8 not in found.errors
    assert found.derivative is not True


def test_a_value_that_is_not_finite_is_no_agreement() -> None:
    found = smoothness(lambda x: x[0].sum() / (x[0] - 1).abs().lt(0.05).all(), [ONE], [ONE], 1)
    assert 0.1 * abs(move()) > 0.05 > 0.01 * abs(move())
    assert found.errors[0.1] == float("inf")
    assert found.error < 1e-9


def test_single_precision_is_given_its_own_round_off() -> None:
    x = torch.ones(4)
    found = smoothness(lambda x: x[0].square().sum(), [x], [2 * x], 3)
    assert found.error < 1e-3
    assert found.derivative is True
