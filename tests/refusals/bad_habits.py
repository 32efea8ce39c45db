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
from bad_row import Refused, product, solve, square, tensor
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import diffopt
from diffopt import SGD, DivergenceError, HyperparameterError, LeafError, LossError, OptimizerError, StructureError
from diffopt.linear_solve import Nystrom

refused = Refused("habit")


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


def leaf() -> Tensor:
    return tensor(0.5).requires_grad_()


def lazy() -> Tensor:
    return nn.LazyLinear(2).weight


def scheduler() -> Any:
    return torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([tensor(1)], lr=0.1), lambda epoch: 1.0)


# --------------------------------------------------------------------------- in place of params

NET = nn.Linear(2, 1)
PAIRS = dict(NET.named_parameters())
OF_MODULE = r"write function, params = diffopt\.functional\(module\): pass params, call function\(params, x\)"
OF_PAIRS = r"or dict\(\.\.\.\) of pairs"
REGISTER = r"no tree: pass a dict, as (vars|dict)\(\.\.\.\), or optree\.register_pytree_node\(\w+, "
SLOTTED = r"no tree: pass a dict of its fields, or optree\.register_pytree_node\(Slotted"
FLOAT8 = r"calculated with; convert it with \.to\(torch\.float32"


instead_of_params = functools.partial(refused, LeafError, path="params")


@instead_of_params(OF_MODULE, NET.parameters)
@instead_of_params(OF_MODULE, NET.named_parameters)
@instead_of_params(r"pass dict\(\.\.\.\) of pairs", lambda: list(NET.named_parameters()), name="list_of_pairs")
@instead_of_params(rf"pass list\(\.\.\.\) of it, {OF_PAIRS}", PAIRS.items)
@instead_of_params(r"pass list\(\.\.\.\) of it", PAIRS.values)
@instead_of_params(OF_PAIRS, lambda: zip("ab", [tensor(1)], strict=False), name="zip")
@instead_of_params(OF_MODULE, lambda: {"net": NET}, name="module_in_a_tree")
@instead_of_params(OF_MODULE, lambda: torch.optim.SGD(NET.parameters(), lr=0.1), name="optimizer_as_params")
@instead_of_params(REGISTER, lambda: SimpleNamespace(a=tensor(1)), name="namespace")
@instead_of_params(REGISTER, lambda: UserDict(a=tensor(1)), name="user_dict")
@instead_of_params(REGISTER, lambda: Frozen(tensor(1)), name="frozen")
@instead_of_params(SLOTTED, lambda: Slotted(tensor(1)), name="slotted")
@instead_of_params("is Silent object, expected", Silent)
@instead_of_params(r"data goes in \*args or batches", lambda: DataLoader([1]), name="loader_as_params")
@instead_of_params(r"convert it with torch\.as_tensor", lambda: np.float64(1), name="number")
@instead_of_params("is a UninitializedParameter, .*call the lazy module once", lazy)
@instead_of_params(FLOAT8, lambda: torch.ones(2).to(torch.float8_e4m3fn), name="float8")
def params(make: Callable[[], Any]) -> None:
    attempt(square, make())


# --------------------------------------------------------------------------- in place of an optimizer

FROM_TORCH = r"lift the class: diffopt\.from_torch\("
OR_LIFT = rf"write diffopt\.SGD\(lr=\.\.\.\), or {FROM_TORCH}torch\.optim\.SGD, "
OR_LIFT_ADAM = rf"diffopt\.Adam\(lr=\.\.\.\), or {FROM_TORCH}torch\.optim\.A"
instead_of_an_optimizer = functools.partial(refused, OptimizerError, path="optimizer")


def pair(params: Any) -> tuple[Any, ...]:
    return ()


