"""What is right is taken, and means what it says: numpy's numbers, stacked batches, trees of a user's own classes."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

import numpy as np
import optree
import pytest
import torch
from bad_habits import BATCHES
from stateless import Stateless
from torch import Tensor

import diffopt
from diffopt import SGD, Adagrad, Adam, AdamW, Leaves, Preconditioned, ProximalGD, RMSprop, Schedule
from diffopt.estimators import Binomial, ESJacobian, ForwardMode, Keep, Krylov, MultiStep, Reverse, Truncated
from diffopt.linear_solve import GMRES, ConjugateGradient, Dense, Neumann, Nystrom

START = torch.tensor([1.0, -2.0], dtype=torch.float64)


def loss(w: Tensor) -> Tensor:
    return (w**4).sum() + w.prod()


def final(optimizer: Any, steps: Any = 3, **options: Any) -> Tensor:
    return diffopt.solve(loss, START, optimizer=optimizer, steps=steps, **options).params


@pytest.mark.parametrize("steps", [np.int64(3), np.uint8(3), np.int32(3), np.array(3)], ids=repr)
def test_numbers_of_steps_of_numpy(steps: Any) -> None:
    assert torch.equal(final(SGD(0.01), steps), final(SGD(0.01), 3))


# numpy's halves and singles hold these exactly
OPTIMIZERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "sgd": (SGD, {"lr": 0.0625, "momentum": 0.5, "dampening": 0.25, "weight_decay": 0.125}),
    "nesterov": (SGD, {"lr": 0.0625, "momentum": 0.5, "nesterov": True}),
    "adam": (Adam, {"lr": 0.0625, "betas": (0.5, 0.75), "eps": 0.125, "amsgrad": True}),
    "adamw": (AdamW, {"lr": 0.0625, "betas": [0.5, 0.75], "eps": 0.125}),
    "rmsprop": (RMSprop, {"lr": 0.0625, "alpha": 0.5, "momentum": 0.5, "eps": 0.125}),
    "adagrad": (Adagrad, {"lr": 0.0625, "lr_decay": 0.5, "initial_accumulator_value": 0.25}),
    "proximal": (ProximalGD, {"lr": 0.0625, "strength": 0.5}),
    "preconditioned": (Preconditioned, {"lr": 0.0625, "diagonal": 0.5}),
    "schedule": (SGD, {"lr": Schedule([0.0625, 0.125, 0.25])}),
}


def of_numpy(kind: Any, value: Any) -> Any:
    """The same option in numpy's numbers."""
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, list | tuple):
        return type(value)(of_numpy(kind, x) for x in value)
    return Schedule(np.array(value.values)) if isinstance(value, Schedule) else kind(value)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.longdouble, np.array])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_options_of_numpy_are_the_numbers_they_are(name: str, kind: Any) -> None:
    make, options = OPTIMIZERS[name]
    made = make(**{key: of_numpy(kind, value) for key, value in options.items()})
    assert torch.equal(final(made), final(make(**options)))
    assert made == make(**options)


def test_integers_of_numpy_do_not_wrap_around() -> None:
    """``1 - np.uint8(2)`` is 255."""
    assert torch.equal(final(SGD(0.01, momentum=0.5, dampening=np.uint8(2))), final(SGD(0.01, 0.5, dampening=2)))


@dataclass(frozen=True)
class Own(Stateless):
    """An optimizer of a user's own, which converts nothing."""

    lr: Any
    scale: Any = 1.0

    def update(self, params: Leaves, grads: Leaves, buffers: Any, step: int) -> tuple[Leaves, Any]:
        assert isinstance(self.lr, float | Leaves)
        return params - self.lr * self.scale * grads, buffers


@pytest.mark.parametrize("lr", [np.float32(0.0625), Schedule([np.float32(0.0625)] * 3), Schedule(np.full(3, 0.0625))])
def test_numbers_of_numpy_in_an_optimizer_of_ones_own(lr: Any) -> None:
    assert torch.equal(final(Own(lr, np.int64(2))), final(Own(0.0625, 2.0)))


