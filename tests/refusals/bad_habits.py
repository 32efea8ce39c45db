"""Bad inputs: what is often passed in place of an argument, each answered with what to write instead."""

from __future__ import annotations

import functools
from collections import UserDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from bad_row import Row, solve, square, tensor
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import diffopt
from diffopt import SGD, Schedule
from diffopt.linear_solve import Nystrom


@dataclass(frozen=True)
class Frozen:
    scale: Tensor


@dataclass(frozen=True, slots=True)
class Slotted:
    scale: Tensor


class Silent:
    def __repr__(self) -> str:
        raise RuntimeError("not to be shown")


def attempt(loss: Any = square, params: Any = None, *args: Any, **options: Any) -> Any:
    """``solve`` of what cannot be looked at beforehand."""
    options = {"optimizer": SGD(0.1), "steps": 3, **options}
    return diffopt.solve(loss, tensor(1, 2) if params is None else params, *args, **options)


def looped() -> list[Any]:
    own: list[Any] = [tensor(1)]
    own.append(own)
    return own


def leaf() -> Tensor:
    return tensor(0.5).requires_grad_()


def scheduler() -> Any:
    return torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([tensor(1)], lr=0.1), lambda epoch: 1.0)


NET = nn.Linear(2, 1)
PAIRS = dict(NET.named_parameters())
OF_MODULE = r"write function, params = diffopt\.functional\(module\): pass params, call function\(params, x\)"
REGISTER = r"no tree: pass a dict, as (vars|dict)\(\.\.\.\), or optree\.register_pytree_node\(\w+, "
SLOTTED = r"no tree: pass a dict of its fields, or optree\.register_pytree_node\(Slotted"
# name -> params, what the message says
PARAMS: dict[str, tuple[Callable[[], Any], str]] = {
    "parameters": (NET.parameters, OF_MODULE),
    "named_parameters": (NET.named_parameters, OF_MODULE),
    "list_of_pairs": (lambda: list(NET.named_parameters()), r"pass dict\(\.\.\.\) of pairs"),
    "items": (PAIRS.items, r"pass list\(\.\.\.\) of it, or dict\(\.\.\.\) of pairs"),
    "values": (PAIRS.values, r"pass list\(\.\.\.\) of it"),
    "zip": (lambda: zip("ab", [tensor(1)], strict=False), r"or dict\(\.\.\.\) of pairs"),
    "module_in_a_tree": (lambda: {"net": NET}, OF_MODULE),
    "optimizer": (lambda: torch.optim.SGD(NET.parameters(), lr=0.1), OF_MODULE),
    "namespace": (lambda: SimpleNamespace(a=tensor(1)), REGISTER),
    "user_dict": (lambda: UserDict(a=tensor(1)), REGISTER),
    "frozen": (lambda: Frozen(tensor(1)), REGISTER),
    "slotted": (
        lambda: Slotted(tensor(1)),
        SLOTTED,
    ),
    "silent": (Silent, "is Silent object, expected"),
    "loader": (lambda: DataLoader([1]), r"data goes in \*args or batches"),
    "number": (lambda: np.float64(1), r"convert it with torch\.as_tensor"),
    "lazy": (lambda: nn.LazyLinear(2).weight, "is a UninitializedParameter, .*call the lazy module once"),
    "float8": (lambda: torch.ones(2).to(torch.float8_e4m3fn), r"calculated with; convert it with \.to\(torch\.float32"),
}
FROM_TORCH = r"lift the class: diffopt\.from_torch\("
OPTIMIZERS: dict[str, tuple[Callable[[], Any], str]] = {
    "class": (lambda: torch.optim.SGD, rf"write diffopt\.SGD\(lr=\.\.\.\), or {FROM_TORCH}torch\.optim\.SGD, "),
    "instance": (lambda: torch.optim.Adam([tensor(1)]), rf"diffopt\.Adam\(lr=\.\.\.\), or {FROM_TORCH}torch\.optim\.A"),
    "without_a_native_one": (lambda: torch.optim.NAdam, rf"such as SGD; {FROM_TORCH}torch\.optim\.NAdam, lr="),
    "of_a_user": (lambda: type("Mine", (torch.optim.SGD,), {}), rf"SGD; {FROM_TORCH}Mine, lr="),
    "partial": (lambda: functools.partial(torch.optim.SGD, lr=0.1), rf"{FROM_TORCH}torch\.optim\.SGD"),
    "scheduler": (scheduler, r"lr=diffopt\.Schedule\(values\), one a step"),
    "pair": (lambda: (lambda params: (), lambda *args: args), r"diffopt\.from_torchopt\(pair\)"),
}
OF_THE_STEP = r"a function of the step: diffopt\.Schedule\(\[lr\(t\) for t in range\(steps\)\]\)"
RATES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "function": (lambda: lambda step: 0.1, diffopt.HyperparameterError, OF_THE_STEP),
    "parameters_of_a_module": (
        lambda: NET.parameters(),
        diffopt.HyperparameterError,
        r"takes no parameters here: they are solve's second argument, solve\(loss, params, \.\.\.\)",
    ),
    "named_parameters_of_a_module": (
        lambda: NET.named_parameters(),
        diffopt.HyperparameterError,
        "takes no parameters here: they are solve's second argument",
    ),
    "schedule_of_a_function": (lambda: Schedule(lambda step: 0.1), diffopt.HyperparameterError, OF_THE_STEP),
    "scheduler": (
        scheduler,
        diffopt.HyperparameterError,
        r"a scheduler's values, one for each step: ",
    ),
    "array": (
        lambda: np.array([0.1, 0.1, 0.1]),
        diffopt.HyperparameterError,
        r"one value for each step: ",
    ),
    "numpy_negative": (lambda: np.float32(-1), diffopt.HyperparameterError, r"is -1\.0, expected 0 <= lr"),
    "numpy_nan": (lambda: np.float64("nan"), diffopt.HyperparameterError, "is nan, expected 0 <= lr"),
    "numpy_bool": (lambda: np.bool_(True), diffopt.HyperparameterError, "is True, expected 0 <= lr"),
    "beyond_all_floats": (lambda: 10**400, diffopt.HyperparameterError, r"is 1000.*\.\.\., expected 0 <= lr"),
    "beyond_float64": (lambda: 1e300, diffopt.DivergenceError, "check the learning rate"),
    "a_large_integer": (lambda: 10**300, diffopt.DivergenceError, "check the learning rate"),
}
LISTED = r"perhaps one batch for each step, expected .*: put them into a tuple or a dict"
STACKED = r"tuple\(torch\.stack\(x\) for x in zip\(\*batches"
# name -> batches for three steps, what the message says
BATCHES: dict[str, tuple[Callable[[], Any], str]] = {
    "of_pairs": (lambda: [(torch.ones(3, 2), torch.ones(3))] * 3, f"{STACKED}.*{LISTED[-30:]}"),
    "of_lists": (lambda: [[torch.ones(3), torch.ones(3)]] * 3, STACKED),
    "of_dicts": (lambda: [{"x": torch.ones(3)}] * 3, r"\{key: torch\.stack\(\[b\[key\] for b in batches\]\)"),
    "of_tensors": (lambda: [torch.ones(3, 2)] * 3, r"list of 3 alike.*torch\.stack\(batches\)"),
    "of_ragged_pairs": (lambda: [(torch.ones(3, n), torch.ones(3)) for n in (1, 2, 3)], STACKED),
    "in_a_tuple": (lambda: ((torch.ones(3, 2), torch.ones(3)),) * 3, f"tuple of 3 alike.*{STACKED}"),
    "in_a_deque": (lambda: deque([(torch.ones(3), torch.ones(3))] * 3), "deque of 3 alike"),
    "larger": (lambda: [(torch.ones(8, 2), torch.ones(8))] * 3, f"if it is a list of batches, stack .*{STACKED}"),
    "too_many": (lambda: [(torch.ones(8, 2), torch.ones(8))] * 5, rf"{STACKED}\[:3\]"),
    "too_few": (lambda: [(torch.ones(8, 2), torch.ones(8))] * 2, r"there are 2 for 3 steps"),
    "loader": (
        lambda: DataLoader([1, 2]),
        r"write diffopt\.Batches\(loader\.dataset, batch_size=1\), or take 3 batches",
    ),
    "dataset": (lambda: TensorDataset(torch.ones(3)), r"write diffopt\.Batches\(dataset, batch_size\)"),
    "iterator": (lambda: iter([torch.ones(3)]), r"take 3 batches in a list"),
    "class": (lambda: diffopt.Batches, r"call it, as in diffopt\.Batches\(dataset, batch_size\)"),
}


