"""The backward pass of a solve under unusual modes, and with unusual tensors: right, or a typed error.

The oracle is a plain loop unrolled by autograd, differentiated in the ordinary way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor
from torch.func import hessian, jvp

import diffopt
from diffopt.estimators import (
    Binomial,
    ESJacobian,
    FirstOrder,
    ForwardMode,
    Implicit,
    Krylov,
    MultiStep,
    Reptile,
    Reverse,
    Truncated,
    Unrolled,
)

STEPS, LR = 3, 0.1
EXACT: dict[str, Any] = {
    "default": Reverse(),
    "graph": Reverse("graph"),
    "every_state": Reverse(1),
    "sqrt": Reverse("sqrt"),
    "truncated": Truncated(STEPS, 1),
    "forward": ForwardMode(),
    "binomial": Binomial(STEPS),
    "krylov": Krylov(STEPS),
    "one_window": MultiStep(1),
}
BIASED: dict[str, Any] = {
    "first_order": FirstOrder(),
    "reptile": Reptile(),
    "shortened": Truncated(1),
    "implicit": Implicit(),
    "one_order": Binomial(1),
    "differences": ESJacobian(4, 1e-4),
}
Loss = Callable[..., Tensor]


def numbers(*values: Any) -> Tensor:
    return torch.tensor(
        values, dtype=torch.complex128 if any(isinstance(x, complex) for x in values) else torch.float64
    )


W, A = numbers(0.5, -0.3), numbers(1.0, 2.0)


def loss(w: Tensor, a: Tensor) -> Tensor:
    return 0.5 * (w - a).square().sum() + 0.1 * w.pow(4).sum()


def outer(w: Tensor) -> Tensor:
    return w.pow(3).sum()


def inputs(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def unrolled(loss: Loss, *tensors: Tensor, outer: Callable[[Tensor], Tensor] = outer) -> list[Tensor]:
    given = inputs(*tensors)
    now = given[0]
    for _ in range(STEPS):
        now = now - LR * torch.autograd.grad(loss(now, *given[1:]), now, create_graph=True)[0]
    return list(torch.autograd.grad(outer(now), given))


def solved(loss: Loss, given: list[Tensor], rule: Any) -> Tensor:
    return diffopt.solve(loss, *given, optimizer=diffopt.SGD(LR), steps=STEPS, estimator=rule).params


def hypergradient(loss: Loss, rule: Any, *tensors: Tensor) -> list[Tensor]:
    given = inputs(*tensors)
    return list(torch.autograd.grad(outer(solved(loss, given, rule)), given))


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("rule", {**EXACT, "unrolled": Unrolled()})
def test_a_backward_pass_in_inference_mode_is_that_without(rule: str) -> None:
    given = inputs(W, A)
    end = outer(solved(loss, given, {**EXACT, "unrolled": Unrolled()}[rule]))
    with torch.inference_mode():
        got = torch.autograd.grad(end, given)
    assert_same([x.clone() for x in got], unrolled(loss, W, A))


@pytest.mark.parametrize("rule", [rule for rule in BIASED if rule != "differences"])
def test_so_it_is_under_rules_that_are_not_exact(rule: str) -> None:
    given = inputs(W, A)
    end = outer(solved(loss, given, BIASED[rule]))
    with torch.inference_mode():
        got = torch.autograd.grad(end, given)
    assert_same([x.clone() for x in got], hypergradient(loss, BIASED[rule], W, A))


def test_a_cotangent_made_in_inference_mode_is_taken() -> None:
    with torch.inference_mode():
        cotangent = numbers(1.0, -2.0)
    for rule in EXACT.values():
        given = inputs(W, A)
        got = torch.autograd.grad(solved(loss, given, rule), given, cotangent)
        assert_same(list(got), unrolled(loss, W, A, outer=lambda w: w[0] - 2 * w[1]))


@pytest.mark.parametrize("rule", {**EXACT, **BIASED})
def test_a_batch_of_gradients_is_that_of_a_loop(rule: str) -> None:
    """``is_grads_batched``, by which ``torch.autograd.functional.jacobian(vectorize=True)`` works."""
    estimator, rows = {**EXACT, **BIASED}[rule], torch.eye(2, dtype=torch.float64)
    given = inputs(W, A)
    if rule == "differences":  # whose directions are other ones at every call
        got = torch.autograd.grad(solved(loss, given, estimator), given, rows, is_grads_batched=True)
        assert [x.shape for x in got] == [(2, 2), (2, 2)]
        return
    end = solved(loss, given, estimator)
    got = torch.autograd.grad(end, given, rows, is_grads_batched=True)
    for i, row in enumerate(rows):
        given = inputs(W, A)
        expected = torch.autograd.grad(solved(loss, given, estimator), given, row)
        assert_same([x[i] for x in got], list(expected))
    jacobian = torch.autograd.functional.jacobian(lambda w: solved(loss, [w, A], estimator), W.clone(), vectorize=True)
    assert_same([jacobian], [got[0]])


@pytest.mark.parametrize("rule", {**EXACT, **BIASED})
@pytest.mark.parametrize("changed", ["params", "argument", "solution"])
def test_a_change_between_solve_and_backward_is_refused(rule: str, changed: str) -> None:
    given = inputs(W, A)
    end = solved(loss, given, {**EXACT, **BIASED}[rule])
    value = end.sum()  # which needs nothing of the solution itself
    with torch.no_grad():
        {"params": given[0], "argument": given[1], "solution": end}[changed].add_(1)
    with pytest.raises(
        diffopt.InPlaceError, match=r"changed in place before the backward pass.*outer optimizer's step"
    ):
        torch.autograd.grad(value, given)


COMPLEX: dict[str, Loss] = {
    "modulus": lambda w, z: 0.3 * (z * w - 1).abs().square().sum() + 0.1 * w.pow(4).sum(),
    "parts": lambda w, z: (w * z.real).sum().square() + (w.pow(2) * z.imag).sum() + w.pow(4).sum(),
    "of_one": lambda w, z: (w * (z.conj() * z[0]).imag).sum() + 0.5 * w.square().sum() + 0.1 * w.pow(4).sum(),
}


@pytest.mark.parametrize("name", COMPLEX)
@pytest.mark.parametrize("rule", {**EXACT, "forward_in_chunks": ForwardMode(chunk_size=1), "unrolled": Unrolled()})
def test_complex_arguments_have_both_their_parts(rule: str, name: str) -> None:
    estimator = {**EXACT, "forward_in_chunks": ForwardMode(chunk_size=1), "unrolled": Unrolled()}[rule]
    z = numbers(1 + 2j, 0.5 - 1j)
    assert_same(hypergradient(COMPLEX[name], estimator, W, z), unrolled(COMPLEX[name], W, z))


def with_hessian(w: Tensor, a: Tensor) -> Tensor:
    return loss(w, a) + 0.01 * hessian(lambda x: (x.pow(4) * a[0]).sum())(w).diagonal().sum()


def with_tangent(w: Tensor, a: Tensor) -> Tensor:
    return loss(w, a) + 0.1 * jvp(lambda x: (x.pow(3) * a[0]).sum(), (w,), (torch.ones_like(w),))[1]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("forward", [with_hessian, with_tangent])
@pytest.mark.parametrize("rule", EXACT)
def test_forward_mode_inside_a_loss_is_right(rule: str, forward: Loss) -> None:
    """Torch saves tensors for it that have no storage."""
    assert_same(hypergradient(forward, EXACT[rule], W, A), unrolled(forward, W, A))


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
    given = [Wrapped(x.clone()) if i in which else x.clone() for i, x in enumerate((W, A))]
    for x in given:
        x.requires_grad_()
    got = torch.autograd.grad(outer(solved(loss, given, EXACT[rule])), given)
    assert_same([x.inner if isinstance(x, Wrapped) else x for x in got], unrolled(loss, W, A))


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
@pytest.mark.parametrize("rule", {**EXACT, "differences": BIASED["differences"]})
def test_distributed_tensors_are_right_or_refused(mesh: Any, rule: str, which: tuple[int, ...]) -> None:
    tensor = pytest.importorskip("torch.distributed.tensor")
    given = [
        (tensor.distribute_tensor(x.clone(), mesh, [tensor.Shard(0)]) if i in which else x.clone()).detach()
        for i, x in enumerate((W, A))
    ]
    for x in given:
        x.requires_grad_()
    estimator = {**EXACT, **BIASED}[rule]
    if which != (0, 1) or rule in ("forward", "differences"):
        with pytest.raises(
            diffopt.DeviceError, match="computes with a DTensor and an ordinary tensor at once, expected"
        ):
            torch.autograd.grad(outer(solved(loss, given, estimator)), given)
    else:
        got = torch.autograd.grad(outer(solved(loss, given, estimator)), given)
        assert_same([x.full_tensor() for x in got], unrolled(loss, W, A))


def test_a_gradient_that_is_not_finite_is_refused_under_plain_unrolling_too() -> None:
    """The loss is finite, and its second derivative is infinite at zero."""

    def kinked(w: Tensor, a: Tensor) -> Tensor:
        return (w.square() + a.square()).sqrt().sum()

    for rule in (Unrolled(), Reverse(), Reverse(1)):
        given = inputs(W, torch.zeros(2, dtype=torch.float64))
        end = solved(lambda w, a: kinked(w, 1 + a) + a.abs().sqrt().sum() * w.sum(), given, rule)
        with pytest.raises(diffopt.NonFiniteGradientError, match="is NaN or infinite"):
            torch.autograd.grad(end.sum(), given)
