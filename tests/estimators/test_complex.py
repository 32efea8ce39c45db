"""Complex arguments of an inner loss: torch's convention, real part's derivative plus i times the imaginary part's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from estimator_names import exact
from torch import Tensor
from torch.func import grad, vmap

import diffopt
from diffopt.estimators import Binomial, ESJacobian, Estimator, Implicit, Krylov, Truncated

STEPS, LR = 4, 0.15
EXACT: dict[str, Estimator] = {
    **exact(STEPS, "default", "graph", "states", "sqrt", "forward", "forward in chunks", "truncated at all"),
    **exact(STEPS, "binomial of all", "krylov of all", "window of one", "unrolled"),
}
ROUND_OFF = 1e-10


def given(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Real params, a complex matrix, complex targets."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(3, dtype=torch.float64, generator=generator)
    a = torch.randn(4, 3, dtype=torch.complex128, generator=generator)
    return w, a, torch.randn(4, dtype=torch.complex128, generator=generator)


def squared(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return (a @ w.to(a.dtype) - b).abs().square().mean() + 0.05 * w.pow(4).sum()


def phases(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A sum of waves: its derivative by the real part is not that by the imaginary one."""
    return (torch.exp(0.3j * a) @ w.to(a.dtype) + b * b).abs().square().mean() + 0.05 * w.pow(4).sum()


