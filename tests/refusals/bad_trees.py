"""Bad inputs: trees of parameters, arguments, batches, hyperparameters and cotangents that do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from bad_row import Refused, both, elsewhere, pair, product, solve, square, tensor
from torch import nn
from torch.func import vmap

import diffopt
from diffopt import SGD, BatchesError, HyperparameterError, LeafError, Schedule, ShapeError, StructureError

refused = Refused("tree")
DENSE = "expected a dense floating tensor"
TO_FUNCTIONAL = r"module Linear, expected a tree of tensors; write function, params = diffopt\.functional\(module\)"


@refused(LeafError, f"is int 3, {DENSE}", {"w": tensor(1), "n": 3}, path="params['n']")
@refused(LeafError, f"is NoneType None, {DENSE}", [tensor(1), None], path="params[1]")
@refused(LeafError, f"is function .*{DENSE}", square, path="params")
@refused(LeafError, "is float 1.0", {"layer1": {"weight": [1.0]}}, path="params['layer1']['weight'][0]")
@refused(LeafError, f"is str 'abc', {DENSE}", "abc", path="params")
@refused(LeafError, f"is ndarray .*{DENSE}", {"x": np.ones(2)}, path="params['x']")
@refused(LeafError, f"is a bool tensor .*{DENSE}", torch.tensor([True]), path="params")
@refused(LeafError, f"is a int32 tensor .*{DENSE}", [torch.ones(2).int()], path="params[0]")
@refused(LeafError, f"is a complex64 tensor .*{DENSE}", torch.tensor([1j]), path="params")
@refused(LeafError, DENSE, {"w": torch.eye(3).to_sparse()}, path="params['w']")
@refused(LeafError, f"is generator .*{DENSE}", (x for x in (tensor(1),)), path="params")
@refused(LeafError, "is generator", nn.Linear(2, 1).parameters(), path="params")
@refused(LeafError, r"is set \{3\}", {3}, path="params")
@refused(LeafError, r"\(0, 3\): it is empty, expected at l", {"w": torch.empty(0, 3)}, path="params['w']")
@refused(LeafError, "is an empty tree, expected at least one floating tensor", {}, path="params")
@refused(LeafError, "is an empty tree, expected at least one", {"a": {}, "b": []}, path="params")
@refused(LeafError, TO_FUNCTIONAL, nn.Linear(1, 1), path="params")
@refused(diffopt.DeviceError, "is on meta, expected cpu as.*; move", {**pair(), "b": elsewhere(2)}, path="params['b']")
@refused(diffopt.DeviceError, "is on meta, expected a device that holds", {"a": elsewhere(2)}, path="params['a']")
def params(tree: Any) -> None:
    solve(square, tree)


@refused(LeafError, DENSE, path="params[0]")
def params_nested() -> None:
    solve(square, [torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)])


@refused(diffopt.DeviceError, r"is on meta, expected cpu as params; move it with \.to\(\)", path="args[0]['k']")
def argument_elsewhere() -> None:
    solve(lambda w, x: product(w, x["k"]), None, {"k": elsewhere(2)})


@refused(diffopt.DeviceError, "is on meta, expected cpu as params", path="batches")
def batch_elsewhere() -> None:
    solve(product, batches=elsewhere(3, 2))


FOR_EACH_STEP = r"one value for each step: diffopt\.Schedule\("
STACK = r"torch\.stack the entries of a Schedule"
ONE_OR_A_TREE = "expected a float, a scalar tensor"


@refused(StructureError, r"is dict .*is missing\), expected a float,.* structure ", {"a": 0.1}, path="lr['b']")
@refused(StructureError, r"too many\), .*structure of params$", {"a": 0.1, "b": 0.1, "c": 1.0}, path="lr['c']")
@refused(StructureError, rf"is list .*{ONE_OR_A_TREE}.* of params; {FOR_EACH_STEP}", [0.1, 0.2], path="lr")
@refused(StructureError, rf"is list .* of params; {FOR_EACH_STEP}", [tensor(1)], path="lr")
@refused(StructureError, rf"\(3,\).*expected a float, .*of params; {FOR_EACH_STEP}", tensor(1, 1, 1), path="lr")
@refused(StructureError, rf"is list .* of params; {STACK}", Schedule([tensor(1)] * 3), path="lr")
@refused(StructureError, f"is ndarray .*{ONE_OR_A_TREE}", np.array([0.1, 0.2]), path="lr")
@refused(StructureError, f"is complex 0.1j, {ONE_OR_A_TREE}", 0.1j, path="lr")
@refused(ShapeError, r"\(3,\), expected .*\(2, 3\)", {"a": 0.1, "b": tensor(1, 1, 1)}, path="lr['b']")
@refused(ShapeError, r"\(5,\), expected", Schedule({"a": 0.1, "b": elsewhere(3, 5)}), path="lr['b']")
@refused(diffopt.DtypeError, r"32, expected torch.float64.*\.to", {"a": 0.1, "b": torch.ones(2, 3)}, path="lr['b']")
@refused(diffopt.DtypeError, "torch.int64 tensor, expected a floating dtype", torch.tensor(1), path="lr")
@refused(diffopt.DtypeError, "expected a floating", {"a": 0.1, "b": torch.ones(2, 3).int()}, path="lr['b']")
@refused(diffopt.DeviceError, r"on meta, expected cpu as.*\.to\(\)", {"a": 0.1, "b": elsewhere(2, 3)}, path="lr['b']")
@refused(diffopt.DeviceError, "lr is on meta, expected cpu as params", elsewhere(), path="lr")
@refused(HyperparameterError, "SGD: .* is 'x', expected 0 <= lr", {"a": "x", "b": 0.1}, path="lr['a']")
@refused(HyperparameterError, "is None, expected 0 <= lr", {"a": 0.1, "b": None}, path="lr['b']")
@refused(HyperparameterError, "is -0.1, expected 0 <= lr", {"a": 0.1, "b": -0.1}, path="lr['b']")
@refused(HyperparameterError, "is nan, expected 0 <= lr", {"a": float("nan"), "b": 0.1}, path="lr['a']")
@refused(HyperparameterError, r"SGD: lr is -0\.1, expected 0 <= lr", -0.1, path="lr")
@refused(HyperparameterError, "is nan, expected 0 <= lr", float("nan"), path="lr")
@refused(HyperparameterError, "is inf, expected 0 <= lr < inf", float("inf"), path="lr")
@refused(HyperparameterError, "is 'x', expected 0 <= lr", "x", path="lr")
@refused(HyperparameterError, "is None, expected 0 <= lr", None, path="lr")
@refused(HyperparameterError, "is True, expected 0 <= lr", True, path="lr")
@refused(HyperparameterError, "-0.1, expected 0 <= lr", Schedule([0.1, -0.1, 0.1]), path="lr[1]")
@refused(HyperparameterError, "is None, expected 0 <= lr", Schedule(None), path="lr")
@refused(diffopt.StepsError, "schedule of lr has 2 entries, expected .* 3", Schedule([0.1, 0.2]), path="lr")
@refused(
    diffopt.StepsError, "2 entries, .* at least one per step since the first: 3", Schedule(tensor(1, 1)), path="lr"
)
@refused(diffopt.StepsError, "has 2 entries, expect", Schedule({"a": tensor(1, 1), "b": 0.1}), path="lr['a']")
@refused(diffopt.StepsError, "is float 0.1, expected 3 values, one a step", Schedule(0.1), path="lr")
def lr(value: Any) -> None:
    solve(both, pair(), optimizer=SGD(value))


@refused(HyperparameterError, rf"expected .*; {FOR_EACH_STEP}", [0.1] * 3, path="lr")
@refused(ShapeError, rf"expected .*; {FOR_EACH_STEP}", tensor(1, 1, 1), path="lr")
@refused(HyperparameterError, f"expected .*; {STACK}", Schedule([tensor(1)] * 3), path="lr")
def lr_for_each_step(value: Any) -> None:
    solve(optimizer=SGD(value))


@refused(StructureError, r"has other kinds of branches\), .*structure of params$", {0: 0.1}, [tensor(1)], path="lr")
@refused(
    StructureError, rf"missing\), .*structure of params; {FOR_EACH_STEP}", [0.1] * 2, [tensor(1)] * 3, path="lr[2]"
)
def lr_of_other_branches(value: Any, params: Any) -> None:
    solve(lambda p: p[0].sum(), params, optimizer=SGD(value))


@refused(StructureError, r"is dict .*is missing\), expected .*structure of params$", path="lr['3.bias']")
def lr_of_fifteen_leaves_of_sixteen() -> None:
    leaves = {f"{i}.{name}": tensor(1) for i in range(8) for name in ("weight", "bias")}
    solve(square, leaves, optimizer=SGD({name: 0.1 for name in leaves if name != "3.bias"}))


@refused(ShapeError, r"shape \(3,\), expected \(\) or the shape \(2,\) of the parameter there", path="lr")
def vmapped_lr() -> None:
    vmap(lambda lr: solve(square, torch.ones(2), optimizer=SGD(lr)))(torch.ones(4, 3))


BATCH = "expected a tensor whose first axis has length steps = 3, one entry per inner step"


@refused(BatchesError, rf"shape \(4, 2\).*{BATCH}", {"x": torch.ones(4, 2)}, path="batches['x']")
@refused(BatchesError, rf"shape \(\).*{BATCH}", torch.tensor(1.0), path="batches")
@refused(BatchesError, "is dict .*expected a tree of tensors with 3 entries", {"a": 1}, path="batches")
@refused(BatchesError, r"is dict \{\}, expected a tree of tensors", {}, path="batches")
@refused(BatchesError, f"is int 1, {BATCH}", {"a": torch.ones(3), "b": 1}, path="batches['b']")
@refused(BatchesError, "is ndarray .*expected a tree of tensors", np.ones((3, 2)), path="batches")
@refused(BatchesError, rf"shape \(2,\).*{BATCH}", [tensor(1, 2)] * 3, path="batches[0]")
@refused(BatchesError, "DataLoader .*a tree of tensors", torch.utils.data.DataLoader([1, 2]), path="batches")
def batches(value: Any) -> None:
    solve(square, batches=value)


def with_b(b: Any) -> dict[str, Any]:
    return {"a": tensor(1.0), "b": b}


LIKE = "expected a tree with the structure of params: "
FINITE = "holds NaN or infinite numbers, expected finite ones"


@refused(StructureError, f"{LIKE}.*is missing", {"a": tensor(1.0)}, path="cotangent['b']")
@refused(StructureError, f"{LIKE}.*is too many", {**pair(), "c": 1.0}, path="cotangent['c']")
@refused(StructureError, LIKE, None, path="cotangent")
@refused(ShapeError, r"NoneType None, expected the shape \(2, 3\)", with_b(None), path="cotangent['b']")
@refused(ShapeError, r"shape \(1,\).*expected the shape \(2, 3\)", with_b(tensor(1)), path="cotangent['b']")
@refused(diffopt.DtypeError, r"expected torch.float64.*\.to\(\)", with_b(torch.ones(2, 3)), path="cotangent['b']")
@refused(diffopt.DeviceError, "is on meta, expected cpu", with_b(elsewhere(2, 3)), path="cotangent['b']")
@refused(diffopt.LinearSolveError, FINITE, with_b(pair()["b"] * float("nan")), path="cotangent['b']")
@refused(ShapeError, r"expected the shape \(2, 3\)", pair(), with_b(tensor(1)), path="start['b']")
@refused(diffopt.LinearSolveError, FINITE, pair(), with_b(pair()["b"] / 0), path="start['b']")
def implicit_gradients(cotangent: Any, start: Any = None) -> None:
    """At a minimiser."""
    minimiser = {name: 0 * x for name, x in pair().items()}
    diffopt.implicit_gradients(both, minimiser, cotangent=cotangent, start=start)


EYES = {n: torch.eye(n, dtype=torch.float64) for n in (1, 2, 3)}


@refused(
    ShapeError, r"shape \(2, 3\), expected a tuple of 2 matrices, one per axis", (None,), (EYES[2],), path="factors"
)
@refused(ShapeError, r"shape \(2, 2\).*expected the shape \(3, 3\)", (None,), (EYES[2], EYES[2]), path="factor 1")
def factors(first: Any, second: Any) -> Any:
    return solve(both, pair(), optimizer=diffopt.Preconditioned(0.1, factors={"a": first, "b": second}))


@refused(StructureError, r"is dict .*is missing\), expected .*structure of params$", path="factors['b']")
def factors_of_one_branch() -> None:
    solve(both, pair(), optimizer=diffopt.Preconditioned(0.1, factors={"a": (None,)}))


@refused(ShapeError, r"shape \(2,\), expected \(\) or the shape \(2, 3\)", path="center['b']")
def center() -> None:
    solve(both, pair(), optimizer=diffopt.ProximalGD(0.1, 0.1, center=with_b(tensor(1, 2))))


@refused(ShapeError, "expected an axis 0 that runs over tasks; check in_dims", path="args[1]['k']")
def task_axes() -> None:
    args = tensor(1), {"k": torch.ones(())}
    diffopt.mean_over_tasks(lambda w, x: product(w, x["k"]), *args, in_dims=(None, 0))
