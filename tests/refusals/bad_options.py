"""Bad inputs: optimizers, estimators, linear solvers and their options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from bad_row import Refused, solve, square
from stateless import Stateless
from torch import Tensor
from torch.func import vmap

import diffopt
from diffopt import SGD, Adagrad, Adam, AdamW, HyperparameterError, Leaves, OptimizerError, Preconditioned, RMSprop
from diffopt.estimators import (
    Binomial,
    Claims,
    ESJacobian,
    ForwardMode,
    Implicit,
    Keep,
    Krylov,
    MultiStep,
    Reverse,
    Truncated,
)
from diffopt.linear_solve import GMRES, ConjugateGradient, Dense, Neumann, Nystrom
from diffopt.testing import check_optimizer

refused = Refused("option")


def wrong(kind: Any, option: str, values: list[Any], says: str = "expected ", **right: Any) -> None:
    """Add rows: each of the values is out of range, and the message names the option."""
    error = {"solver": diffopt.EstimatorError, "steps": diffopt.StepsError}.get(option, HyperparameterError)
    for value in values:
        refused(error, f"{kind.__name__}.*{option}.* is .*{says}", path=option, **{option: value}, **right)(kind)


# --------------------------------------------------------------------------- options of optimizers

for option in ("momentum", "weight_decay"):
    wrong(SGD, option, [-1], lr=0.1)
wrong(SGD, "dampening", ["x"], lr=0.1, momentum=0.9)
wrong(SGD, "nesterov", ["yes"], lr=0.1, momentum=0.9)
for kind in (Adam, AdamW):
    for option in ("lr", "eps", "weight_decay"):
        wrong(kind, option, [-1])
    wrong(kind, "betas", [(1.0, 0.9), (0.9, -0.1), (0.9,), [0.9, 2.0], 0.9, None])
    wrong(kind, "amsgrad", [None])
for option in ("lr", "alpha", "eps", "weight_decay", "momentum"):
    wrong(RMSprop, option, [-1])
wrong(RMSprop, "centered", ["no"])
for option in ("lr", "lr_decay", "weight_decay", "eps", "initial_accumulator_value"):
    wrong(Adagrad, option, [-1])
wrong(diffopt.ProximalGD, "lr", [-1], strength=0.1)
wrong(diffopt.ProximalGD, "strength", [-1], lr=0.1)
wrong(Preconditioned, "lr", [-1], diagonal=1.0)
for kind in (SGD, Adam, AdamW, RMSprop, Adagrad):
    wrong(kind, "maximize", [1], lr=0.1)

# --------------------------------------------------------------------------- options of estimators and solvers

NAN, INFINITE, HUGE = float("nan"), float("inf"), 10**400
CHECKPOINT = "expected None, 'graph', 'sqrt', 'log' or an integer"
BYTES = "expected None, a number of bytes"
OFFLOAD = "expected False, 'cpu' or 'disk'"
WHOLE, COUNT = "expected an integer >= 0", "expected an integer >= 1"
NUMBER = "expected a finite number"
LARGEST = r"expected (.* or )?an integer >= \d and < 2\*\*63"

wrong(Reverse, "checkpoint", [0, -1, 1.5, True, "x"], CHECKPOINT)
wrong(Reverse, "memory", [0, -1, 1.5, True, "x", "2 XB", "-1GB"], BYTES)
wrong(Reverse, "memory", ["1GB"], "expected one of them", checkpoint="log")
wrong(Reverse, "offload", [None, 1, 0, "yes"], OFFLOAD)
wrong(Truncated, "steps", [-1, 1.5, True, None, -HUGE, ["x"] * 500], WHOLE)
wrong(Truncated, "memory", [0], BYTES, steps=1)
wrong(Truncated, "offload", ["gpu"], OFFLOAD, steps=1)
wrong(Truncated, "checkpoint", [0], CHECKPOINT, steps=1)
wrong(Keep, "offload", [["cpu"]], OFFLOAD, first=1)
wrong(Keep, "checkpoint", [0, "x"], CHECKPOINT, first=1)
wrong(ForwardMode, "chunk_size", [0, True, 2.0], "expected None or an integer >= 1")
wrong(Binomial, "order", [-1, 1.5, True, None], WHOLE)
wrong(Binomial, "window", [-1, -2], "expected None or an integer >= ", order=1)
wrong(Binomial, "chunk_size", [-1, 0], "expected None or an integer >= ", order=1)
wrong(Binomial, "scale", [NAN, INFINITE, "x", None, HUGE, -HUGE, 2**1024], NUMBER, order=1)
wrong(Krylov, "order", [-1, None, True, 2.0], WHOLE)
wrong(Krylov, "chunk_size", [0], "expected None or an integer >= 1", order=1)
wrong(Krylov, "rtol", [-0.1, 1.0, "x", NAN], "expected a finite number >= 0 and < 1", order=1)
wrong(MultiStep, "window", [0, -2, 1.5, True], COUNT)
wrong(MultiStep, "adjoint", ["reverse", Reverse], "expected an estimator such as", window=2)
wrong(MultiStep, "adjoint", [HUGE, "x" * 999], "expected an est", window=2)
wrong(ESJacobian, "directions", [0, True, 2.5, 1.5], COUNT, radius=0.1)
wrong(ESJacobian, "radius", [0, 0.0, -1, INFINITE, NAN, "0.1", True], "expected a finite number > 0", directions=1)
wrong(ESJacobian, "radius", [HUGE, -HUGE], "expected a finite", directions=1)
SAMPLING = "expected 'gaussian', 'rademacher', 'sphere' or 'orth"
OTHERS = [np.array(["sphere", "x"]), ["sphere"], {"sphere"}, "uniform", "normal"]
wrong(ESJacobian, "sampling", OTHERS, SAMPLING, directions=1, radius=0.1)
wrong(ESJacobian, "antithetic", [1], "expected True or False", directions=1, radius=0.1)
wrong(ESJacobian, "generator", [3], "expected None or a torch.Generator", directions=1, radius=0.1)
wrong(Implicit, "solver", ["cg"], r"expected None or a diffopt.linear_solve object; such as Implicit\(GMRES\(")
wrong(Implicit, "solver", [ConjugateGradient], "expected None or a diffopt.linear_solve object")
wrong(Keep, "first", [0, -3, 1.5], "an integer >= 1")
wrong(Claims, "exact", [True])
wrong(Claims, "inputs", [{"params"}, frozenset()])
wrong(Claims, "tolerance", [0.2, 0.0, NAN])
wrong(Implicit, "whole_state", ["x"], "expected True or False")
wrong(ConjugateGradient, "max_iterations", [0, 2.5, None, True, "3"])
wrong(ConjugateGradient, "rtol", [-1.0, -1e-9, 1.0, None, NAN])
wrong(ConjugateGradient, "throw", ["x"])
wrong(Neumann, "terms", [0, 1.5, None])
wrong(Neumann, "step_size", [0.0, -1.0, INFINITE])
wrong(Neumann, "rtol", [2.0])
wrong(Neumann, "power_iterations", [0, 1.5])
wrong(Neumann, "power_iterations", [10_001, 2**63], "expected an integer .*at most 10000")
wrong(GMRES, "max_iterations", [0, 1.5, 2.5, None])
wrong(GMRES, "rtol", [-1.0, None])
wrong(Nystrom, "rank", [0, 1.5, None], damping=1.0)
wrong(Nystrom, "damping", [0.0, -1.0, None], rank=1)
wrong(Nystrom, "seed", ["x"], rank=1, damping=1.0)
wrong(Dense, "damping", [-1.0, NAN, None])

wrong(Reverse, "checkpoint", [2**63], LARGEST)
wrong(ForwardMode, "chunk_size", [2**63], LARGEST)
wrong(Truncated, "steps", [2**63], LARGEST)
wrong(Binomial, "order", [2**63], LARGEST)
wrong(Binomial, "window", [2**63], LARGEST, order=1)
wrong(Binomial, "chunk_size", [2**63], LARGEST, order=1)
wrong(Krylov, "order", [2**63], LARGEST)
wrong(Krylov, "chunk_size", [2**63], LARGEST, order=1)
wrong(MultiStep, "window", [2**63], LARGEST)
wrong(ESJacobian, "directions", [2**63], LARGEST, radius=0.1)
wrong(Neumann, "terms", [2**63], LARGEST)
wrong(ConjugateGradient, "max_iterations", [2**63], LARGEST)
wrong(GMRES, "max_iterations", [2**63], LARGEST)
wrong(Nystrom, "rank", [2**63], LARGEST, damping=0.1)
wrong(Nystrom, "seed", [2**63], LARGEST, rank=1, damping=0.1)


@refused(HyperparameterError, "nesterov=True with momentum 0.0 .*expected momentum > 0 and dampening 0")
def nesterov_without_momentum() -> None:
    SGD(0.1, nesterov=True)


@refused(HyperparameterError, "are None, expected one or both")
def no_preconditioner() -> None:
    Preconditioned(0.1)


@refused(HyperparameterError, "'graph', expected one that stores states")
def offloaded_graph() -> None:
    Truncated(1, "graph", offload=True)


for kind in (Adam, AdamW, RMSprop, Adagrad):
    too_small = f"{kind.__name__}: eps is 1e-.*, which is 0 in torch.float16, expected a number above 6e-08"
    in_half = partial(solve, square, torch.ones(2).half(), optimizer=kind(0.1))
    refused.add(f"{kind.__name__} in half precision", in_half, HyperparameterError, too_small)

# --------------------------------------------------------------------------- what is no optimizer


class NoDataclass(Stateless):
    def update(self, params: Leaves, grads: Leaves, buffers: Any, step: int) -> Any:
        return params, buffers


@dataclass(frozen=True)
class Averaging(diffopt.Optimizer):
    """Two numbers in one field that does not say so."""

    betas: Any = (0.9, 0.99)

    def init(self, params: Leaves) -> dict[str, Leaves]:
        return {"mean": params.zeros()}

    def update(self, params: Leaves, grads: Leaves, buffers: Any, step: int) -> Any:
        mean = self.betas[0] * buffers["mean"] + grads
        return params - self.betas[1] * mean, {"mean": mean}


NOT_ONE = "expected a diffopt.Optimizer such as SGD"
SEVERAL = r"expected a float.*; .*several numbers: metadata=diffopt\.optimizers\.EACH"


@refused(OptimizerError, NOT_ONE, torch.optim.SGD([torch.ones(1)], lr=0.1), name="optimizer_of_torch")
@refused(OptimizerError, f"{NOT_ONE}; call it, as in SGD", SGD)
@refused(OptimizerError, f"NoneType None, {NOT_ONE}", None)
@refused(OptimizerError, f"float 0.1, {NOT_ONE}", 0.1)
@refused(OptimizerError, "is not a dataclass, expected .*; decorate the class", NoDataclass(), name="optimizer_bare")
@refused(HyperparameterError, f"betas is tuple .*{SEVERAL}", Averaging())
def optimizer(value: Any) -> None:
    solve(optimizer=value)


@refused(
    diffopt.StructureError, r"betas is tuple \(0\.9, 0\.99\), expected a float, .*: metadata=diffopt\.optimizers\.E"
)
def battery_of_several_numbers() -> None:
    check_optimizer(Averaging())


def velocity(params: Leaves) -> dict[str, Leaves]:
    return {"velocity": params.zeros()}


def counted(dtype: torch.dtype) -> Callable[[Leaves], Any]:
    return lambda params: {"count": Leaves([torch.zeros((), dtype=dtype)])}


def run_broken(first: Callable[[Leaves], Any], later: Any = None, vmapped: bool = False) -> Any:
    """Solve by an optimizer whose two functions return this."""

    @dataclass(frozen=True)
    class Broken(diffopt.Optimizer):
        def init(self, params: Leaves) -> Any:
            return first(params)

        def update(self, params: Leaves, grads: Leaves, buffers: Any, step: int) -> Any:
            return later(params, buffers)

    run = partial(solve, square, optimizer=Broken())
    return vmap(run)(torch.ones(4, 2)) if vmapped else run()


RETURNED = "Broken.init returned {}, expected {}"
NOT_FLOATING = RETURNED.format("a .* tensor .* in 'count'", "floating tensors")


@refused(OptimizerError, RETURNED.format("NoneType None", "a dict"), lambda p: None, name="init_returns_none")
@refused(OptimizerError, RETURNED.format(r"list \[1\]", "a dict"), lambda p: [1], name="init_returns_a_list")
@refused(OptimizerError, RETURNED.format("dict .*", "a dict"), lambda p: {"v": p[0]}, name="init_returns_a_tensor")
@refused(OptimizerError, RETURNED.format("Leaves .*", "a dict"), lambda p: p, name="init_returns_leaves")
@refused(OptimizerError, NOT_FLOATING, counted(torch.int64), name="init_returns_integers")
@refused(OptimizerError, NOT_FLOATING, counted(torch.bool), name="init_returns_truths")
def init(first: Any) -> None:
    run_broken(first)


UPDATES: dict[str, Callable[[Leaves, Any], Any]] = {
    "forgets_a_buffer": lambda p, b: (p, {}),
    "none": lambda p, b: None,
    "params_only": lambda p, b: p,
    "loses_a_leaf": lambda p, b: (p[:0], b),
    "shape": lambda p, b: (p.map(torch.sum), b),
    "buffer_shape": lambda p, b: (p, {"velocity": p.map(torch.sum)}),
    "dtype": lambda p, b: (p.map(Tensor.half), b),
}
for name, later in UPDATES.items():
    for vmapped in (False, True):
        broken = partial(run_broken, velocity, later, vmapped)
        refused.add(f"update_{name}_vmap_{vmapped}", broken, OptimizerError, r"Broken\.update returned .*expected")