@instead_of_an_optimizer(f"expected .*{OR_LIFT}", torch.optim.SGD)
@instead_of_an_optimizer(f"expected .*{OR_LIFT_ADAM}", torch.optim.Adam([tensor(1)]), name="instance")
@instead_of_an_optimizer(rf"expected .*such as SGD; {FROM_TORCH}torch\.optim\.NAdam, lr=", torch.optim.NAdam)
@instead_of_an_optimizer(rf"expected .*SGD; {FROM_TORCH}Mine, lr=", type("Mine", (torch.optim.SGD,), {}))
@instead_of_an_optimizer(rf"{FROM_TORCH}torch\.optim\.SGD", functools.partial(torch.optim.SGD, lr=0.1), name="partial")
@instead_of_an_optimizer(r"expected .*lr=diffopt\.Schedule\(values\), one a step", scheduler(), name="a_scheduler")
@instead_of_an_optimizer(r"expected .*diffopt\.from_torchopt\(pair\)", (pair, pair))
def optimizer(value: Any) -> None:
    solve(optimizer=value)


# --------------------------------------------------------------------------- in place of a step size

OF_THE_STEP = r"a function of the step: diffopt\.Schedule\(\[lr\(t\) for t in range\(steps\)\]\)"
NO_PARAMETERS = "takes no parameters here: they are solve's second argument"
instead_of_a_rate = functools.partial(refused, HyperparameterError)


def decaying(step: int) -> float:
    return 0.1


@instead_of_a_rate(OF_THE_STEP, lambda: decaying, name="rate_is_a_function")
@instead_of_a_rate(rf"{NO_PARAMETERS}, solve\(loss, params, \.\.\.\)", NET.parameters)
@instead_of_a_rate(NO_PARAMETERS, NET.named_parameters)
@instead_of_a_rate(OF_THE_STEP, lambda: diffopt.Schedule(decaying), name="schedule_of_a_function")
@instead_of_a_rate(r"a scheduler's values, one for each step: ", scheduler)
@instead_of_a_rate(r"one value for each step: ", lambda: np.array([0.1, 0.1, 0.1]), name="rates_in_an_array")
@instead_of_a_rate(r"is -1\.0, expected 0 <= lr", lambda: np.float32(-1), name="numpy_negative")
@instead_of_a_rate("is nan, expected 0 <= lr", lambda: np.float64("nan"), name="numpy_nan")
@instead_of_a_rate("is True, expected 0 <= lr", lambda: np.bool_(True), name="numpy_bool")
@instead_of_a_rate(r"is 1000.*\.\.\., expected 0 <= lr", lambda: 10**400, name="beyond_all_floats")
@refused(DivergenceError, "check the learning rate", lambda: 1e300, name="beyond_float64")
@refused(DivergenceError, "check the learning rate", lambda: 10**300, name="a_large_integer")
def rate(make: Callable[[], Any]) -> None:
    solve(optimizer=SGD(make()))


# --------------------------------------------------------------------------- in place of stacked batches

STACKED = r"tuple\(torch\.stack\(x\) for x in zip\(\*batches"
LISTED = f"{STACKED}.*: put them into a tuple or a dict"
OF_KEYS = r"\{key: torch\.stack\(\[b\[key\] for b in batches\]\)"
OF_A_LOADER = r"write diffopt\.Batches\(loader\.dataset, batch_size=1\), or take 3 batches"


def regression(rows: int = 3) -> tuple[Tensor, Tensor]:
    return torch.ones(rows, 2), torch.ones(rows)


# name -> batches for three steps, what the message says
BATCHES: dict[str, tuple[Callable[[], Any], str]] = {
    "of_pairs": (lambda: [regression()] * 3, LISTED),
    "of_lists": (lambda: [[torch.ones(3), torch.ones(3)]] * 3, STACKED),
    "of_dicts": (lambda: [{"x": torch.ones(3)}] * 3, OF_KEYS),
    "of_tensors": (lambda: [torch.ones(3, 2)] * 3, r"list of 3 alike.*torch\.stack\(batches\)"),
    "of_ragged_pairs": (lambda: [(torch.ones(3, n), torch.ones(3)) for n in (1, 2, 3)], STACKED),
    "in_a_tuple": (lambda: (regression(),) * 3, f"tuple of 3 alike.*{STACKED}"),
    "in_a_deque": (lambda: deque([(torch.ones(3), torch.ones(3))] * 3), "deque of 3 alike"),
    "larger": (lambda: [regression(8)] * 3, f"if it is a list of batches, stack .*{STACKED}"),
    "too_many": (lambda: [regression(8)] * 5, rf"{STACKED}\[:3\]"),
    "too_few": (lambda: [regression(8)] * 2, r"there are 2 for 3 steps"),
    "loader": (lambda: DataLoader([1, 2]), OF_A_LOADER),
    "dataset": (lambda: TensorDataset(torch.ones(3)), r"write diffopt\.Batches\(dataset, batch_size\)"),
    "iterator": (lambda: iter([torch.ones(3)]), r"take 3 batches in a list"),
    "class": (lambda: diffopt.Batches, r"call it, as in diffopt\.Batches\(dataset, batch_size\)"),
}


