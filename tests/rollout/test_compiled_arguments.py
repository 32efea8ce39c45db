"""``compile=True`` with arguments and cotangents that are one tensor, zero, expanded, transposed: the plain numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import diffopt
from diffopt.estimators import Binomial, MultiStep, Reverse, Truncated

pytestmark = [pytest.mark.compiler, pytest.mark.usefixtures("_way")]


@pytest.fixture(params=["steps", pytest.param("whole", marks=pytest.mark.slow)])
def _way(request: pytest.FixtureRequest) -> None:
    """Steps compiled one by one, and solves traced as a whole."""
    if request.param == "steps":
        request.getfixturevalue("steps_alone")


STEPS, LR = 3, 0.07
ESTIMATORS = {"default": Reverse(), "checkpoints": Reverse(2), "truncated": Truncated(STEPS), "windows": MultiStep(1)}


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def of_two(p: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Not symmetric in anything that it is given."""
    return (a * p["u"].sin() + b * p["v"] ** 3 - 0.3).square().sum() + (p["u"] * p["v"]).sum()


def loop(loss: Callable[..., Tensor], p: dict[str, Tensor], *args: Any) -> dict[str, Tensor]:
    """Plain gradient descent on leaves that are told apart even if they start as one tensor."""
    p = {name: 1 * x for name, x in p.items()}
    for _ in range(STEPS):
        p = {name: x if x.requires_grad else x.detach().requires_grad_() for name, x in p.items()}
        found = torch.autograd.grad(loss(p, *args), list(p.values()), create_graph=True)
        p = {name: x - LR * g for (name, x), g in zip(p.items(), found, strict=True)}
    return p


def solved(loss: Callable[..., Tensor], p: dict[str, Tensor], *args: Any, **options: Any) -> dict[str, Tensor]:
    given = {"optimizer": diffopt.SGD(LR), "steps": STEPS, "compile": True, **options}
    return diffopt.solve(loss, p, *args, **given).params


