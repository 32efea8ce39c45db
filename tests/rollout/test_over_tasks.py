"""The mean over tasks, a chunk at a time: the numbers of a plain vmap, in the memory of one chunk."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import vmap

import diffopt
from diffopt.estimators import FirstOrder, Reptile, Reverse, Truncated
from diffopt.tensors.memory import peak_bytes

TASKS = 5


def inputs() -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    params = {"weight": draw(3).requires_grad_(), "bias": draw().requires_grad_()}
    x = draw(4, TASKS, 3).requires_grad_()  # its tasks run along axis 1
    return params, x, draw(TASKS, 4), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)


def inner(params: Any, x: Tensor, y: Tensor) -> Tensor:
    return ((torch.tanh(x @ params["weight"]) + params["bias"] - y) ** 2).mean()


def task_loss(params: Any, x: Tensor, y: Tensor, lr: Tensor, estimator: Any) -> Tensor:
    adapted = diffopt.solve(inner, params, x, y, optimizer=diffopt.SGD(lr), steps=3, estimator=estimator).params
    return inner(adapted, x.flip(0), y)


DIMS = (None, 1, 0, None, None)


@pytest.mark.parametrize("estimator", [Reverse(), Reverse(1), Truncated(1), FirstOrder()])
@pytest.mark.parametrize("chunk", [None, 1, 2, 5, 7])
def test_value_and_gradient_are_those_of_a_loop(chunk: int | None, estimator: Any) -> None:
    """One task is looped over by plain indexing here; a chunk of two leaves a last chunk of one."""
    params, x, y, lr = inputs()
    looped = torch.stack([task_loss(params, x[:, b], y[b], lr, estimator) for b in range(TASKS)]).mean()
    mean = diffopt.mean_over_tasks(task_loss, params, x, y, lr, estimator, in_dims=DIMS, task_chunk=chunk)
    torch.testing.assert_close(mean, looped, rtol=1e-12, atol=0)
    learned = [params["weight"], params["bias"], x, lr]
    expected = torch.autograd.grad(3 * looped, learned, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(torch.autograd.grad(3 * mean, learned), expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("dims", [-2, (None, -2, 0, None, None), (None, 1, -2, None, None)], ids=str)
def test_axes_counted_from_behind(dims: Any, chunk: int | None) -> None:
    """As ``torch.func.vmap`` counts them."""
    params, x, y, lr = inputs()
    options = {"task_chunk": chunk}
    if dims == -2:
        found = diffopt.mean_over_tasks(lambda x: x.pow(3).sum(), x, in_dims=dims, **options)
        expected = x.pow(3).sum() / TASKS
    else:
        found = diffopt.mean_over_tasks(task_loss, params, x, y, lr, Reverse(1), in_dims=dims, **options)
        expected = diffopt.mean_over_tasks(task_loss, params, x, y, lr, Reverse(1), in_dims=DIMS, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    by_x, expected_by_x = (torch.autograd.grad(mean, x) for mean in (found, expected))
    torch.testing.assert_close(by_x, expected_by_x, rtol=1e-11, atol=1e-14)


def test_memory_is_that_of_one_chunk() -> None:
    """Four times the tasks take the same peak; all at once they take several times more."""

    def loss(w: Tensor, c: Tensor) -> Tensor:
        end = diffopt.solve(quartic, w, c, optimizer=diffopt.SGD(0.1), steps=6, estimator=Reverse("graph"))
        return end.params.square().sum()

    def peak(tasks: int, chunk: int) -> int:
        w, data = torch.ones(10_000, requires_grad=True), torch.ones(tasks, 1)
        options = {"in_dims": (None, 0), "task_chunk": chunk}
        used = peak_bytes(lambda: diffopt.mean_over_tasks(loss, w, data, **options).backward())
        assert used is not None
        return used

    assert peak(16, 2) < 1.05 * peak(4, 2)
    assert peak(16, 16) > 6 * peak(16, 2)


def quartic(w: Tensor, c: Tensor) -> Tensor:
    return (w**4 * c).mean()


def test_without_grad_only_the_value_is_computed() -> None:
    params, x, y, lr = inputs()
    with torch.no_grad():
        mean = diffopt.mean_over_tasks(task_loss, params, x, y, lr, Reverse(), in_dims=DIMS, task_chunk=2)
    assert not mean.requires_grad
    pulled: list[int] = []
    one = params["weight"][:1]
    with torch.no_grad():
        loss = lambda y, w: (Pulled.apply(w, pulled) * y).sum()  # noqa: E731
        diffopt.mean_over_tasks(loss, y, one, in_dims=(0, None), task_chunk=1)
    assert not pulled
    expected = vmap(lambda x, y: task_loss(params, x, y, lr, Reverse()), (1, 0))(x, y).mean()
    torch.testing.assert_close(mean, expected, rtol=1e-12, atol=0)


class Pulled(torch.autograd.Function):
    """The identity, which notes that it has been differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pulled: list[int]) -> Tensor:
        ctx.pulled = pulled
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        ctx.pulled.append(1)
        return cotangents[0], None


