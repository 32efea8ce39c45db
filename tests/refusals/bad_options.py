"""Bad inputs: optimizers, estimators and their options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from bad_row import Row, solve, square
from torch import Tensor
from torch.func import vmap

import diffopt
from diffopt import SGD, Adagrad, Adam, AdamW, Leaves, Preconditioned, ProximalGD, RMSprop
from diffopt.estimators import (
    Binomial,
    ESJacobian,
    ForwardMode,
    Implicit,
    Keep,
    Krylov,
    MultiStep,
    Reverse,
    Truncated,
)
from diffopt.linear_solve import GMRES, ConjugateGradient, Neumann, Nystrom
from diffopt.testing import check_optimizer

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
    (SGD, {"nesterov": "yes", "lr": 0.1, "momentum": 0.9}),
    *((kind, {"maximize": 1, "lr": 0.1}) for kind in (SGD, Adam, AdamW, RMSprop, Adagrad)),
    *((kind, {"amsgrad": None}) for kind in (Adam, AdamW)),
    (RMSprop, {"centered": "no"}),
]
WHOLE, NUMBER = "expected (None, .* or )?an integer >= ", "expected .*number"
# the estimator's class -> options, the one that is wrong, what it says
RULES: list[tuple[Any, dict[str, Any], str, str]] = [
    *(
        (Reverse, {"checkpoint": x}, "checkpoint", "expected None, 'graph', 'sqrt', 'log' or an i")
        for x in (0, -1, 1.5, True, "x")
    ),
    *(
        (Reverse, {"memory": x}, "memory", "expected None, a number of bytes")
        for x in (0, -1, 1.5, True, "x", "2 XB", "-1GB")
    ),
    (Reverse, {"memory": "1GB", "checkpoint": "log"}, "memory", "expected one of them"),
    (Truncated, {"steps": 1, "memory": 0}, "memory", "expected None, a number of bytes"),
    *((Reverse, {"offload": x}, "offload", "expected False, 'cpu' or 'disk'") for x in (None, 1, 0, "yes")),
    (Truncated, {"steps": 1, "offload": "gpu"}, "offload", "expected False, 'cpu' or 'disk'"),
    (Keep, {"first": 1, "offload": ["cpu"]}, "offload", "expected False, 'cpu' or 'disk'"),
    *(
        (Keep, {"first": 1, "checkpoint": x}, "checkpoint", "expected None, 'graph', 'sqrt', 'log' or an i")
        for x in (0, "x")
    ),
    *((ForwardMode, {"chunk_size": x}, "chunk_size", "expected None or an integer >= 1") for x in (0, True, 2.0)),
    *((Truncated, {"steps": x}, "steps", "expected an integer >= 0") for x in (-1, 1.5, True, None)),
    (Truncated, {"steps": 1, "checkpoint": 0}, "checkpoint", "expected None, 'graph', 'sqrt', 'log' or an integer"),
    *((Binomial, {"order": x}, "order", "expected an integer >= 0") for x in (-1, 1.5, True, None)),
    *((Binomial, {"order": 1, name: -1}, name, "expected None or an integer >= ") for name in ("window", "chunk_size")),
    *((Binomial, {"order": 1, "scale": x}, "scale", "expected a finite number") for x in (float("nan"), "x", None)),
    *((Binomial, {"order": 1, "scale": x}, "scale", "expected a finite number") for x in (10**400, -(10**400))),
    *((ESJacobian, {"directions": 1, "radius": x}, "radius", "expected a finite") for x in (10**400, -(10**400))),
    *(
        (ESJacobian, {"directions": 1, "radius": 0.1, "sampling": x}, "sampling", "expected 'gaussian', 'rademacher'")
        for x in (np.array(["sphere", "x"]), ["sphere"], {"sphere"})
    ),
    *((Truncated, {"steps": x}, "steps", "expected an integer >= 0") for x in (-(10**400), ["x"] * 500)),
    *((MultiStep, {"window": 2, "adjoint": x}, "adjoint", "expected an est") for x in (10**400, "x" * 999)),
    *(
        (kind, {**options, name: 2**63}, name, r"expected (.* or )?an integer >= \d and < 2\*\*63")
        for kind, options, names in (
            (Reverse, {}, ["checkpoint"]),
            (ForwardMode, {}, ["chunk_size"]),
            (Truncated, {}, ["steps"]),
            (Binomial, {"order": 1}, ["order", "window", "chunk_size"]),
            (Krylov, {"order": 1}, ["order", "chunk_size"]),
            (MultiStep, {}, ["window"]),
            (ESJacobian, {"radius": 0.1}, ["directions"]),
            (Neumann, {}, ["terms"]),
            (ConjugateGradient, {}, ["max_iterations"]),
            (GMRES, {}, ["max_iterations"]),
            (Nystrom, {"rank": 1, "damping": 0.1}, ["rank", "seed"]),
        )
        for name in names
    ),
    *(
        (Neumann, {"power_iterations": x}, "power_iterations", "expected an integer .*at most 10000")
        for x in (10_001, 2**63)
    ),
    (Krylov, {"order": -1}, "order", "expected an integer >= 0"),
    (Krylov, {"order": 1, "chunk_size": 0}, "chunk_size", "expected None or an integer >= 1"),
    *((Krylov, {"order": 1, "rtol": x}, "rtol", "expected a finite number >= 0 and < 1") for x in (-0.1, 1.0, "x")),
    *((MultiStep, {"window": x}, "window", "expected an integer >= 1") for x in (0, 1.5, True)),
    *(
        (MultiStep, {"window": 2, "adjoint": x}, "adjoint", "expected an estimator such as")
        for x in ("reverse", Reverse)
    ),
    *((ESJacobian, {"directions": x, "radius": 0.1}, "directions", "expected an integer >= 1") for x in (0, True, 2.5)),
    *(
        (ESJacobian, {"directions": 1, "radius": x}, "radius", "expected a finite number > 0")
        for x in (0, float("inf"), "x")
    ),
    (
        ESJacobian,
        {"directions": 1, "radius": 0.1, "sampling": "uniform"},
        "sampling",
        "expected 'gaussian', 'rademacher', 'sphere' or 'orth",
    ),
    (ESJacobian, {"directions": 1, "radius": 0.1, "antithetic": 1}, "antithetic", "expected True or False"),
    (ESJacobian, {"directions": 1, "radius": 0.1, "generator": 3}, "generator", "expected None or a torch.Generator"),
    *(
        (Implicit, {"solver": x}, "solver", "expected None or a diffopt.linear_solve object")
        for x in ("cg", ConjugateGradient)
    ),
    (Implicit, {"whole_state": "x"}, "whole_state", "expected True or False"),
]


class NoDataclass(diffopt.Optimizer):
    def init(self, params: Leaves) -> dict[str, Leaves]:
        return {}

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


NOT_ONE = "expected a diffopt.Optimizer such as SGD"
OTHERS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "nesterov": (
        lambda: SGD(0.1, nesterov=True),
        diffopt.HyperparameterError,
        "nesterov=True with momentum 0.0 .*expected momentum > 0 and dampening 0",
    ),
    "no_preconditioner": (lambda: Preconditioned(0.1), diffopt.HyperparameterError, "are None, expected one or both"),
    "optimizer_of_torch": (
        lambda: solve(optimizer=torch.optim.SGD([torch.ones(1)], lr=0.1)),
        diffopt.OptimizerError,
        NOT_ONE,
    ),
    "optimizer_class": (lambda: solve(optimizer=SGD), diffopt.OptimizerError, f"{NOT_ONE}; call it, as in SGD"),
    "optimizer_none": (lambda: solve(optimizer=None), diffopt.OptimizerError, f"NoneType None, {NOT_ONE}"),
    "optimizer_number": (lambda: solve(optimizer=0.1), diffopt.OptimizerError, f"float 0.1, {NOT_ONE}"),
    "optimizer_bare": (
        lambda: solve(optimizer=NoDataclass()),
        diffopt.OptimizerError,
        "is not a dataclass, expected .*; decorate the class",
    ),
    "several_numbers": (
        lambda: solve(optimizer=Averaging()),
        diffopt.HyperparameterError,
        r"betas is tuple .*expected a float or a tensor; .*several numbers: metadata=diffopt\.optimizers\.EACH",
    ),
    "several_numbers_for_a_tree": (
        lambda: check_optimizer(Averaging()),
        diffopt.StructureError,
        r"betas is tuple \(0\.9, 0\.99\), expected a float, .*: metadata=diffopt\.optimizers\.EACH",
    ),
    "offload_graph": (
        lambda: Truncated(1, "graph", offload=True),
        diffopt.HyperparameterError,
        "'graph', expected one that stores states",
    ),
}
ROWS: dict[str, Row] = {
    **{
        f"{kind.__name__}_{options}": Row(
            "optimizer",
            partial(kind, **options),
            diffopt.HyperparameterError,
            f"{kind.__name__}: {next(iter(options))}.* is .*, expected ",
            next(iter(options)),
        )
        for kind, options in OPTIONS
    },
    **{
        f"{kind.__name__}_{options}": Row(
            "estimator",
            partial(kind, **options),
            {"solver": diffopt.EstimatorError, "steps": diffopt.StepsError}.get(wrong, diffopt.HyperparameterError),
            f"{kind.__name__}.*{wrong} is .*, {says}",
            wrong,
        )
        for kind, options, wrong, says in RULES
    },
    **{
        f"init_{name}": Row(
            "optimizer", partial(broken, first), diffopt.OptimizerError, f"Broken.init returned {said}, expected a dict"
        )
        for name, first, said in (
            ("none", lambda p: None, "NoneType None"),
            ("list", lambda p: [1], r"list \[1\]"),
            ("tensor", lambda p: {"v": p[0]}, "dict .*"),
            ("leaves", lambda p: p, "Leaves .*"),
        )
    },
    **{
        f"init_{dtype}": Row(
            "optimizer",
            partial(broken, lambda p, dtype=dtype: {"count": Leaves([torch.zeros((), dtype=dtype)])}),
            diffopt.OptimizerError,
            "Broken.init returned a .* tensor .* in 'count', expected floating tensors",
        )
        for dtype in (torch.int64, torch.bool)
    },
    **{
        f"eps_in_half_precision_{kind.__name__}": Row(
            "optimizer",
            lambda kind=kind: solve(square, torch.ones(2).half(), optimizer=kind(0.1)),
            diffopt.HyperparameterError,
            f"{kind.__name__}: eps is 1e-.*, which is 0 in torch.float16, expected a number above 6e-08",
        )
        for kind in (Adam, AdamW, RMSprop, Adagrad)
    },
    **{
        f"update_{name}_vmap_{vmapped}": Row(
            "optimizer",
            partial(broken, velocity, later, vmapped),
            diffopt.OptimizerError,
            r"Broken\.update returned .*expected",
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
    **{name: Row("optimizer", *row) for name, row in OTHERS.items()},
}