def batches(make: Callable[[], Any]) -> None:
    attempt(batches=make())


for name, (make, says) in BATCHES.items():
    refused(diffopt.BatchesError, says, make, path="batches", name=f"batches_{name}")(batches)


# --------------------------------------------------------------------------- objects that hold tensors


def module_with_scale() -> nn.Module:
    module = nn.Module()
    module.scale = nn.Parameter(tensor(0.5))
    return module


INSIDE = r"reads `args\[0\].*scale.*`.* `args\[0\].*` is "
NO_TREE = r"a module, no tree: write function, params = diffopt\.functional\(module\), "
instead_of_a_tree = functools.partial(refused, diffopt.CapturedTensorError, path="args[0]")


@instead_of_a_tree(INSIDE + REGISTER, lambda: SimpleNamespace(scale=leaf()), name="object_namespace")
@instead_of_a_tree(INSIDE + REGISTER, lambda: Frozen(leaf()), name="object_frozen")
@instead_of_a_tree(INSIDE + SLOTTED, lambda: Slotted(leaf()), name="object_slotted")
@instead_of_a_tree(INSIDE + REGISTER, lambda: UserDict(scale=leaf()), name="object_user_dict")
@instead_of_a_tree(INSIDE + REGISTER, lambda: {"inner": SimpleNamespace(scale=leaf())}, name="object_in_a_dict")
@instead_of_a_tree(INSIDE + REGISTER, lambda: SimpleNamespace(scale=2 * leaf()), name="object_computed")
@instead_of_a_tree(INSIDE + NO_TREE, module_with_scale)
def argument(make: Callable[[], Any]) -> None:
    def scaled(w: Tensor, held: Any) -> Tensor:
        held = held["inner"] if isinstance(held, dict) else held
        scale = held["scale"] if isinstance(held, UserDict) else held.scale
        return square(w) * scale.sum()

    solve(scaled, None, make())


def looped() -> list[Any]:
    own: list[Any] = [tensor(1)]
    own.append(own)
    return own


@refused(StructureError, "holds itself", square, looped())
@refused(StructureError, "holds itself", square, None, looped())
@refused(StructureError, "holds itself", batches=looped())
def tree_of_itself(*args: Any, **options: Any) -> None:
    attempt(*args, **options)


CALL_IT_ONCE = "is a UninitializedParameter, expected a tensor with a shape; call the lazy module"


@refused(LeafError, rf"args\[0\]\['w'\] {CALL_IT_ONCE}")
def lazy_argument() -> None:
    attempt(square, None, {"w": lazy()})


@refused(LeafError, f"batches {CALL_IT_ONCE}")
def lazy_batches() -> None:
    attempt(batches=lazy())


@instead_of_a_tree(r"may come from `args\[0\]`, a generator, .*used up by the first step: pass a list")
def generator_argument() -> None:
    solve(lambda w, x: square(w) * next(x).sum(), None, (x for x in [leaf()] * 9))


# --------------------------------------------------------------------------- losses of tasks, and others


def with_aux(w: Tensor) -> Any:
    return square(w), {"accuracy": 1.0}


def noisy(x: Tensor) -> Tensor:
    return product(x, torch.rand(2))


AXES = "expected an integer or None, or one of these for each of 2 arguments"
TWO = torch.ones(2), torch.ones(2, 2)


