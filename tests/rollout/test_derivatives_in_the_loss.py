"""Losses that differentiate by themselves: by ``torch.func``, by autograd in their own tensors or their arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from estimator_names import exact
from limits import sampled
from ridge_by_hand import assert_same
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

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

# torch's own, where it is first asked for a derivative in forward mode
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
STEPS, LR, WIDTH = 3, 0.05, 4
EXACT: dict[str, Any] = {
    **exact(STEPS, "default", "graph", "states", "every second", "sqrt", "forward", "forward in chunks"),
    **exact(STEPS, "truncated at all", "binomial of all", "binomial in chunks", "krylov of all", "window of one"),
    **exact(STEPS, "unrolled"),
}


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    """The params, the points at which the loss differentiates, and a learned weight."""
    generator = torch.Generator().manual_seed(2)
    w, x = (torch.randn(size, dtype=torch.float64, generator=generator) for size in (WIDTH, (5, 2)))
    return w, x, torch.tensor(0.7, dtype=torch.float64)


def model(w: Tensor, x: Tensor) -> Tensor:
    """A function of one point ``[2]``."""
    return torch.tanh(x @ w.view(2, 2)).pow(3).sum() + (x * w[:2]).sin().sum()


def laplacian(w: Tensor, x: Tensor, c: Tensor) -> Tensor:
    traces = torch.stack([hessian(lambda z: model(w, z))(z).trace() for z in x])
    return (traces - c).square().mean() + 0.1 * w.square().sum()


def laplacian_by_hand(w: Tensor, x: Tensor, c: Tensor) -> Tensor:
    """The same by autograd alone."""
    traces = []
    for z in x:
        z = z.detach().requires_grad_() if not z.requires_grad else z
        (slope,) = torch.autograd.grad(model(w, z), z, create_graph=True)
        rows = [torch.autograd.grad(slope[i], z, create_graph=True)[0][i] for i in range(2)]
        traces.append(rows[0] + rows[1])
    return (torch.stack(traces) - c).square().mean() + 0.1 * w.square().sum()


def by_jacfwd(w: Tensor, x: Tensor, c: Tensor) -> Tensor:
    field = jacfwd(lambda z: torch.tanh(z @ w.view(2, 2)))(x[0])
    return (field.square().sum() - c).square() + 0.1 * w.pow(4).sum()


def by_jacrev(w: Tensor, x: Tensor, c: Tensor) -> Tensor:
    field = jacrev(lambda z: torch.tanh(z @ w.view(2, 2)))(x[0])
    return (field.square().sum() - c).square() + 0.1 * w.pow(4).sum()


def jacobian_by_hand(w: Tensor, x: Tensor, c: Tensor) -> Tensor:
    matrix = w.view(2, 2)
    field = (1 - torch.tanh(x[0] @ matrix).square())[:, None] * matrix.T
    return (field.square().sum() - c).square() + 0.1 * w.pow(4).sum()


def by_jvp(w: Tensor, x: Tensor, c: Tensor) -> Tensor:
    value, rate = jvp(lambda w: torch.tanh(x @ w.view(2, 2)), (w,), (w.cos(),))
    return (value - 0.3).square().mean() + c * rate.square().mean()


def jvp_by_hand(w: Tensor, x: Tensor, c: Tensor) -> Tensor:
    value = torch.tanh(x @ w.view(2, 2))
    rate = (1 - value.square()) * (x @ w.cos().view(2, 2))
    return (value - 0.3).square().mean() + c * rate.square().mean()


def by_grad(w: Tensor, x: Tensor, c: Tensor) -> Tensor:
    inner = grad(lambda v: (torch.tanh(x @ v.view(2, 2)) - 0.3).square().mean())
    return (w - c * inner(w)).square().sum() + by_sum_of_squares(w)


def grad_by_hand(w: Tensor, x: Tensor, c: Tensor) -> Tensor:
    value = torch.tanh(x @ w.view(2, 2))
    slope = x.T @ ((value - 0.3) * (1 - value.square())) * (2 / value.numel())
    return (w - c * slope.reshape(-1)).square().sum() + by_sum_of_squares(w)


def by_sum_of_squares(w: Tensor) -> Tensor:
    return 0.1 * w.pow(4).sum()


def by_vmap_of_grad(w: Tensor, x: Tensor, c: Tensor) -> Tensor:
    slopes = vmap(grad(lambda z: model(w, z)))(x)
    return (slopes.norm(dim=1) - c).square().mean() + by_sum_of_squares(w)


def penalty_by_hand(w: Tensor, x: Tensor, c: Tensor) -> Tensor:
    z = x @ w.view(2, 2)
    slopes = (3 * torch.tanh(z).square() * (1 - torch.tanh(z).square())) @ w.view(2, 2).T + (x * w[:2]).cos() * w[:2]
    return (slopes.norm(dim=1) - c).square().mean() + by_sum_of_squares(w)


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
FUNC: dict[str, tuple[Loss, Loss]] = {
    "hessian": (laplacian, laplacian_by_hand),
    "jacfwd": (by_jacfwd, jacobian_by_hand),
    "jacrev": (by_jacrev, jacobian_by_hand),
    "jvp": (by_jvp, jvp_by_hand),
    "grad": (by_grad, grad_by_hand),
    "vmap of grad": (by_vmap_of_grad, penalty_by_hand),
}


def gradient_penalty(w: Tensor, x: Tensor, c: Tensor) -> Tensor:
    """As it is usually written."""
    x = x.requires_grad_()
    (slope,) = torch.autograd.grad(torch.stack([model(w, z) for z in x]).sum(), x, create_graph=True)
    return (slope.norm(dim=1) - c).square().mean() + by_sum_of_squares(w)


def asked_twice(w: Tensor, x: Tensor, c: Tensor) -> Tensor:
    """Two penalties, the second on what the first has marked."""
    return gradient_penalty(w, x, c) + 0.5 * gradient_penalty(2 * w, x, c + 1)


def of_a_part(w: Tensor, x: Tensor, c: Tensor) -> Tensor:
    """Marked in a view of the argument."""
    return gradient_penalty(w, x[1:], c)


def of_a_copy(w: Tensor, x: Tensor, c: Tensor) -> Tensor:
    return gradient_penalty(w, x.detach().clone(), c)


PENALTIES: dict[str, tuple[Loss, Loss]] = {
    "penalty": (gradient_penalty, penalty_by_hand),
    "two": (asked_twice, lambda w, x, c: penalty_by_hand(w, x, c) + 0.5 * penalty_by_hand(2 * w, x, c + 1)),
}


def loop(loss: Loss, w: Tensor, x: Tensor, c: Tensor, lr: Any = LR) -> Tensor:
    for _ in range(STEPS):
        w = w if w.requires_grad else w.detach().requires_grad_()
        w = w - lr * torch.autograd.grad(loss(w, x, c), w, create_graph=True)[0]
    return w


def solved(loss: Loss, estimator: Any, w: Tensor, x: Tensor, c: Tensor, lr: Any = LR, steps: int = STEPS) -> Tensor:
    return diffopt.solve(loss, w, x, c, optimizer=diffopt.SGD(lr), steps=steps, estimator=estimator).params


def hypergradient(run: Callable[..., Tensor], learned: tuple[int, ...]) -> tuple[Tensor, ...]:
    inputs = [t.requires_grad_() if i in learned else t for i, t in enumerate(tensors())]
    return torch.autograd.grad(run(*inputs).pow(3).sum(), [inputs[i] for i in learned])


ALL = (0, 1, 2)


@functools.cache
def by_the_loop(kind: str) -> tuple[Tensor, ...]:
    """The hypergradient of a loss by hand, once for all estimators."""
    return hypergradient(lambda *t: loop(FUNC[kind][1], *t), ALL)


@pytest.mark.parametrize("kind", FUNC)
def test_the_losses_by_hand_are_the_losses(kind: str) -> None:
    loss, by_hand = FUNC[kind]
    torch.testing.assert_close(loss(*tensors()), by_hand(*tensors()), rtol=1e-12, atol=0)
    assert_same(hypergradient(lambda *t: loop(loss, *t), ALL), hypergradient(lambda *t: loop(by_hand, *t), ALL))


@pytest.mark.parametrize("estimator", sampled(EXACT.values(), 2), ids=EXACT)
@pytest.mark.parametrize("kind", FUNC)
def test_exact_estimators_with_derivatives_by_torch_func_are_the_plain_loop(kind: str, estimator: Any) -> None:
    assert_same(hypergradient(lambda *t: solved(FUNC[kind][0], estimator, *t), ALL), by_the_loop(kind), 1e-9)


@pytest.mark.parametrize(
    "estimator", sampled([Reverse(), Krylov(STEPS), Reverse(2), Unrolled(), ForwardMode()], 2), ids=str
)
@pytest.mark.parametrize("kind", FUNC)
def test_under_func_grad_and_vmap(kind: str, estimator: Any) -> None:
    loss, by_hand = FUNC[kind]
    w, x, c = tensors()
    weights = torch.stack([c, 2 * c])

    def each(w: Tensor, x: Tensor, c: Tensor) -> Any:
        return grad(lambda *t: solved(loss, estimator, *t).pow(3).sum(), argnums=(0, 2))(w, x, c)

    rows = []
    for weight in weights:
        leaves = [w.clone().requires_grad_(), weight.clone().requires_grad_()]
        rows.append(torch.autograd.grad(loop(by_hand, leaves[0], x, leaves[1]).pow(3).sum(), leaves))
    assert_same(each(w, x, c), rows[0], 1e-9)
    columns = [torch.stack(column) for column in zip(*rows, strict=True)]
    assert_same(vmap(each, in_dims=(None, None, 0))(w, x, weights), columns, 1e-9)


OF_LOW_ORDER = (Binomial(1), Binomial(2), Krylov(1), Krylov(2))
BIASED: list[Any] = [FirstOrder(), Reptile(), Truncated(1), *OF_LOW_ORDER, MultiStep(2)]


@pytest.mark.parametrize("estimator", sampled(BIASED, 2), ids=str)
@pytest.mark.parametrize("kind", FUNC)
def test_biased_estimators_give_what_they_give_for_the_loss_by_hand(kind: str, estimator: Any) -> None:
    found = [
        hypergradient(lambda *t, one=one: solved(one, estimator, *t), (0,)) for one in FUNC[kind] if kind != "hessian"
    ]
    if found:
        assert_same(found[0], found[1], 1e-9)
        return
    # the hessian by hand cannot run under vmap: the same values by torch.func in another order
    swapped = lambda w, x, c: laplacian(w, x.flip(0), c)  # noqa: E731
    assert_same(*(hypergradient(lambda *t, o=o: solved(o, estimator, *t), (0,)) for o in (laplacian, swapped)), 1e-9)


@pytest.mark.parametrize("kind", [kind for kind in FUNC if kind != "hessian"])
def test_es_jacobian_in_all_directions_is_the_plain_loop(kind: str) -> None:
    loss, by_hand = FUNC[kind]
    found = hypergradient(lambda *t: solved(loss, ESJacobian(15, 1e-5), *t), ALL)
    assert_same(found, hypergradient(lambda *t: loop(by_hand, *t), ALL), 1e-6)


@pytest.mark.parametrize("kind", ["jacfwd", "jacrev", "jvp"])
def test_implicit_gradients_of_losses_with_derivatives(kind: str) -> None:
    found = [
        hypergradient(lambda *t, one=one: solved(one, Implicit(), *t, lr=0.2, steps=400), (1, 2)) for one in FUNC[kind]
    ]
    assert_same(found[0], found[1], 1e-8)


# ------------------------------------------------------------------------------------------------ gradient penalties

LOOPED = {name: estimator for name, estimator in EXACT.items() if name not in ("forward", "forward in chunks")}


@pytest.mark.parametrize("learned", [(0,), (2,), (0, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("estimator", LOOPED.values(), ids=LOOPED)
@pytest.mark.parametrize("kind", PENALTIES)
def test_a_gradient_penalty_is_the_plain_loop(kind: str, estimator: Any, learned: tuple[int, ...]) -> None:
    """Also with the points learned, which the loss marks by ``requires_grad_()``."""
    loss, by_hand = PENALTIES[kind]
    found = hypergradient(lambda *t: solved(loss, estimator, *t), learned)
    assert_same(found, hypergradient(lambda *t: loop(by_hand, *t), learned), 1e-9)


@pytest.mark.parametrize("estimator", LOOPED.values(), ids=LOOPED)
@pytest.mark.parametrize("loss", [of_a_part, of_a_copy], ids=["part", "copy"])
def test_a_gradient_penalty_on_a_part_or_a_copy_is_the_plain_loop(loss: Loss, estimator: Any) -> None:
    part = loss is of_a_part
    expected = hypergradient(lambda w, x, c: loop(penalty_by_hand, w, x[1:] if part else x, c), (0, 2))
    assert_same(hypergradient(lambda *t: solved(loss, estimator, *t), (0, 2)), expected, 1e-9)


@pytest.mark.parametrize("estimator", [ForwardMode(), Binomial(1), Krylov(2), ESJacobian(4, 1e-4)], ids=str)
def test_an_estimator_that_vmaps_names_what_can_be_vmapped(estimator: Any) -> None:
    """And that form gives its number."""
    with pytest.raises(diffopt.VmapError, match=r"requires_grad_\(\).*differentiate by torch\.func\.grad there"):
        hypergradient(lambda *t: solved(gradient_penalty, estimator, *t), (0, 2))
    if isinstance(estimator, ForwardMode):
        found = hypergradient(lambda *t: solved(by_vmap_of_grad, estimator, *t), (0, 2))
        assert_same(found, hypergradient(lambda *t: loop(penalty_by_hand, *t), (0, 2)), 1e-9)


@pytest.mark.parametrize("estimator", LOOPED.values(), ids=LOOPED)
def test_the_callers_points_are_as_they_were(estimator: Any) -> None:
    w, x, c = tensors()
    end = solved(gradient_penalty, estimator, w.requires_grad_(), x, c)
    end.sum().backward()
    assert not x.requires_grad
    assert x.grad is None
    assert x._version == 0


@pytest.mark.parametrize("estimator", [Reverse(), Reverse(1), Unrolled(), Truncated(STEPS)], ids=str)
def test_points_that_are_also_the_params_count_as_points(estimator: Any) -> None:
    """The loss means the partial derivative in what it was given, though the start is the same tensor."""

    def loss(w: Tensor, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        (slope,) = torch.autograd.grad((w * x.sin()).sum(), x, create_graph=True)
        return (slope - 0.5).square().sum() + by_sum_of_squares(w)

    def by_hand(w: Tensor, x: Tensor) -> Tensor:
        return (w * x.cos() - 0.5).square().sum() + by_sum_of_squares(w)

    found = []
    for one in (loss, by_hand):
        w = tensors()[0].requires_grad_()
        if one is loss:
            end = diffopt.solve(one, w, w, optimizer=diffopt.SGD(LR), steps=STEPS, estimator=estimator).params
        else:
            end = w
            for _ in range(STEPS):
                now = end.view_as(end)
                end = now - LR * torch.autograd.grad(one(now, w), now, create_graph=True)[0]
        found.append(torch.autograd.grad(end.pow(3).sum(), w))
    assert_same(*found)


def test_a_loss_that_marks_its_argument_may_run_under_a_transform_that_is_no_vmap() -> None:
    """Nothing of it is batched: what looks for captured tensors must not be in its way."""

    def loss(w: Tensor, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad((w * x**3).sum(), x, create_graph=True)
        return slope.square().sum() + w.square().sum()

    def outer(w: Tensor) -> Tensor:
        x = torch.ones(2, dtype=torch.float64)
        return diffopt.solve(loss, w, x, optimizer=diffopt.SGD(0.01), steps=2).params.sum()

    w = torch.tensor([1.0, 2.0], dtype=torch.float64)
    leaf = w.clone().requires_grad_()
    outer(leaf).backward()
    torch.testing.assert_close(torch.func.grad(outer)(w), leaf.grad)
    with pytest.raises(diffopt.VmapError):
        torch.func.vmap(outer)(torch.stack([w, w]))
