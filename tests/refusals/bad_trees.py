"""Bad inputs: trees of parameters, arguments, batches, hyperparameters and cotangents that do not fit."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from bad_row import Row, both, elsewhere, pair, solve, square, tensor
from torch import nn
from torch.func import vmap

import diffopt
from diffopt import SGD, Preconditioned, ProximalGD, Schedule

DENSE = "expected a dense floating tensor"
# name -> params, error, what it says, the path
PARAMS: dict[str, tuple[Any, type[Exception], str, str]] = {
    "int": ({"w": tensor(1), "n": 3}, diffopt.LeafError, f"is int 3, {DENSE}", "params['n']"),
    "none_leaf": ([tensor(1), None], diffopt.LeafError, f"is NoneType None, {DENSE}", "params[1]"),
    "function": (lambda: None, diffopt.LeafError, f"is function .*{DENSE}", "params"),
    "deep": ({"layer1": {"weight": [1.0]}}, diffopt.LeafError, "is float 1.0", "params['layer1']['weight'][0]"),
    "string": ("abc", diffopt.LeafError, f"is str 'abc', {DENSE}", "params"),
    "numpy": ({"x": np.ones(2)}, diffopt.LeafError, f"is ndarray .*{DENSE}", "params['x']"),
    "bool": (torch.tensor([True]), diffopt.LeafError, f"is a bool tensor .*{DENSE}", "params"),
    "integer": ([torch.ones(2).int()], diffopt.LeafError, f"is a int32 tensor .*{DENSE}", "params[0]"),
    "complex": (torch.tensor([1j]), diffopt.LeafError, f"is a complex64 tensor .*{DENSE}", "params"),
    "sparse": ({"w": torch.eye(3).to_sparse()}, diffopt.LeafError, DENSE, "params['w']"),
    "generator": ((x for x in (tensor(1),)), diffopt.LeafError, f"is generator .*{DENSE}", "params"),
    "parameters": (nn.Linear(2, 1).parameters(), diffopt.LeafError, "is generator", "params"),
    "set": ({3}, diffopt.LeafError, r"is set \{3\}", "params"),
    "empty_tensor": (
        {"w": torch.empty(0, 3)},
        diffopt.LeafError,
        r"\(0, 3\): it is empty, expected at l",
        "params['w']",
    ),
    "empty_dict": ({}, diffopt.LeafError, "is an empty tree, expected at least one floating tensor", "params"),
    "empty_branches": ({"a": {}, "b": []}, diffopt.LeafError, "is an empty tree, expected at least one", "params"),
    "module": (
        nn.Linear(1, 1),
        diffopt.LeafError,
        r"module Linear, expected a tree of tensors; write function, params = diffopt\.functional\(module\)",
        "params",
    ),
    "two_devices": (
        {**pair(), "b": elsewhere(2)},
        diffopt.DeviceError,
        "is on meta, expected cpu as.*; move",
        "params['b']",
    ),
    "meta": ({"a": elsewhere(2)}, diffopt.DeviceError, "is on meta, expected a device that holds", "params['a']"),
}
FOR_EACH_STEP = r"one value for each step: diffopt\.Schedule\("
# name -> lr for params {"a": [1], "b": [2, 3]}, error, what it says, the path
RATES: dict[str, tuple[Any, type[Exception], str, str]] = {
    "too_few_branches": (
        {"a": 0.1},
        diffopt.StructureError,
        r"is dict .*is missing\), expected a float,.* structure ",
        "lr['b']",
    ),
    "too_many_branches": (
        {"a": 0.1, "b": 0.1, "c": 1.0},
        diffopt.StructureError,
        r"is too many\), expected .*structure of params$",
        "lr['c']",
    ),
    "list": (
        [0.1, 0.2],
        diffopt.StructureError,
        rf"is list .*expected a float, a scalar tensor.* of params; {FOR_EACH_STEP}",
        "lr",
    ),
    "list_of_tensors": ([tensor(1)], diffopt.StructureError, rf"is list .* of params; {FOR_EACH_STEP}", "lr"),
    "vector": (
        tensor(1, 1, 1),
        diffopt.StructureError,
        rf"tensor of shape \(3,\).*expected a float, a scalar .*of params; {FOR_EACH_STEP}",
        "lr",
    ),
    "schedule_tensors": (
        Schedule([tensor(1)] * 3),
        diffopt.StructureError,
        r"is list .* of params; torch\.stack the entries of a Schedule",
        "lr",
    ),
    "shape": ({"a": 0.1, "b": tensor(1, 1, 1)}, diffopt.ShapeError, r"\(3,\), expected .*\(2, 3\)", "lr['b']"),
    "dtype": (
        {"a": 0.1, "b": torch.ones(2, 3)},
        diffopt.DtypeError,
        r"float32, expected torch.float64.*\.to",
        "lr['b']",
    ),
    "integer": (torch.tensor(1), diffopt.DtypeError, "torch.int64 tensor, expected a floating dtype", "lr"),
    "integer_leaf": ({"a": 0.1, "b": torch.ones(2, 3).int()}, diffopt.DtypeError, "expected a floating", "lr['b']"),
    "device": ({"a": 0.1, "b": elsewhere(2, 3)}, diffopt.DeviceError, r"on meta, expected cpu as.*\.to\(\)", "lr['b']"),
    "meta": (elsewhere(), diffopt.DeviceError, "lr is on meta, expected cpu as params", "lr"),
    "string_leaf": ({"a": "x", "b": 0.1}, diffopt.HyperparameterError, "SGD: .* is 'x', expected 0 <= lr", "lr['a']"),
    "none_leaf": ({"a": 0.1, "b": None}, diffopt.HyperparameterError, "is None, expected 0 <= lr", "lr['b']"),
    "negative_leaf": ({"a": 0.1, "b": -0.1}, diffopt.HyperparameterError, "is -0.1, expected 0 <= lr", "lr['b']"),
    "nan_leaf": ({"a": float("nan"), "b": 0.1}, diffopt.HyperparameterError, "is nan, expected 0 <= lr", "lr['a']"),
    "numpy": (np.array([0.1, 0.2]), diffopt.StructureError, "is ndarray .*expected a float, a scalar tensor", "lr"),
    "negative": (-0.1, diffopt.HyperparameterError, r"SGD: lr is -0\.1, expected 0 <= lr", "lr"),
    "nan": (float("nan"), diffopt.HyperparameterError, "is nan, expected 0 <= lr", "lr"),
    "infinite": (float("inf"), diffopt.HyperparameterError, "is inf, expected 0 <= lr < inf", "lr"),
    "string": ("x", diffopt.HyperparameterError, "is 'x', expected 0 <= lr", "lr"),
    "none": (None, diffopt.HyperparameterError, "is None, expected 0 <= lr", "lr"),
    "bool": (True, diffopt.HyperparameterError, "is True, expected 0 <= lr", "lr"),
    "complex": (0.1j, diffopt.StructureError, "is complex 0.1j, expected a float, a scalar tensor", "lr"),
    "schedule_list": (Schedule([0.1, 0.2]), diffopt.StepsError, "schedule of lr has 2 entries, expected .* 3", "lr"),
    "schedule_tensor": (
        Schedule(tensor(1, 1)),
        diffopt.StepsError,
        "has 2 entries, expected at least one per step since the first: 3",
        "lr",
    ),
    "schedule_tree": (Schedule({"a": tensor(1, 1), "b": 0.1}), diffopt.StepsError, "has 2 entries, expect", "lr['a']"),
    "schedule_number": (Schedule(0.1), diffopt.StepsError, "is float 0.1, expected 3 values, one a step", "lr"),
    "schedule_shape": (Schedule({"a": 0.1, "b": elsewhere(3, 5)}), diffopt.ShapeError, r"\(5,\), expected", "lr['b']"),
    "schedule_negative": (Schedule([0.1, -0.1, 0.1]), diffopt.HyperparameterError, "-0.1, expected 0 <= lr", "lr[1]"),
    "schedule_none": (Schedule(None), diffopt.HyperparameterError, "is None, expected 0 <= lr", "lr"),
}
EIGHT = {f"{i}.{name}": tensor(1) for i in range(8) for name in ("weight", "bias")}
EYES = {n: torch.eye(n, dtype=torch.float64) for n in (1, 2, 3)}


def factors(first: Any, second: Any) -> Any:
    return solve(both, pair(), optimizer=Preconditioned(0.1, factors={"a": first, "b": second}))


def gradients(cotangent: Any, start: Any = None, loss: Any = both, **options: Any) -> Any:
    """Implicit gradients at a minimiser."""
    params = {name: 0 * x for name, x in pair().items()}
    return diffopt.implicit_gradients(loss, params, cotangent=cotangent, start=start, **options)


def with_b(b: Any) -> dict[str, Any]:
    return {"a": tensor(1.0), "b": b}


LIKE = "expected a tree with the structure of params: "
# name -> cotangent, error, what it says, the path
COTANGENTS: dict[str, tuple[Any, type[Exception], str, str]] = {
    "missing": ({"a": tensor(1.0)}, diffopt.StructureError, f"{LIKE}.*is missing", "cotangent['b']"),
    "extra": ({**pair(), "c": 1.0}, diffopt.StructureError, f"{LIKE}.*is too many", "cotangent['c']"),
    "none": (None, diffopt.StructureError, LIKE, "cotangent"),
    "leaf_none": (with_b(None), diffopt.ShapeError, r"NoneType None, expected the shape \(2, 3\)", "cotangent['b']"),
    "shape": (with_b(tensor(1)), diffopt.ShapeError, r"shape \(1,\).*expected the shape \(2, 3\)", "cotangent['b']"),
    "dtype": (with_b(torch.ones(2, 3)), diffopt.DtypeError, r"expected torch.float64.*\.to\(\)", "cotangent['b']"),
    "device": (with_b(elsewhere(2, 3)), diffopt.DeviceError, "is on meta, expected cpu", "cotangent['b']"),
    "nan": (
        with_b(pair()["b"] * float("nan")),
        diffopt.LinearSolveError,
        "NaN or infinite .*expected",
        "cotangent['b']",
    ),
}
BATCH = "expected a tensor whose first axis has length steps = 3, one entry per inner step"
BATCHES: dict[str, tuple[Any, str, str]] = {
    "length": ({"x": torch.ones(4, 2)}, rf"shape \(4, 2\).*{BATCH}", "batches['x']"),
    "scalar": (torch.tensor(1.0), rf"shape \(\).*{BATCH}", "batches"),
    "no_tensors": ({"a": 1}, "is dict .*expected a tree of tensors with 3 entries", "batches"),
    "empty": ({}, r"is dict \{\}, expected a tree of tensors", "batches"),
    "leaf": ({"a": torch.ones(3), "b": 1}, f"is int 1, {BATCH}", "batches['b']"),
    "numpy": (np.ones((3, 2)), "is ndarray .*expected a tree of tensors", "batches"),
    "list": ([tensor(1, 2)] * 3, rf"shape \(2,\).*{BATCH}", "batches[0]"),
    "loader": (torch.utils.data.DataLoader([1, 2]), "is DataLoader .*expected a tree of tensors", "batches"),
}


def product(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (w * x).sum()


ROWS: dict[str, Row] = {
    **{
        f"params_{name}": Row("tree", partial(solve, square, p), error, says, path)
        for name, (p, error, says, path) in PARAMS.items()
    },
    "params_nested": Row(
        "tree",
        lambda: solve(square, [torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)]),
        diffopt.LeafError,
        DENSE,
        "params[0]",
    ),
    "argument_elsewhere": Row(
        "tree",
        lambda: solve(lambda w, x: product(w, x["k"]), None, {"k": elsewhere(2)}),
        diffopt.DeviceError,
        r"is on meta, expected cpu as params; move it with \.to\(\)",
        "args[0]['k']",
    ),
    "batch_elsewhere": Row(
        "tree",
        lambda: solve(product, batches=elsewhere(3, 2)),
        diffopt.DeviceError,
        "is on meta, expected cpu as params",
        "batches",
    ),
    **{
        f"lr_{name}": Row("hyperparameter", lambda lr=lr: solve(both, pair(), optimizer=SGD(lr)), error, says, path)
        for name, (lr, error, says, path) in RATES.items()
    },
    **{
        f"batches_{name}": Row("tree", partial(solve, square, batches=b), diffopt.BatchesError, says, path)
        for name, (b, says, path) in BATCHES.items()
    },
    **{
        f"cotangent_{name}": Row("tree", partial(gradients, c), error, says, path)
        for name, (c, error, says, path) in COTANGENTS.items()
    },
    "start_shape": Row(
        "tree",
        lambda: gradients(pair(), with_b(tensor(1))),
        diffopt.ShapeError,
        r"expected the shape \(2, 3\)",
        "start['b']",
    ),
    "start_nan": Row(
        "tree",
        lambda: gradients(pair(), with_b(pair()["b"] / 0)),
        diffopt.LinearSolveError,
        "holds NaN or infinite numbers, expected finite ones",
        "start['b']",
    ),
    "factors_number": Row(
        "hyperparameter",
        lambda: factors((None,), (EYES[2],)),
        diffopt.ShapeError,
        r"for a leaf of shape \(2, 3\), expected a tuple of 2 matrices, one per axis",
        "factors",
    ),
    "factors_shape": Row(
        "hyperparameter",
        lambda: factors((None,), (EYES[2], EYES[2])),
        diffopt.ShapeError,
        r"is a float64 tensor of shape \(2, 2\).*expected the shape \(3, 3\)",
        "factor 1",
    ),
    "factors_branches": Row(
        "hyperparameter",
        lambda: solve(both, pair(), optimizer=Preconditioned(0.1, factors={"a": (None,)})),
        diffopt.StructureError,
        r"is dict .*is missing\), expected .*structure of params$",
        "factors['b']",
    ),
    "lr_kind": Row(
        "hyperparameter",
        lambda: solve(lambda p: p[0].sum(), [tensor(1)], optimizer=SGD({0: 0.1})),
        diffopt.StructureError,
        r"it has other kinds of branches\), expected .*structure of params$",
        "lr",
    ),
    "lr_list_too_short": Row(
        "hyperparameter",
        lambda: solve(lambda p: p[0].sum(), [tensor(1)] * 3, optimizer=SGD([0.1] * 2)),
        diffopt.StructureError,
        rf"is missing\), expected .*structure of params; {FOR_EACH_STEP}",
        "lr[2]",
    ),
    "lr_one_of_sixteen": Row(
        "hyperparameter",
        lambda: solve(square, EIGHT, optimizer=SGD({name: 0.1 for name in EIGHT if name != "3.bias"})),
        diffopt.StructureError,
        r"is dict .*is missing\), expected .*structure of params$",
        "lr['3.bias']",
    ),
    **{
        f"lr_for_each_step_{name}": Row(
            "hyperparameter",
            lambda lr=lr: solve(optimizer=SGD(lr)),
            kind,
            rf"expected .*; {says}",
            "lr",
        )
        for name, lr, kind, says in (
            ("list", [0.1] * 3, diffopt.HyperparameterError, FOR_EACH_STEP),
            ("tensor", tensor(1, 1, 1), diffopt.ShapeError, FOR_EACH_STEP),
            ("tensors", Schedule([tensor(1)] * 3), diffopt.HyperparameterError, "torch.stack the entries of a Sch"),
        )
    },
    "center_shape": Row(
        "hyperparameter",
        lambda: solve(both, pair(), optimizer=ProximalGD(0.1, 0.1, center=with_b(tensor(1, 2)))),
        diffopt.ShapeError,
        r"shape \(2,\), expected \(\) or the shape \(2, 3\)",
        "center['b']",
    ),
    "task_axes": Row(
        "tree",
        lambda: diffopt.mean_over_tasks(
            lambda w, x: (w * x["k"]).sum(), tensor(1), {"k": torch.ones(())}, in_dims=(None, 0)
        ),
        diffopt.ShapeError,
        "expected an axis 0 that runs over tasks; check in_dims",
        "args[1]['k']",
    ),
    "vmapped_lr_shape": Row(
        "hyperparameter",
        lambda: vmap(lambda lr: solve(square, torch.ones(2), optimizer=SGD(lr)))(torch.ones(4, 3)),
        diffopt.ShapeError,
        r"shape \(3,\), expected \(\) or the shape \(2,\) of the parameter there",
        "lr",
    ),
}