@refused(StructureError, "holds itself", product, looped())
@refused(LossError, "task_loss returned tuple .*return the scalar alone", with_aux, torch.ones(3, 2))
@refused(LossError, "task_loss is int 3, expected a function", 3, tensor(1))
@refused(LossError, "task_loss takes .* and was given 2 arguments", noisy, tensor(1), tensor(1))
@refused(diffopt.ShapeError, "a dense one", torch.sum, torch.eye(2).to_sparse())
@refused(diffopt.RandomnessError, "draws random numbers under vmap, .*randomness='different'", noisy, torch.ones(2, 2))
@refused(HyperparameterError, "in_dims is", product, *TWO, in_dims=(None, "0"))
@refused(HyperparameterError, AXES, product, *TWO, in_dims=(None,))
@refused(HyperparameterError, "in_dims is dict {", product, *TWO, in_dims={None: 0, 0: 1})
@refused(diffopt.ShapeError, "one common length", product, *TWO, in_dims=(None, None))
@refused(diffopt.ShapeError, "one common length", product, torch.ones(3), torch.ones(4, 3), in_dims=(0, 0))
@refused(diffopt.ShapeError, "expected an axis 3", product, *TWO, in_dims=(None, 3))
@refused(HyperparameterError, "task_chunk is int 0, expected None or an integer >= 1", torch.sum, TWO[1], task_chunk=0)
@refused(HyperparameterError, "task_chunk is bool True", torch.sum, TWO[1], task_chunk=True)
@refused(HyperparameterError, "randomness is str 'some'", torch.sum, TWO[1], randomness="some")
@refused(HyperparameterError, "check is", torch.sum, TWO[1], check=1)
@refused(LossError, "task_loss returned", torch.square, TWO[1])
@refused(HyperparameterError, AXES, product, *TWO, in_dims=1.5)
@refused(HyperparameterError, AXES, product, *TWO, in_dims={0: None, 1: 0})
@refused(HyperparameterError, AXES, product, *TWO, in_dims=(None, {"x": 0}))
@refused(HyperparameterError, AXES, product, *TWO, in_dims="00")
@refused(HyperparameterError, AXES, product, *TWO, in_dims={0, 1})
@refused(HyperparameterError, AXES, product, *TWO, in_dims=(None, True))
def mean_over_tasks(loss: Any, *args: Any, **options: Any) -> None:
    diffopt.mean_over_tasks(loss, *args, **options)


@refused(LossError, r"return the scalar alone, or a pair \(loss, aux\) with has_aux=True")
def loss_with_aux() -> None:
    solve(with_aux)


A_CLASS = r"expected an optimizer class, .*; write from_torch\(torch\.optim\.{}, lr=0\.1\)"


@refused(OptimizerError, "got NAdam .*" + A_CLASS.format("NAdam"), torch.optim.NAdam([tensor(1)]), name="lifted")
@refused(OptimizerError, r"got float 0\.1, " + A_CLASS.format("Adam"), 0.1)
def from_torch(kind: Any) -> None:
    diffopt.from_torch(kind)


@refused(
    OptimizerError,
    rf"expected a diffopt\.Optimizer and a dataclass; write diffopt\.AdamW\(lr=\.\.\.\), or {FROM_TORCH}",
)
def battery_of_a_torch_class() -> None:
    diffopt.testing.check_optimizer(torch.optim.AdamW)


@refused(diffopt.StepsError, "is bool True, expected an integer", steps=np.bool_(True))
@refused(HyperparameterError, "compile is str 'yes', expected True", compile="yes")
def solve_with(**options: Any) -> None:
    solve(**options)


ROOTED = r"by params\['b'\] is nan at the initial params, .*check for roots, norms or logarithms at zero"


@refused(diffopt.NonFiniteGradientError, ROOTED)
def root_at_zero() -> None:
    solve(lambda p: square(p["a"]) + p["b"].norm(p=2).sqrt(), {"a": tensor(1), "b": tensor(0, 0)})


@refused(diffopt.LinearSolveError, "broke down .*expected a symmetric .*GMRES if it is not symmetric")
def not_symmetric() -> None:
    matrix = tensor(3, 2, -2, 3).view(2, 2)
    Nystrom(2, 0.1).solve(lambda x: matrix @ x, tensor(1, 2))
