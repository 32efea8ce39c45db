"""Params and arguments that are subclasses of tensors: the numbers of a plain loop, or a typed error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from ridge_by_hand import EXACT, STEPS, assert_same
from torch import Tensor

import diffopt
from diffopt.estimators import ESJacobian

LR = 0.1
RULES: dict[str, Any] = {**EXACT, "differences": ESJacobian(4, 1e-4)}
W, A = (torch.tensor(values, dtype=torch.float64) for values in ([0.5, -0.3], [1.0, 2.0]))


def loss(w: Tensor, a: Tensor) -> Tensor:
    """Reads nothing but its arguments: a captured tensor would be of another class."""
    return 0.5 * (w - a).square().sum() + 0.1 * w.pow(4).sum()


def outer(w: Tensor) -> Tensor:
    return w.pow(3).sum()


def solved(given: list[Tensor], rule: Any) -> Tensor:
    return diffopt.solve(loss, *given, optimizer=diffopt.SGD(LR), steps=STEPS, estimator=rule).params


def by_hand() -> list[Tensor]:
    w, a = given = [x.clone().requires_grad_() for x in (W, A)]
    for _ in range(STEPS):
        w = w - LR * torch.autograd.grad(loss(w, a), w, create_graph=True)[0]
    return list(torch.autograd.grad(outer(w), given))


class Wrapped(Tensor):
    """A tensor that holds another one and has no storage of its own."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        made.inner = inner.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(x: Any) -> Any:
            if isinstance(x, list | tuple):
                return type(x)(plain(held) for held in x)
            return x.inner if isinstance(x, Wrapped) else x

        def wrapped(x: Any) -> Any:
            if isinstance(x, list | tuple):
                return type(x)(wrapped(held) for held in x)
            return Wrapped(x) if isinstance(x, Tensor) else x

        return wrapped(func(*plain(args), **{key: plain(x) for key, x in (kwargs or {}).items()}))


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("rule", EXACT)
def test_subclasses_of_tensors_are_right(rule: str, which: tuple[int, ...]) -> None:
    given = [(Wrapped(x) if i in which else x).detach().requires_grad_() for i, x in enumerate((W, A))]
    got = torch.autograd.grad(outer(solved(given, EXACT[rule])), given)
    assert_same([x.inner if isinstance(x, Wrapped) else x for x in got], by_hand())


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of this process alone."""
    if sys.platform == "win32" or not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")
    store: Path = tmp_path_factory.mktemp("store") / "file"
    torch.distributed.init_process_group("gloo", init_method=store.as_uri(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("which", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize("rule", RULES)
def test_distributed_tensors_are_right_or_refused(mesh: Any, rule: str, which: tuple[int, ...]) -> None:
    tensor = pytest.importorskip("torch.distributed.tensor")
    shares = [tensor.distribute_tensor(x.clone(), mesh, [tensor.Shard(0)]) for x in (W, A)]
    given = [(shares[i] if i in which else x).detach().requires_grad_() for i, x in enumerate((W, A))]
    estimator = RULES[rule]
    if which != (0, 1) or rule == "differences":
        with pytest.raises(
            diffopt.DeviceError, match="computes with a DTensor and an ordinary tensor at once, expected"
        ):
            torch.autograd.grad(outer(solved(given, estimator)), given)
    else:
        got = torch.autograd.grad(outer(solved(given, estimator)), given)
        assert_same([x.full_tensor() for x in got], by_hand())
