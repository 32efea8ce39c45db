"""Every error the core raises: one row per fault, with what the message must say; and what must not be refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

import diffopt
from diffopt import SGD, Adagrad, Adam, AdamW, Leaves, Preconditioned, ProximalGD, RMSprop, Schedule
from diffopt.estimators import FirstOrder, ForwardMode, Reverse, Truncated, Unrolled

STEPS = 3


def tensor(*values: float, **options: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, **options)


def elsewhere(*shape: int) -> Tensor:
    """A tensor on another device."""
    return torch.zeros(shape, dtype=torch.float64, device="meta")


def square(w: Tensor, *args: Any) -> Tensor:
    return w.square().sum()


def solve(loss: Any = square, params: Any = None, *args: Any, **options: Any) -> Any:
    """The final parameters; what is not given is right."""
    options = {"optimizer": SGD(0.1), "steps": STEPS, **options}
    return diffopt.solve(loss, tensor(1, 2) if params is None else params, *args, **options).params


PAIR = {"a": tensor(1.0), "b": torch.ones(2, 3, dtype=torch.float64)}
EYES = {n: torch.eye(n, dtype=torch.float64) for n in (1, 2, 3)}


def solve_pair(optimizer: Any, params: Any = PAIR) -> Any:
    return solve(lambda p: p["a"].square().sum() + p["b"].square().sum(), params, optimizer=optimizer)


def factors(first: Any, second: Any) -> Any:
    return solve_pair(Preconditioned(0.1, factors={"a": first, "b": second}))


class NoDataclass(diffopt.Optimizer):
    def init(self, params: Leaves) -> dict[str, Leaves]:
        return {}

    def update(self, params: Leaves, grads: Leaves, buffers: Any, step: int) -> Any:
        return params, buffers


def broken(first: Callable[[Leaves], Any], later: Any = None, vmapped: bool = False) -> Any:
    """Solve by an optimizer whose two functions return this."""

    @dataclass(frozen=True)
    class Broken(diffopt.Optimizer):
        def init(self, params: Leaves) -> Any:
            return first(params)

        def update(self, params: Leaves, grads: Leaves, buffers: Any, step: int) -> Any:
            return later(params, buffers)

    run = partial(solve, square, optimizer=Broken())
    return vmap(run)(torch.ones(4, 2)) if vmapped else run()


def velocity(params: Leaves) -> dict[str, Leaves]:
    return {"velocity": params.zeros()}


def outer(end: Callable[[Tensor], Tensor], loss: Any = square, start: Tensor | None = None, **options: Any) -> None:
    """Backward through a solve."""
    start = (tensor(1, 2) if start is None else start).requires_grad_()
    end(solve(loss, start, **options)).sum().backward()


LOSSES: dict[str, tuple[Any, type[Exception], str]] = {
    "vector": (lambda w: w**2, diffopt.LossError, r"float64 tensor of shape \(2,\).*expected one floating scalar"),
    "number": (lambda w: 3.0, diffopt.LossError, r"float 3\.0, expected one floating scalar"),
    "none": (lambda w: None, diffopt.LossError, "NoneType None"),
    "pair": (lambda w: (w.sum(), w), diffopt.LossError, "returned tuple"),
    "integer": (lambda w: torch.tensor(3), diffopt.LossError, r"int64 tensor of shape \(\)"),
    "complex": (lambda w: (w * 1j).sum(), diffopt.LossError, "complex128 tensor"),
    "nan": (
        lambda w: (w * float("nan")).sum(),
        diffopt.NonFiniteLossError,
        "nan at the initial params, expected a fini",
    ),
    "inf": (lambda w: (w / 0).sum(), diffopt.NonFiniteLossError, "inf at the initial params"),
    "constant": (
        lambda w: torch.tensor(1.0),
        diffopt.DisconnectedError,
        "does not depend on params.*expected a gradient: check",
    ),
    "detached": (lambda w: w.detach().sum(), diffopt.DisconnectedError, "does not depend on params"),
    "item": (lambda w: torch.tensor(w.sum().item()), diffopt.DisconnectedError, r"\.item\(\)"),
}
TREES: dict[str, tuple[Any, str]] = {
    "int": ({"w": tensor(1), "n": 3}, r"params\['n'\] is int 3, expected a dense floating tensor"),
    "none": ([tensor(1), None], r"params\[1\] is NoneType None"),
    "empty_tensor": ({"w": torch.empty(0, 3)}, r"shape \(0, 3\): it is empty"),
    "bool": (torch.tensor([True]), "params is a bool tensor"),
    "complex": (torch.tensor([1j]), "complex64 tensor"),
    "sparse": (torch.eye(3).to_sparse(), "expected a dense floating tensor"),
    "numpy": (np.ones(2), "params is ndarray"),
    "empty_dict": ({}, "empty tree, expected at least one floating tensor"),
    "module": (nn.Linear(1, 1), "module Linear.*functional_call"),
}
LEARNING_RATES: dict[str, tuple[Any, type[Exception], str]] = {
    "too_few_branches": ({"a": 0.1}, diffopt.StructureError, r"lr is dict .*structure of params: params\['a'\]"),
    "too_many_branches": ({"a": 0.1, "b": 0.1, "c": 0.1}, diffopt.StructureError, "structure of params"),
    "list": ([0.1, 0.2], diffopt.StructureError, "lr is list"),
    "vector": (tensor(1, 1, 1), diffopt.StructureError, r"tensor of shape \(3,\)"),
    "shape": ({"a": 0.1, "b": tensor(1, 1, 1)}, diffopt.ShapeError, r"lr\['b'\] has shape \(3,\), expected .*\(2, 3\)"),
    "dtype": ({"a": 0.1, "b": torch.ones(2, 3)}, diffopt.DtypeError, r"lr\['b'\] is torch.float32.*torch.float64"),
    "integer": (torch.tensor(1), diffopt.DtypeError, "torch.int64 tensor, expected a floating dtype"),
    "integer_leaf": ({"a": 0.1, "b": torch.ones(2, 3).int()}, diffopt.DtypeError, "int32"),
    "device": (
        {"a": 0.1, "b": elsewhere(2, 3)},
        diffopt.DeviceError,
        r"lr\['b'\] is on meta, expected cpu as the parameter",
    ),
    "string_leaf": ({"a": "x", "b": 0.1}, diffopt.HyperparameterError, r"SGD: lr\['a'\] is 'x', expected 0 <= lr"),
    "schedule_list": (Schedule([0.1, 0.2]), diffopt.StepsError, "schedule of lr has 2 entries, expected .* 3"),
    "schedule_tensor": (Schedule(tensor(1, 1, 1, 1)), diffopt.StepsError, "lr has 4 entries"),
    "schedule_tree": (Schedule({"a": tensor(1, 1), "b": 0.1}), diffopt.StepsError, r"lr\['a'\] has 2 entries"),
    "schedule_shape": (Schedule({"a": 0.1, "b": elsewhere(3, 5)}), diffopt.ShapeError, r"\(5,\), expected .*\(2, 3\)"),
    "negative": (-0.1, diffopt.HyperparameterError, r"SGD: lr is -0\.1, expected 0 <= lr"),
    "nan": (float("nan"), diffopt.HyperparameterError, "lr is nan"),
    "infinite": (float("inf"), diffopt.HyperparameterError, "lr is inf"),
    "string": ("x", diffopt.HyperparameterError, "lr is 'x'"),
    "none": (None, diffopt.HyperparameterError, "lr is None"),
    "bool": (True, diffopt.HyperparameterError, "lr is True"),
}
# the optimizer's class -> options, each of which is out of range alone; the message names the first one
OPTIONS: list[tuple[Any, dict[str, Any]]] = [
    *((SGD, {name: -1, "lr": 0.1}) for name in ("momentum", "weight_decay")),
    (SGD, {"dampening": "x", "lr": 0.1, "momentum": 0.9}),
    *((kind, {name: -1}) for kind in (Adam, AdamW) for name in ("lr", "eps", "weight_decay")),
    *((kind, {"betas": b}) for kind in (Adam, AdamW) for b in ((1.0, 0.9), (0.9, -0.1), (0.9,), [0.9, 2.0], 0.9, None)),
    *((RMSprop, {name: -1}) for name in ("lr", "alpha", "eps", "weight_decay", "momentum")),
    *((Adagrad, {n: -1}) for n in ("lr", "lr_decay", "weight_decay", "eps", "initial_accumulator_value")),
    *((ProximalGD, {name: -1, **dict.fromkeys({"lr", "strength"} - {name}, 0.1)}) for name in ("lr", "strength")),
    (Preconditioned, {"lr": -1, "diagonal": 1.0}),
]
OTHERS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "mixed_devices": (
        lambda: solve_pair(SGD(0.1), {"a": tensor(1), "b": elsewhere(2)}),
        diffopt.DeviceError,
        r"\['b'\] is on meta",
    ),
    "nesterov": (
        lambda: SGD(0.1, nesterov=True),
        diffopt.HyperparameterError,
        "nesterov=True with momentum 0.0 and dampening 0.0, expected momentum > 0",
    ),
    "nesterov_dampened": (
        lambda: SGD(0.1, momentum=0.9, dampening=0.1, nesterov=True),
        diffopt.HyperparameterError,
        "momentum 0.9 and dampening 0.1, expected",
    ),
    "no_preconditioner": (
        lambda: Preconditioned(0.1),
        diffopt.HyperparameterError,
        "diagonal and factors are None, expected one or both",
    ),
    "factors_number": (
        lambda: factors((None,), (EYES[2],)),
        diffopt.ShapeError,
        r"for a leaf of shape \(2, 3\), expected a tuple of 2 matrices",
    ),
    "factors_shape": (
        lambda: factors((None,), (EYES[2], EYES[2])),
        diffopt.ShapeError,
        r"factor 1 is a float64 tensor of shape \(2, 2\).*\(3, 3\)",
    ),
    "factors_branches": (
        lambda: solve_pair(Preconditioned(0.1, factors={"a": (None,)})),
        diffopt.StructureError,
        "factors is dict",
    ),
    "optimizer_of_torch": (
        lambda: solve(optimizer=torch.optim.SGD([torch.ones(1)], lr=0.1)),
        diffopt.OptimizerError,
        "expected a diffopt.Optimizer such as SGD",
    ),
    "optimizer_class": (lambda: solve(optimizer=SGD), diffopt.OptimizerError, "optimizer is .*expected a diffopt.Opt"),
    "optimizer_bare": (lambda: solve(optimizer=NoDataclass()), diffopt.OptimizerError, r"NoDataclass is not a datacla"),
    **{
        f"init_{name}": (
            partial(broken, first),
            diffopt.OptimizerError,
            f"Broken.init returned {said}.*expected a dict",
        )
        for name, first, said in (
            ("none", lambda p: None, "NoneType"),
            ("list", lambda p: [1], r"list \[1\]"),
            ("tensor", lambda p: {"v": p[0]}, "dict"),
            ("leaves", lambda p: p, "Leaves"),
        )
    },
    **{
        f"update_{name}_vmap_{vmapped}": (
            partial(broken, velocity, later, vmapped),
            diffopt.OptimizerError,
            r"Broken\.update",
        )
        for vmapped in (False, True)
        for name, later in {
            "forgets_a_buffer": lambda p, b: (p, {}),
            "none": lambda p, b: None,
            "params_only": lambda p, b: p,
            "loses_a_leaf": lambda p, b: (p[:0], b),
            "shape": lambda p, b: (p.map(torch.sum), b),
            "buffer_shape": lambda p, b: (p, {"velocity": p.map(torch.sum)}),
            "dtype": lambda p, b: (p.map(Tensor.half), b),
        }.items()
    },
    "estimator_class": (lambda: solve(estimator=Reverse), diffopt.EstimatorError, r"call it: estimator=Reverse\(\)"),
    "estimator_name": (lambda: solve(estimator="reverse"), diffopt.EstimatorError, "estimator is str 'reverse'"),
    **{
        f"steps_{x}": (partial(solve, steps=x), diffopt.StepsError, "steps is .*, expected an integer >= 0")
        for x in (-1, 1.5, True, "3", None)
    },
    "truncated_negative": (lambda: Truncated(-1), diffopt.StepsError, "steps is -1, expected an integer >= 0"),
    "truncated_long": (lambda: solve(estimator=Truncated(4)), diffopt.StepsError, r"\(steps=4\).* only 3 steps"),
    **{
        f"{kind.__name__}_{x}": (
            partial(kind, **{name: x}),
            diffopt.HyperparameterError,
            f"{name} is {x!r}, expected N",
        )
        for kind, name, values in (
            (Reverse, "checkpoint", (0, -1, 1.5, True, "x")),
            (ForwardMode, "chunk_size", (0, True)),
        )
        for x in values
    },
    **{
        f"offload_{x}": (partial(Reverse, offload=x), diffopt.HyperparameterError, "offload is .*, expected True or F")
        for x in (None, 1, "yes")
    },
    "offload_graph": (
        lambda: Truncated(1, "graph", offload=True),
        diffopt.HyperparameterError,
        "checkpoint='graph', expected one that stores",
    ),
    **{
        f"batches_{name}": (partial(solve, square, None, batches=x), diffopt.BatchesError, f"{said}.*expected a t.* 3")
        for name, x, said in (
            ("length", torch.ones(4, 2), r"shape \(4, 2\)"),
            ("scalar", torch.tensor(1.0), r"shape \(\)"),
            ("no_tensors", {"a": 1}, "dict"),
            ("empty", {}, "dict {}"),
            ("leaf", {"a": torch.ones(3), "b": 1}, r"batches\['b'\] is int 1"),
        )
    },
    "gradient_of_outer": (lambda: outer(lambda w: (0 * w).sqrt()), diffopt.NonFiniteGradientError, "not finite itself"),
    "gradient_of_inner": (
        lambda: outer(square, lambda w: w.abs().pow(1.5).sum(), tensor(0, 1)),
        diffopt.NonFiniteGradientError,
        "is finite. C",
    ),
}
FAULTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    **{f"loss_{name}": (partial(solve, loss), *rest) for name, (loss, *rest) in LOSSES.items()},
    **{
        f"loss_{name}_vmap": (partial(vmap(partial(solve, loss)), torch.ones(4, 2, dtype=torch.float64)), *rest)
        for name, (loss, *rest) in LOSSES.items()
        if name != "item"  # which vmap refuses by itself
    },
    **{
        f"loss_{name}_{rule.__name__}": (partial(solve, LOSSES[name][0], estimator=rule()), *LOSSES[name][1:])
        for name in ("vector", "nan", "constant")
        for rule in (FirstOrder, ForwardMode, Unrolled)
    },
    **{f"params_{name}": (partial(solve, square, p), diffopt.LeafError, said) for name, (p, said) in TREES.items()},
    **{f"lr_{name}": (lambda lr=lr: solve_pair(SGD(lr)), *rest) for name, (lr, *rest) in LEARNING_RATES.items()},
    **{
        f"{kind.__name__}_{options}": (
            partial(kind, **options),
            diffopt.HyperparameterError,
            f"{kind.__name__}: {name}",
        )
        for kind, options in OPTIONS
        for name in [next(iter(options))]
    },
    **OTHERS,
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_refused_by_its_own_error(name: str) -> None:
    fault, kind, said = FAULTS[name]
    with pytest.raises(kind, match=said) as caught:
        fault()
    assert type(caught.value) is kind
    assert isinstance(caught.value, diffopt.DiffoptError)
    assert len(str(caught.value)) < 350


def test_what_is_finite_is_not_refused() -> None:
    """A coordinate without influence, a step of size zero, a gradient of zero, no step at all."""
    assert torch.equal(solve(lambda p: p["a"].square().sum(), dict(PAIR))["b"], PAIR["b"])
    assert torch.equal(solve(optimizer=SGD(0.0)), tensor(1, 2))
    assert torch.equal(solve(square, tensor(0, 0)), tensor(0, 0))
    assert torch.equal(solve(steps=0), tensor(1, 2))


def test_numbers_of_numpy_are_numbers() -> None:
    for params in (tensor(1, 2), tensor(1)):
        assert torch.equal(solve(square, params, optimizer=SGD(np.float64(0.1))), solve(square, params))


def test_a_vector_takes_a_matrix_as_its_factor() -> None:
    assert torch.allclose(factors((0.5 * EYES[1],), (None, EYES[3]))["a"], tensor(0.9**3))