def test_numbers_of_numpy_in_a_tree() -> None:
    got = diffopt.solve(lambda p: loss(p["a"]), {"a": START}, optimizer=SGD({"a": np.float32(0.0625)}), steps=3).params
    assert torch.equal(got["a"], final(SGD(0.0625)))


PLAIN = [
    (Truncated, {"steps": 2, "checkpoint": 1}),
    (Reverse, {"checkpoint": 2}),
    (Keep, {"first": 1, "checkpoint": 2}),
    (Binomial, {"order": 1, "window": 2, "scale": 0.5, "chunk_size": 2}),
    (Krylov, {"order": 1, "rtol": 0.5, "chunk_size": 1}),
    (MultiStep, {"window": 2}),
    (ForwardMode, {"chunk_size": 1}),
    (ESJacobian, {"directions": 2, "radius": 0.5}),
    (ConjugateGradient, {"max_iterations": 3, "rtol": 0.5}),
    (GMRES, {"max_iterations": 3, "rtol": 0.5}),
    (Neumann, {"terms": 3, "step_size": 0.5, "power_iterations": 2}),
    (Nystrom, {"rank": 1, "damping": 0.5, "seed": 3}),
    (Dense, {"damping": 0.5}),
]


@pytest.mark.parametrize(("kind", "options"), PLAIN, ids=lambda x: getattr(x, "__name__", ""))
def test_estimators_and_solvers_keep_python_numbers(kind: Any, options: dict[str, Any]) -> None:
    made = kind(**{k: np.int16(v) if isinstance(v, int) else np.float32(v) for k, v in options.items()})
    assert made == kind(**options)
    assert all(type(getattr(made, field.name)).__module__ != "numpy" for field in fields(made))


def test_a_number_of_another_kind_is_refused() -> None:
    with pytest.raises(diffopt.HyperparameterError, match="is Fraction"):
        final(SGD(Fraction(1, 16)))


@pytest.mark.parametrize("lr", [1e39, 1e300, 10**30])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rate", [lambda lr: lr, lambda lr: [lr], lambda lr: Schedule([lr] * 2)], ids=["", "tree", "t"])
def test_a_number_that_the_dtype_cannot_hold_diverges(lr: float, dtype: torch.dtype, rate: Any) -> None:
    if lr < torch.finfo(dtype).max:
        pytest.skip("the dtype holds it")
    with pytest.raises(diffopt.DivergenceError, match="check the learning rate"):
        diffopt.solve(lambda p: p[0].square().sum(), [torch.ones(2, dtype=dtype)], optimizer=SGD(rate(lr)), steps=2)


