"""``all_finite`` against a look at every number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffopt.tensors.leaves import all_finite

SHAPES = [(), (1,), (5,), (3, 4), (2, 3, 2)]
BAD = [float("nan"), float("inf"), -float("inf")]


def some(count: int = 5, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPES[i % 5], generator=generator).to(dtype) for i in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_a_bad_number_is_found_wherever_it_is(count: int, dtype: torch.dtype) -> None:
    assert all_finite(some(count, dtype))
    for bad in BAD:
        for i in range(count):
            tensors = some(count, dtype)
            tensors[i].view(-1)[-1] = bad
            assert not all_finite(tensors)


def test_two_bad_numbers_do_not_cancel() -> None:
    first, second = some(2)
    first[()], second[0] = float("inf"), -float("inf")
    assert not all_finite([first, second])
    assert not all_finite([torch.tensor([float("inf"), -float("inf")])])


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_sum_that_overflows_is_no_bad_number(dtype: torch.dtype, count: int) -> None:
    """Within one tensor, and over all of them."""
    largest = torch.finfo(dtype).max
    assert all_finite([torch.full((3,), largest, dtype=dtype)] * count)
    assert all_finite([torch.tensor(largest, dtype=dtype)] * (2 * count))


def test_nothing_is_finite() -> None:
    assert all_finite([])
    assert all_finite([torch.ones(0)])


@pytest.mark.parametrize("bad", [1.0, *BAD])
def test_tensors_of_other_kinds(bad: float) -> None:
    """Such as record their history, are a module's, or belong to a transform."""
    x = torch.tensor([1.0, bad])
    expected = bad == 1.0
    with torch.enable_grad():
        assert all_finite([x.clone().requires_grad_() * 2]) is expected
    assert all_finite([torch.nn.Parameter(x), x]) is expected
    seen: list[bool] = []
    torch.func.vmap(lambda row: seen.append(all_finite([row, x])) or row)(x[:, None])
    torch.func.grad(lambda row: seen.append(all_finite([row, x])) or row.sum())(x)
    assert seen == [expected, expected]