def scaled(w: Tensor, held: Any) -> Tensor:
    held = held["inner"] if isinstance(held, dict) else held
    scale = held["scale"] if isinstance(held, UserDict) else held.scale
    return square(w) * scale.sum()


def module_with_scale() -> nn.Module:
    module = nn.Module()
    module.scale = nn.Parameter(tensor(0.5))
    return module


INSIDE = r"reads `args\[0\].*scale.*`.* `args\[0\].*` is "
# name -> an argument with a meta-parameter inside, what the message says
OBJECTS: dict[str, tuple[Callable[[], Any], str]] = {
    "namespace": (lambda: SimpleNamespace(scale=leaf()), INSIDE + REGISTER),
    "frozen": (lambda: Frozen(leaf()), INSIDE + REGISTER),
    "slotted": (
        lambda: Slotted(leaf()),
        INSIDE + SLOTTED,
    ),
    "user_dict": (lambda: UserDict(scale=leaf()), INSIDE + REGISTER),
    "in_a_dict": (lambda: {"inner": SimpleNamespace(scale=leaf())}, INSIDE + REGISTER),
    "computed": (lambda: SimpleNamespace(scale=2 * leaf()), INSIDE + REGISTER),
    "module": (
        module_with_scale,
        INSIDE + r"a module, no tree: write function, params = diffopt\.functional\(module\), ",
    ),
}