Pair = namedtuple("Pair", "x y")
XS, YS = torch.arange(10.0).reshape(2, 5), 1 + torch.arange(10.0).reshape(2, 5)
STACKED: dict[str, tuple[Any, Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "tuple": ((XS, YS), lambda b: b),
    "dict": ({"x": XS, "y": YS}, lambda b: (b["x"], b["y"])),
    "ordered": (OrderedDict(x=XS, y=YS), lambda b: (b["x"], b["y"])),
    "named": (Pair(XS, YS), lambda b: (b.x, b.y)),
    "list_of_two_shapes": ([XS[..., None], YS], lambda b: (b[0][..., 0], b[1])),
    "two_sets": (((XS, XS), (YS[..., None], YS)), lambda b: (b[0][0], b[1][1])),
    "one_tensor": (torch.stack([XS, YS], dim=1), lambda b: (b[0], b[1])),
    "as_advised": (tuple(torch.stack(x) for x in zip(*[(XS[0], YS[0]), (XS[1], YS[1])], strict=True)), lambda b: b),
}


@pytest.mark.parametrize("name", STACKED)
def test_stacked_batches_are_read_step_by_step(name: str) -> None:
    """With as many entries as steps, and equal shapes, nothing but their form tells them from a list of batches."""
    batches, parts = STACKED[name]

    def misfit(w: Tensor, batch: Any) -> Tensor:
        x, y = parts(batch)
        return ((w * x - y) ** 2).mean()

    w = torch.tensor(0.5)
    got = diffopt.solve(misfit, w, optimizer=SGD(0.01), steps=2, batches=batches).params
    for x, y in zip(XS, YS, strict=True):
        w = w - 0.01 * (2 * x * (w * x - y)).mean()
    torch.testing.assert_close(got, w)


def any_sum(w: Tensor, batch: Any) -> Tensor:
    """A loss that takes any tree, and so would not notice."""
    leaves = optree.tree_leaves(batch)
    return sum(((w * x) ** 2).sum() for x in leaves)  # type: ignore[return-value]


@pytest.mark.parametrize("name", [name for name in BATCHES if name.startswith(("of_", "in_"))])
def test_a_list_of_batches_is_refused_where_the_loss_would_not_notice(name: str) -> None:
    with pytest.raises(diffopt.BatchesError, match="perhaps one batch for each step"):
        diffopt.solve(any_sum, torch.tensor(1.0), optimizer=SGD(0.01), steps=3, batches=BATCHES[name][0]())


class Held:
    """A class of a user's own."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale


optree.register_pytree_node(Held, lambda x: ((x.scale,), None, ("scale",)), lambda _, x: Held(*x), namespace="diffopt")


def test_a_registered_class_is_a_tree() -> None:
    """As the message for one that is not registered advises."""
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    got = diffopt.solve(lambda w, h: h.scale * w.square().sum(), START, Held(scale), optimizer=SGD(0.1), steps=1).params
    (slope,) = torch.autograd.grad(got.sum(), scale)
    torch.testing.assert_close(slope, -0.1 * 2 * START.sum())


@pytest.mark.parametrize("start", [-100.0, -1e4])
def test_a_negative_accumulator_is_refused(start: float) -> None:
    value = torch.tensor(start, requires_grad=True)
    with pytest.raises(diffopt.DiffoptError, match="not finite"):
        final(Adagrad(0.01, initial_accumulator_value=value))


def test_the_root_of_a_negative_number_is_not_zero() -> None:
    """Values of ``torch.sqrt``, slope 0 at zero and nowhere else."""
    x = torch.tensor([-4.0, -1e-30, -0.0, 0.0, 1e-30, 4.0], requires_grad=True)
    (roots,) = Leaves([x]).sqrt()
    torch.testing.assert_close(roots, torch.sqrt(x), equal_nan=True)
    roots[2:].sum().backward()
    assert x.grad is not None
    assert x.grad[2:4].tolist() == [0, 0]
    torch.testing.assert_close(x.grad[4:], 0.5 / x.detach()[4:].sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_variance_below_zero_is_refused(dtype: torch.dtype) -> None:
    """``v - m**2`` of averages that do not belong together; torch.optim's RMSprop makes it NaN."""
    (root,) = Leaves([torch.tensor([0.25 - 0.5], dtype=dtype)]).sqrt()
    assert bool(root.isnan())

    @dataclass(frozen=True)
    class Rooted(diffopt.Optimizer):
        def init(self, params: Leaves) -> dict[str, Leaves]:
            return {"variance": params.zeros() - 0.25}

        def update(self, params: Leaves, grads: Leaves, buffers: Any, step: int) -> tuple[Leaves, Any]:
            return params - 0.1 * grads / (buffers["variance"].sqrt() + 1e-8), buffers

    with pytest.raises(diffopt.DivergenceError, match="the state after step 1"):
        diffopt.solve(lambda w: w.square().sum(), torch.ones(2, dtype=dtype), optimizer=Rooted(), steps=1)