def noisy(w: Tensor, _: Tensor) -> Tensor:
    return (w * torch.rand(3)).sum()


@pytest.mark.parametrize("chunk", [None, 1, 2, 3])
def test_the_same_random_numbers_for_all_tasks_whatever_the_chunk(chunk: int | None) -> None:
    w = torch.ones(3, requires_grad=True)
    torch.manual_seed(0)
    expected, after = torch.rand(3), torch.rand(())
    torch.manual_seed(0)
    options = {"in_dims": (None, 0), "task_chunk": chunk, "randomness": "same"}
    mean = diffopt.mean_over_tasks(noisy, w, torch.zeros(5), **options)
    torch.testing.assert_close(torch.autograd.grad(mean, w)[0], expected)
    assert torch.equal(torch.rand(()), after)  # and the generator has moved on as under one vmap


def test_random_numbers() -> None:
    w = torch.ones(3, requires_grad=True)

    def mean(chunk: int, randomness: str) -> Tensor:
        torch.manual_seed(0)
        options = {"in_dims": (None, 0), "task_chunk": chunk, "randomness": randomness}
        return diffopt.mean_over_tasks(noisy, w, torch.zeros(4), **options)

    torch.manual_seed(0)
    expected = (w * torch.rand(4, 3).mean(0)).sum()
    torch.testing.assert_close(mean(4, "different"), expected)
    with pytest.raises(RuntimeError, match="randomness"):
        mean(4, "error")


def test_a_loss_that_captures_is_refused() -> None:
    w, x = torch.ones(3, requires_grad=True), torch.ones(4, 3)
    other = torch.ones(3, requires_grad=True)
    for chunk in (1, 2):
        with pytest.raises(diffopt.CapturedTensorError, match="captured"):
            diffopt.mean_over_tasks(lambda w, x: (other * w * x).sum(), w, x, in_dims=(None, 0), task_chunk=chunk)


@pytest.mark.parametrize("chunk", [None, 1])
def test_a_capture_is_refused_although_nothing_given_requires_grad(chunk: int | None) -> None:
    """Else the mean would have no gradient, and only ``backward()`` would say so."""
    model, x = torch.nn.Linear(3, 1), torch.ones(4, 3)
    with pytest.raises(diffopt.CapturedTensorError, match="captured"):
        diffopt.mean_over_tasks(lambda x: model(x).sum(), x, task_chunk=chunk)
    with torch.no_grad():
        diffopt.mean_over_tasks(lambda x: model(x).sum(), x, task_chunk=chunk)
    assert not diffopt.mean_over_tasks(lambda x: model(x).sum(), x, task_chunk=chunk, check=False).requires_grad


def test_transforms_and_second_derivatives_are_refused() -> None:
    w, x = torch.ones(3, requires_grad=True), torch.ones(4, 3)

    def mean(w: Tensor) -> Tensor:
        return diffopt.mean_over_tasks(lambda w, x: (w**2 * x).sum(), w, x, in_dims=(None, 0))

    with pytest.raises(diffopt.GradModeError, match="chunk_size"):
        torch.func.grad(mean)(w.detach())
    (first,) = torch.autograd.grad(mean(w), w, create_graph=True)
    torch.testing.assert_close(first, 2 * w)
    with pytest.raises(diffopt.SecondDerivativeError, match="differentiated again"):
        first.sum().backward()