def over_tasks(loss: Any, *args: Any, **options: Any) -> Any:
    return diffopt.mean_over_tasks(loss, *args, **options)


def product(w: Tensor, x: Tensor) -> Tensor:
    return (w * x).sum()


NOT_SYMMETRIC = torch.tensor([[3.0, 2.0], [-2.0, 3.0]], dtype=torch.float64)
ROOTED = r"by params\['b'\] is nan at the initial params, .*check for roots, norms or logarithms at zero"
OTHERS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "params_hold_themselves": (lambda: attempt(square, looped()), diffopt.StructureError, "holds itself"),
    "args_hold_themselves": (lambda: attempt(square, None, looped()), diffopt.StructureError, "holds itself"),
    "batches_hold_themselves": (lambda: attempt(batches=looped()), diffopt.StructureError, "holds itself"),
    "tasks_hold_themselves": (lambda: over_tasks(product, looped()), diffopt.StructureError, "holds itself"),
    "lazy_argument": (
        lambda: attempt(square, None, {"w": nn.LazyLinear(2).weight}),
        diffopt.LeafError,
        r"args\[0\]\['w'\] is a UninitializedParameter, expected a tensor with a shape; call the lazy module",
    ),
    "lazy_batches": (
        lambda: attempt(batches=nn.LazyLinear(2).weight),
        diffopt.LeafError,
        "batches is a UninitializedParameter, expected a tensor with a shape; call the lazy module",
    ),
    "generator_argument": (
        lambda: solve(lambda w, x: square(w) * next(x).sum(), None, (x for x in [leaf()] * 9)),
        diffopt.CapturedTensorError,
        r"may come from `args\[0\]`, a generator, .*used up by the first step: pass a list",
    ),
    "loss_with_aux": (
        lambda: solve(lambda w: (square(w), {"accuracy": 1.0})),
        diffopt.LossError,
        r"return the scalar alone, or a pair \(loss, aux\) with has_aux=True",
    ),
    "task_loss_with_aux": (
        lambda: over_tasks(lambda w: (square(w), 1), torch.ones(3, 2)),
        diffopt.LossError,
        "task_loss returned tuple .*return the scalar alone",
    ),
    "lifted_instance": (
        lambda: diffopt.from_torch(torch.optim.NAdam([tensor(1)])),
        diffopt.OptimizerError,
        r"got NAdam .*expected an optimizer class, .*; write from_torch\(torch\.optim\.NAdam, lr=0\.1\)",
    ),
    "lifted_number": (
        lambda: diffopt.from_torch(0.1),
        diffopt.OptimizerError,
        r"got float 0\.1, expected an optimizer class, .*; write from_torch\(torch\.optim\.Adam, lr=0\.1\)",
    ),
    "battery_of_a_torch_class": (
        lambda: diffopt.testing.check_optimizer(torch.optim.AdamW),
        diffopt.OptimizerError,
        rf"expected a diffopt\.Optimizer and a dataclass; write diffopt\.AdamW\(lr=\.\.\.\), or {FROM_TORCH}",
    ),
    "steps_bool": (lambda: solve(steps=np.bool_(True)), diffopt.StepsError, "is bool True, expected an integer"),
    "compile": (lambda: solve(compile="yes"), diffopt.HyperparameterError, "compile is str 'yes', expected True"),
    "root_at_zero": (
        lambda: solve(lambda p: square(p["a"]) + p["b"].norm(p=2).sqrt(), {"a": tensor(1), "b": tensor(0, 0)}),
        diffopt.NonFiniteGradientError,
        ROOTED,
    ),
    "no_function": (lambda: over_tasks(3, tensor(1)), diffopt.LossError, "task_loss is int 3, expected a function"),
    "other_arity": (
        lambda: over_tasks(lambda x: x, tensor(1), tensor(1)),
        diffopt.LossError,
        "task_loss takes .* and was given 2 arguments",
    ),
    **{
        f"in_dims_{name}": (
            lambda dims=dims: over_tasks(product, torch.ones(2), torch.ones(2, 2), in_dims=dims),
            diffopt.HyperparameterError,
            "expected an integer or None, or one of these for each of 2 arguments",
        )
        for name, dims in {
            "float": 1.5,
            "dict": {0: None, 1: 0},
            "nested": (None, {"x": 0}),
            "string": "00",
            "set": {0, 1},
            "bool": (None, True),
        }.items()
    },
    "sparse_tasks": (
        lambda: over_tasks(lambda x: x.sum(), torch.eye(2).to_sparse()),
        diffopt.ShapeError,
        "a dense one",
    ),
    "random_tasks": (
        lambda: over_tasks(lambda x: (x * torch.rand(2)).sum(), torch.ones(2, 2)),
        diffopt.RandomnessError,
        "task_loss draws random numbers under vmap, .*randomness='different'",
    ),
    "not_symmetric": (
        lambda: Nystrom(2, 0.1).solve(lambda x: NOT_SYMMETRIC @ x, tensor(1, 2)),
        diffopt.LinearSolveError,
        "broke down .*expected a symmetric .*GMRES if it is not symmetric",
    ),
}