def compared(run: Callable[..., Any], plain: Callable[..., Any], *leaves: Tensor) -> None:
    """The hypergradients of two ways to the same number, both with leaves of their own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "compile=True has no effect")
        warnings.filterwarnings("ignore", ".* is a new function at every call")
        inputs = [x.detach().clone().requires_grad_() for x in leaves]
        got = torch.autograd.grad(run(*inputs), inputs)
    inputs = [x.detach().clone().requires_grad_() for x in leaves]
    expected = torch.autograd.grad(plain(*inputs), inputs)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_two_leaves_that_start_at_one_tensor() -> None:
    """They differ after the first step."""
    a, b, start = tensor(1, -2), tensor(0.5, 3), tensor(0.2, 0.7)
    expected = loop(of_two, {"u": start, "v": start}, a, b)
    found = solved(of_two, {"u": start, "v": start}, a, b)
    for name in "uv":
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_the_hypergradient_of_two_leaves_that_start_at_one_tensor(estimator: Any) -> None:
    def total(run: Callable[..., dict[str, Tensor]], **options: Any) -> Callable[..., Tensor]:
        def outer(start: Tensor, a: Tensor, b: Tensor) -> Tensor:
            end = run(of_two, {"u": start, "v": start}, a, b, **options)
            return (end["u"] * tensor(1, 2)).sum() + (end["v"] ** 2).sum()

        return outer

    compared(total(solved, estimator=estimator), total(loop), tensor(0.2, 0.7), tensor(1, -2), tensor(0.5, 3))


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_arguments_that_are_one_tensor(estimator: Any) -> None:
    def total(run: Callable[..., dict[str, Tensor]], **options: Any) -> Callable[..., Tensor]:
        def outer(u: Tensor, a: Tensor) -> Tensor:
            end = run(of_two, {"u": u, "v": 2 * u}, a, a, **options)
            return end["u"].sum() - (end["v"] ** 3).sum()

        return outer

    compared(total(solved, estimator=estimator), total(loop), tensor(0.2, 0.7), tensor(1, -2))


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
def test_an_argument_that_is_also_the_start(estimator: Any) -> None:
    def total(run: Callable[..., dict[str, Tensor]], **options: Any) -> Callable[..., Tensor]:
        def outer(u: Tensor, b: Tensor) -> Tensor:
            end = run(of_two, {"u": u, "v": b}, u, b, **options)
            return end["u"].sum() - (end["v"] ** 3).sum()

        return outer

    compared(total(solved, estimator=estimator), total(loop), tensor(0.2, 0.7), tensor(1, -2))


def test_arguments_that_were_one_tensor_and_are_no_longer() -> None:
    """What was compiled for the one serves the other."""
    u, a, b = tensor(0.2, 0.7), tensor(0.5, -0.4), tensor(0.3, 0.6)

    def loss(p: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        return of_two(p, a, b)

    for args in ((a, a), (a, b), (b, b)):
        for start in ({"u": u, "v": u}, {"u": u, "v": a}):
            found, expected = solved(loss, start, *args), loop(loss, start, *args)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------------------ cotangents

OUTER: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "equal": lambda end: (end["u"] + end["v"]).mul(tensor(1, 3)).sum(),
    "one number": lambda end: end["u"].sum() + end["v"].sum(),
    "zero": lambda end: 0 * end["u"].sum() + end["v"].square().sum(),
    "none": lambda end: end["v"].square().sum(),
    "opposite": lambda end: (end["u"] - end["v"]).mul(tensor(1, 3)).sum(),
    "of one entry": lambda end: end["u"][1] + end["v"][0],
    "different": lambda end: end["u"].prod() + end["v"].exp().sum(),
}


def shared_loss(p: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    return of_two(p, a, b)


COMPILED_ANEW = [(Reverse(), "equal"), (Reverse(), "zero"), (Reverse(), "different"), (Reverse(2), "equal")]
SLOWER = [pytest.param(Reverse(2), first, marks=pytest.mark.slow) for first in ("zero", "different")]


@pytest.mark.parametrize(("estimator", "first"), [*COMPILED_ANEW, *SLOWER], ids=str)
def test_cotangents_of_all_kinds_after_a_first_of_another(estimator: Any, first: str) -> None:
    """The pullback is compiled at the first of them."""

    def loss(p: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        return of_two(p, a, b)

    leaves = tensor(0.2, 0.7), tensor(0.1, -0.4), tensor(1, -2), tensor(0.5, 3)
    for outer in (OUTER[first], *OUTER.values()):
        compared(
            lambda u, v, a, b, outer=outer: outer(solved(loss, {"u": u, "v": v}, a, b, estimator=estimator)),
            lambda u, v, a, b, outer=outer: outer(loop(loss, {"u": u, "v": v}, a, b)),
            *leaves,
        )


MATRIX_OUTER: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda w: (w.T @ w.new_tensor([[1.0, 2], [3, 5]])).square().sum(),
    "expanded": lambda w: w.sum(0)[0] * w.sum(),
    "a row of the whole": lambda w: (w[1] * w.new_tensor([1.0, 2, 3])).sum(),
    "strided": lambda w: w[:, ::2].square().sum(),
    "a transpose as it lies in memory": lambda w: (w.T.contiguous() * torch.arange(6.0).view(3, 2)).sum(),
}


def of_matrix(p: dict[str, Tensor], a: Tensor) -> Tensor:
    return (p["w"].tanh() @ a - 1).square().sum() + 0.1 * p["w"].pow(4).sum()


@pytest.mark.parametrize("outer", MATRIX_OUTER.values(), ids=MATRIX_OUTER)
def test_cotangents_laid_out_in_other_ways(outer: Any) -> None:
    w, a = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3), torch.arange(9.0, dtype=torch.float64).view(3, 3)
    compared(
        lambda w, a: outer(solved(of_matrix, {"w": w}, a / 9)["w"]),
        lambda w, a: outer(loop(of_matrix, {"w": w}, a / 9)["w"]),
        w,
        a,
    )


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda a: a.T,
    "expanded": lambda a: a[:1].expand(3, 3),
    "strided": lambda a: torch.cat([a, a], 1)[:, ::2],
    "contiguous": lambda a: a * 1,
}


def test_arguments_laid_out_in_other_ways_than_those_compiled_for() -> None:
    w, a = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3), torch.linspace(0, 1, 9, dtype=torch.float64)
    for view in (LAYOUTS["expanded"], *LAYOUTS.values()):
        compared(
            lambda w, a, view=view: solved(of_matrix, {"w": w.T.contiguous().T}, view(a.view(3, 3)))["w"].prod(),
            lambda w, a, view=view: loop(of_matrix, {"w": w}, view(a.view(3, 3)))["w"].prod(),
            w,
            a,
        )


# ---------------------------------------------------------------------------------------------- tasks, other estimators


SLOWER_DIMS = [pytest.param(dims, marks=pytest.mark.slow) for dims in ((None, 0, 0), (0, None, None))]


@pytest.mark.parametrize("dims", [(0, 0, None), *SLOWER_DIMS], ids=str)
def test_tasks_that_share_what_they_start_at(dims: tuple[int | None, ...]) -> None:
    def total(run: Callable[..., dict[str, Tensor]]) -> Callable[..., Tensor]:
        def of_task(u: Tensor, a: Tensor, b: Tensor) -> Tensor:
            end = run(of_two, {"u": u, "v": u}, a, b)
            return (end["u"] + end["v"]).sum()

        return of_task

    def given(x: Tensor, dim: int | None) -> Tensor:
        return x if dim is None else torch.stack([x, 0.5 * x])

    def by_loop(*args: Tensor) -> Tensor:
        rows = [[x if dim is None else x[i] for x, dim in zip(args, dims, strict=True)] for i in range(2)]
        return torch.stack([total(loop)(*row) for row in rows]).sum()

    leaves = [given(x, dim) for x, dim in zip((tensor(0.2, 0.7), tensor(1, -2), tensor(0.5, 3)), dims, strict=True)]
    compared(lambda *args: vmap(total(solved), in_dims=dims)(*args).sum(), by_loop, *leaves)


def test_a_biased_estimator_of_leaves_that_start_at_one_tensor() -> None:
    args = tensor(0.2, 0.7), tensor(1, -2), tensor(0.5, 3)
    for estimator in (Binomial(1), Truncated(1)):

        def run(u: Tensor, a: Tensor, b: Tensor, *, compile: bool, estimator: Any = estimator) -> Tensor:
            end = solved(of_two, {"u": u, "v": u}, a, b, estimator=estimator, compile=compile)
            return (end["u"] + end["v"]).sum()

        compared(lambda *x, run=run: run(*x, compile=True), lambda *x, run=run: run(*x, compile=False), *args)


# ------------------------------------------------------------------------------------------------ sparse arguments

SPARSE: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": lambda a: a.to_sparse(),
    "csr": lambda a: a.to_sparse_csr(),
    "csc": lambda a: a.to_sparse_csc(),
}


@pytest.mark.filterwarnings("ignore:Sparse")  # torch's, of its beta
@pytest.mark.parametrize("layout", SPARSE)
def test_a_sparse_argument_runs_without_and_is_right(layout: str) -> None:
    matrix = torch.tensor([[0.0, 1, 0], [2, 0, 0]], dtype=torch.float64)

    def loss(p: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        return ((a @ p["w"]).tanh() - b).square().sum()

    def run(a: Tensor, **options: Any) -> tuple[Tensor, ...]:
        inputs = [x.requires_grad_() for x in (tensor(0.3, -0.2, 0.5), tensor(1, -1))]
        end = solved(loss, {"w": inputs[0]}, a, inputs[1], **options)["w"]
        return torch.autograd.grad(end.pow(3).sum(), inputs)

    with pytest.warns(diffopt.CompileWarning, match=r"compile=True has no effect: .* is sparse"):
        found = run(SPARSE[layout](matrix))
    torch.testing.assert_close(found, run(matrix, compile=False), rtol=1e-12, atol=0)