@pytest.mark.parametrize("chunk", [1, 7, 64, None])
@pytest.mark.parametrize("tasks", [64, 1000, 3000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adds_up_in_single(dtype: torch.dtype, tasks: int, chunk: int | None) -> None:
    """Ones have the mean one, and so have the gradients; half precision counts to 2048 or to 256."""
    w, x = torch.ones((), dtype=dtype, requires_grad=True), torch.ones(tasks, dtype=dtype, requires_grad=True)
    mean = diffopt.mean_over_tasks(lambda w, x: w * x, w, x, in_dims=(None, 0), task_chunk=chunk)
    assert mean.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert abs(float(mean.detach()) - 1) <= 2 * eps
    by_w, by_x = torch.autograd.grad(mean, [w, x])
    assert by_w.dtype == by_x.dtype == dtype
    assert abs(float(by_w) - 1) <= 2 * eps
    torch.testing.assert_close(by_x.double() * tasks, torch.ones(tasks).double(), rtol=2 * eps, atol=0)


@pytest.mark.parametrize("chunk", [1, 5])
def test_a_large_sum_of_halves_is_not_infinite(chunk: int) -> None:
    w = torch.ones((), dtype=torch.float16, requires_grad=True)
    x = torch.full((1000,), 200.0, dtype=torch.float16)
    mean = diffopt.mean_over_tasks(lambda w, x: w * x, w, x, in_dims=(None, 0), task_chunk=chunk)
    mean.backward()
    assert w.grad is not None
    assert [float(mean.detach()), float(w.grad)] == [200, 200]


WRITERS: dict[str, Any] = {
    "add": lambda w, x: x.add_(1),
    "item": lambda w, x: x.__setitem__(0, 5.0),
    "out": lambda w, x: torch.mul(x, 2, out=x),
    "shared": lambda w, x: w.mul_(2),
    "relu": lambda w, x: torch.relu_(x),
}


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_a_task_loss_that_writes_into_its_arguments(name: str, requires_grad: bool, chunk: int | None) -> None:
    def writing(w: Tensor, x: Tensor) -> Tensor:
        WRITERS[name](w, x)
        return (w * x).sum()

    w, x = torch.ones(3, requires_grad=requires_grad), torch.ones(4, 3)
    with pytest.raises(diffopt.InPlaceError, match=r"task_loss .*in place, expected .*x = x \+ y"):
        diffopt.mean_over_tasks(writing, w, x, in_dims=(None, 0), task_chunk=chunk)


def test_numbers_of_numpy_say_where_tasks_are() -> None:
    x = torch.arange(12.0).reshape(4, 3)
    for dims in (np.int64(1), [np.int64(1)], (1,), np.array(1)):
        got = diffopt.mean_over_tasks(lambda x: x.sum() ** 2, x, in_dims=dims, task_chunk=np.uint8(2))
        torch.testing.assert_close(got, (x.sum(0) ** 2).mean())


@pytest.mark.parametrize("estimator", [Reptile(), FirstOrder(), Reverse()])
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_an_estimator_that_does_not_look_at_the_outer_loss_sums_the_same_in_chunks(estimator: Any, chunk: int) -> None:
    def task_loss(w: Tensor, x: Tensor) -> Tensor:
        options = {"optimizer": diffopt.SGD(0.1), "steps": 2, "estimator": estimator}
        return diffopt.solve(lambda w, x: (w - x).square().sum(), w, x, **options).params.sum()

    def found(chunk: int | None) -> Tensor:
        w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        xs = torch.arange(10.0, dtype=torch.float64).reshape(5, 2)
        mean = diffopt.mean_over_tasks(task_loss, w, xs, in_dims=(None, 0), task_chunk=chunk)
        return torch.autograd.grad(mean, w)[0]

    torch.testing.assert_close(found(chunk), found(None))


@pytest.mark.parametrize("chunk", [1, 2, 3, None])
def test_aux_of_all_tasks_is_stacked_and_detached(chunk):
    w, xs = torch.tensor([1.0, 2.0], requires_grad=True), torch.arange(6.0).reshape(3, 2)

    def task(w, x):
        return (w * x).square().sum(), {"product": w * x, "count": 1}

    mean, aux = diffopt.mean_over_tasks(task, w, xs, in_dims=(None, 0), task_chunk=chunk, has_aux=True)
    torch.testing.assert_close(aux["product"], w.detach() * xs)
    assert aux["count"].tolist() == [1, 1, 1]
    assert not aux["product"].requires_grad
    expected = (w * xs).square().sum(1).mean()
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(torch.autograd.grad(mean, w), torch.autograd.grad(expected, w))


def test_a_task_without_aux_is_told_of_it():
    with pytest.raises(diffopt.LossError, match="has_aux=True: task_loss returned"):
        diffopt.mean_over_tasks(lambda x: x.sum(), torch.ones(2, 3), has_aux=True)