ROWS: dict[str, Row] = {
    **{
        f"habit_params_{name}": Row(
            "habit", lambda make=make: attempt(square, make()), diffopt.LeafError, f"{says}", "params"
        )
        for name, (make, says) in PARAMS.items()
    },
    **{
        f"habit_optimizer_{name}": Row(
            "habit",
            lambda make=make: solve(optimizer=make()),
            diffopt.OptimizerError,
            f"expected .*{says}",
            "optimizer",
        )
        for name, (make, says) in OPTIMIZERS.items()
    },
    **{
        f"habit_lr_{name}": Row("habit", lambda make=make: solve(optimizer=SGD(make())), error, says)
        for name, (make, error, says) in RATES.items()
    },
    **{
        f"habit_batches_{name}": Row(
            "habit", lambda make=make: attempt(batches=make()), diffopt.BatchesError, says, "batches"
        )
        for name, (make, says) in BATCHES.items()
    },
    **{
        f"habit_object_{name}": Row(
            "habit", lambda make=make: solve(scaled, None, make()), diffopt.CapturedTensorError, says, "args[0]"
        )
        for name, (make, says) in OBJECTS.items()
    },
    **{f"habit_{name}": Row("habit", call, error, says) for name, (call, error, says) in OTHERS.items()},
}