def spectrum(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A spectrum, read by its parts."""
    rows = torch.fft.ifft(a, dim=0)
    return (rows.real @ w - b.imag).square().mean() + (rows.imag @ w.sin() - b.real).square().mean()


def conjugated(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return squared(w, a.conj() * 0.7, b.conj()) + (a.mH @ b).real @ w.tanh()


LOSSES: dict[str, Callable[..., Tensor]] = {loss.__name__: loss for loss in (squared, phases, spectrum, conjugated)}


def loop(loss: Callable[..., Tensor], w: Tensor, *args: Tensor) -> Tensor:
    for _ in range(STEPS):
        w = w if w.requires_grad else w.detach().requires_grad_()
        w = w - LR * torch.autograd.grad(loss(w, *args), w, create_graph=True)[0]
    return w


def solved(loss: Callable[..., Tensor], estimator: Any, w: Tensor, *args: Tensor) -> Tensor:
    return diffopt.solve(loss, w, *args, optimizer=diffopt.SGD(LR), steps=STEPS, estimator=estimator).params


def error(got: Any, expected: Any) -> float:
    for one, other in zip(got, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
    worst = [(one - other).abs().max() / other.abs().max() for one, other in zip(got, expected, strict=True)]
    return float(torch.stack(worst).max())


def hypergradient(run: Callable[..., Tensor], leaves: Any) -> tuple[Tensor, ...]:
    inputs = [x.detach().requires_grad_() for x in leaves]
    return torch.autograd.grad(run(*inputs).pow(3).sum(), inputs)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("estimator", EXACT.values(), ids=EXACT)
def test_exact_estimators_are_the_plain_loop(estimator: Estimator, loss: Callable[..., Tensor]) -> None:
    leaves = given()
    expected = hypergradient(lambda *x: loop(loss, *x), leaves)
    assert all(bool(x.real.any() and (not x.is_complex() or x.imag.any())) for x in expected)
    assert error(hypergradient(lambda *x: solved(loss, estimator, *x), leaves), expected) < ROUND_OFF


@pytest.mark.parametrize("estimator", EXACT.values(), ids=EXACT)
def test_vmap_and_func_grad(estimator: Estimator) -> None:
    tasks = [given(seed) for seed in range(3)]
    stacked = [torch.stack(column) for column in zip(*tasks, strict=True)]
    expected = [hypergradient(lambda *x: loop(phases, *x), task) for task in tasks]
    columns = [torch.stack(column) for column in zip(*expected, strict=True)]
    each = grad(lambda *x: solved(phases, estimator, *x).pow(3).sum(), argnums=(0, 1, 2))
    assert error(vmap(each)(*stacked), columns) < ROUND_OFF
    assert error(hypergradient(vmap(lambda *x: solved(phases, estimator, *x)), stacked), columns) < ROUND_OFF


@pytest.mark.parametrize("estimator", EXACT.values(), ids=EXACT)
def test_a_complex_argument_that_tasks_share(estimator: Estimator) -> None:
    w, a, b = given()
    starts = torch.stack([w, 2 * w, -w])

    def total(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda starts, a, b: torch.stack([run(start, a, b) for start in starts])

    expected = hypergradient(total(lambda *x: loop(phases, *x)), (starts, a, b))
    shared = vmap(lambda *x: solved(phases, estimator, *x), in_dims=(0, None, None))
    assert error(hypergradient(shared, (starts, a, b)), expected) < ROUND_OFF


@pytest.mark.parametrize("estimator", EXACT.values(), ids=EXACT)
def test_complex_batches_and_a_conjugate_argument(estimator: Estimator) -> None:
    w, a, b = given()
    a, b = a.conj(), torch.stack([b * (1 + 0.2j * t) for t in range(STEPS)])

    def by_loop(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        for t in range(STEPS):
            w = w - LR * torch.autograd.grad(squared(w, a, b[t]), w, create_graph=True)[0]
        return w

    def by_solve(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        options = {"optimizer": diffopt.SGD(LR), "steps": STEPS, "estimator": estimator}
        return diffopt.solve(squared, w, a, batches=b, **options).params

    assert error(hypergradient(by_solve, (w, a, b)), hypergradient(by_loop, (w, a, b))) < ROUND_OFF


# ------------------------------------------------------------------------------------------------ by differences


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("antithetic", [True, False], ids=["central", "forward"])
def test_es_jacobian_in_all_directions_is_the_plain_loop(antithetic: bool, loss: Callable[..., Tensor]) -> None:
    """With as many directions as there are real numbers only the difference's own error is left."""
    leaves = given()
    numbers = sum(x.numel() * (2 if x.is_complex() else 1) for x in leaves)
    estimator = ESJacobian(numbers, 1e-5 if antithetic else 1e-7, antithetic=antithetic)
    expected = hypergradient(lambda *x: loop(loss, *x), leaves)
    assert error(hypergradient(lambda *x: solved(loss, estimator, *x), leaves), expected) < (
        1e-6 if antithetic else 1e-4
    )


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_es_jacobian_of_tasks_in_all_directions_is_the_plain_loop(shared: bool) -> None:
    w, a, b = given()
    starts, matrices = torch.stack([w, 2 * w]), a if shared else torch.stack([a, 1j * a])
    estimator, dims = ESJacobian(80, 1e-5), (0, None if shared else 0, None)

    def by_loop(starts: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([loop(phases, starts[i], a if shared else a[i], b) for i in range(2)])

    expected = hypergradient(by_loop, (starts, matrices, b))
    got = hypergradient(vmap(lambda *x: solved(phases, estimator, *x), in_dims=dims), (starts, matrices, b))
    assert error(got, expected) < 1e-6


@pytest.mark.parametrize("sampling", ["gaussian", "rademacher", "sphere"])
def test_es_jacobian_with_many_directions_comes_near(sampling: Any) -> None:
    """The squared relative error is at most (p + 1) / Q in the mean, p = 35: here below a tenth by far."""
    leaves = given()
    estimator = ESJacobian(20_000, 1e-4, sampling, generator=torch.Generator().manual_seed(1))
    expected = hypergradient(lambda *x: loop(phases, *x), leaves)
    got = hypergradient(lambda *x: solved(phases, estimator, *x), leaves)
    size = sum(float(x.abs().square().sum()) for x in expected) ** 0.5
    off = sum(float((x - y).abs().square().sum()) for x, y in zip(got, expected, strict=True)) ** 0.5
    assert off < 0.2 * size


@pytest.mark.parametrize("estimator", [Implicit(), Krylov(2), Binomial(2), Truncated(2)], ids=str)
def test_biased_estimators_see_the_imaginary_part_as_they_see_the_real_one(estimator: Estimator) -> None:
    """The same problem written in real numbers has the same estimate."""
    leaves = given()

    def in_real_numbers(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return phases(w, torch.view_as_complex(a), torch.view_as_complex(b))

    options = {"optimizer": diffopt.SGD(LR), "steps": 600 if isinstance(estimator, Implicit) else STEPS}
    found = []
    for loss, args in ((phases, leaves[1:]), (in_real_numbers, [torch.view_as_real(x) for x in leaves[1:]])):
        inputs = [x.detach().requires_grad_() for x in args]
        end = diffopt.solve(loss, leaves[0], *inputs, estimator=estimator, **options).params
        found.append(torch.autograd.grad(end.pow(3).sum(), inputs))
    assert error(found[0], [torch.view_as_complex(x) for x in found[1]]) < 1e-9
