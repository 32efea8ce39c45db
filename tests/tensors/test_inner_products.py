"""Inner products and norms of stacked problems, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffopt.tensors.leaves import Leaves
from diffopt.tensors.tasks import Tasks

HALF = [torch.float16, torch.bfloat16]
SHAPES = [(), (3,), (2, 4)]


def leaves(dtype: torch.dtype, axes: int, size: float) -> Leaves:
    """Random leaves of numbers near ``size``, each under ``axes`` axes of tasks."""
    generator = torch.Generator().manual_seed(axes)
    tasks = (2, 3)[:axes]
    return Leaves(
        [
            (size * (1 + torch.rand(tasks + shape, generator=generator, dtype=torch.float64))).to(dtype)
            for shape in SHAPES
        ]
    )


def expected(a: Leaves, b: Leaves, axes: int) -> Tensor:
    one, other = (
        torch.cat([x.double().flatten(axes) if x.ndim > axes else x.double()[..., None] for x in part], -1)
        for part in (a, b)
    )
    return (one * other).sum(-1)


@pytest.mark.parametrize("axes", [0, 1, 2])
@pytest.mark.parametrize("size", [1e-5, 1.0, 300.0], ids=["vanish", "fit", "overflow"])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_products_are_those_of_double_precision(dtype: torch.dtype, size: float, axes: int) -> None:
    """Of half-precision numbers, whose squares may be none, to single precision: 12 products, each rounded once."""
    a, b, tasks = leaves(dtype, axes, size), leaves(dtype, axes, 2 * size), Tasks(axes)
    wide = torch.promote_types(dtype, torch.float32)
    found, rtol = tasks.dot(a, b), 16 * torch.finfo(wide).eps
    assert found.dtype == wide
    assert found.shape == (2, 3)[:axes]
    torch.testing.assert_close(found.double(), expected(a, b, axes), rtol=rtol, atol=0)
    torch.testing.assert_close(tasks.norm(a).double(), expected(a, a, axes).sqrt(), rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", HALF)
def test_many_small_products_are_not_lost_beside_a_large_one(dtype: torch.dtype) -> None:
    """One of 64 and 4,096 of 1 / 64: in half precision a sum that has reached 64 takes up no more."""
    x = Leaves([torch.tensor([8.0], dtype=dtype), torch.full((4096,), 1 / 8, dtype=dtype)])
    assert float(Tasks(0).dot(x, x)) == 128
