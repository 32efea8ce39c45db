"""Every parameter of the public interface, as a place for an odd object, and which odd objects are right there."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from fuzz.odd import OBJECTS
from torch import Tensor

import diffopt
from diffopt import estimators, linear_solve, testing
from diffopt.estimators import FirstOrder, Implicit, Reverse

_MOST = 400
"""Characters of a message, with room for the name of a place."""
INTEGERS = frozenset({"zero", "int_enum", "numpy_integer"})
NUMBERS = INTEGERS | {"float", "numpy_float", "numpy_float32", "numpy_zero_d", "beyond_64_bits"}
MODULES = frozenset({"module", "lazy_module"})
"""What can be called, and fails by an error of its own."""
_TENSORS = frozenset({"tensor_subclass", "inference_tensor"})
SCALARS = NUMBERS | _TENSORS | {"float_tensor", "half_tensor", "infinite_tensor", "nan_tensor"}
FLAGS = frozenset({"true", "numpy_bool"})


@dataclass(frozen=True)
class Slot:
    """A call with a place; ``right`` are the names of odd objects that may stand there."""

    call: Callable[[Any], Any]
    right: frozenset[str] = frozenset()
    own_errors: bool = False
    """Whether what the object raises when it is called comes through."""


def square(w: Any, *args: Any) -> Tensor:
    return w.square().sum()


def start() -> Tensor:
    return torch.tensor([1.0, 2.0], requires_grad=True)


def solved(loss: Any = square, params: Any = None, *args: Any, **options: Any) -> None:
    """A solve and its backward pass."""
    options = {"optimizer": diffopt.SGD(0.1), "steps": 3, **options}
    end = diffopt.solve(loss, start() if params is None else params, *args, **options).params
    if isinstance(end, Tensor) and end.requires_grad:
        end.sum().backward()


def mean(loss: Any = None, *args: Any, **options: Any) -> Tensor:
    args = args or (start(), torch.ones(4, 2))
    loss = (lambda w, x: (w * x).sum()) if loss is None else loss
    return diffopt.mean_over_tasks(loss, *args, **{"in_dims": (None, 0), **options})


def implicit(**options: Any) -> None:
    a = start()
    options = {"params": a.detach(), **options}
    diffopt.implicit(_distance, options.pop("params"), a, **options).sum().backward()


def implicit_gradients(**options: Any) -> None:
    a = start()
    options = {"params": a.detach(), "cotangent": torch.ones(2), **options}
    diffopt.implicit_gradients(_distance, options.pop("params"), a, **options)


def _distance(w: Any, a: Tensor) -> Tensor:
    """That of the params from ``a``, where they are a tensor of its shape; else any number of theirs."""
    fits = isinstance(w, Tensor) and w.shape == a.shape
    return (w - a).square().sum() if fits else _any_square(w) + 0 * a.sum()


def problem(w: Tensor, estimator: Any) -> Tensor:
    return diffopt.solve(square, w, optimizer=diffopt.SGD(0.1), steps=2, estimator=estimator).params.square().sum()


def compared(first: Any = None, rules: Any = None, **options: Any) -> Any:
    rules = [Reverse(), FirstOrder()] if rules is None else rules
    return diffopt.compare(partial(problem, start()) if first is None else first, rules, **{"repeats": 1, **options})


def _by_option(function: Callable[..., Any], **right: frozenset[str]) -> dict[str, Slot]:
    name = getattr(function, "__name__", "call")
    return {f"{name}({option}=)": Slot(lambda x, o=option: function(**{o: x}), r) for option, r in right.items()}


CALLS: dict[str, Slot] = {
    "solve(loss)": Slot(lambda x: diffopt.solve(x, start(), optimizer=diffopt.SGD(0.1), steps=1), own_errors=True),
    "solve(params)": Slot(
        lambda x: diffopt.solve(_any_square, x, optimizer=diffopt.SGD(0.1), steps=1),
        frozenset({"float_tensor", "vector", "half_tensor", "tensor_subclass", "list_of_batches"}),
    ),
    "solve(args)": Slot(lambda x: solved(square, start(), x), frozenset({"any"})),
    "solve(args deep)": Slot(lambda x: solved(square, start(), {"a": [x, torch.ones(2)]}), frozenset({"any"})),
    **{
        f"solve({name}=)": Slot(
            lambda x, n=name: solved(**{n: x, **({"steps": 0} if n == "compile" else {})}),
            right,
            own_errors=name in ("batches", "observe", "on_step"),
        )
        for name, right in {
            "optimizer": frozenset[str](),
            "steps": INTEGERS,
            "batches": frozenset({"none", "list_of_batches"}),
            "estimator": frozenset({"none"}),
            "check": FLAGS,
            "compile": FLAGS,
            "has_aux": FLAGS,
            "tol": NUMBERS | {"none"},
            "observe": frozenset({"none", "builtin", "lambda"}),
            "on_step": frozenset({"none", "lambda"}),
            "micro_batches": frozenset({"none"}),
        }.items()
    },
    "solve(batches leaf)": Slot(
        lambda x: solved(batches={"a": torch.ones(3), "b": x}), frozenset({"empty_list", "empty_dict"})
    ),
    "solve(batches, function)": Slot(lambda x: solved(lambda w, b: (w * b["a"]).sum(), batches=x), own_errors=True),
    "mean_over_tasks(task_loss)": Slot(lambda x: diffopt.mean_over_tasks(x, torch.ones(4, 2)), own_errors=True),
    "mean_over_tasks(args)": Slot(lambda x: mean(lambda w, x: w.sum(), start(), x), frozenset({"any"})),
    **_by_option(
        mean,
        in_dims=frozenset({"negative"}),
        task_chunk=frozenset({"none", "int_enum", "numpy_integer"}),
        randomness=frozenset[str](),
        check=FLAGS,
    ),
    **_by_option(
        implicit, params=frozenset[str](), solver=frozenset({"none"}), stationarity=NUMBERS | {"none"}, check=FLAGS
    ),
    "implicit(loss)": Slot(lambda x: diffopt.implicit(x, torch.ones(2)), own_errors=True),
    **_by_option(
        implicit_gradients,
        params=frozenset({"vector", "tensor_subclass"}),
        cotangent=_TENSORS,
        start=_TENSORS | {"none"},
    ),
    "check(loss)": Slot(lambda x: diffopt.check(x, start()), frozenset({"any"})),
    "check(params)": Slot(lambda x: diffopt.check(_any_square, x), frozenset({"any"})),
    "check(args)": Slot(lambda x: diffopt.check(square, start(), x), frozenset({"any"})),
    **{
        f"check({name}=)": Slot(lambda x, n=name: diffopt.check(square, start(), **{n: x}), right)
        for name, right in {"directions": INTEGERS, "second_derivative": FLAGS, "vmap": FLAGS}.items()
    },
    "check(optimizer=)": Slot(lambda x: diffopt.check(square, start(), optimizer=x, steps=1)),
    "check(steps=)": Slot(lambda x: diffopt.check(square, start(), optimizer=diffopt.SGD(0.1), steps=x), INTEGERS),
    "compare(directions=)": Slot(lambda x: compared(None, [], directions=x), INTEGERS),
    "compare(problem)": Slot(lambda x: compared(x), frozenset({"none"}), own_errors=True),
    "compare(estimators)": Slot(lambda x: compared(None, x), frozenset({"none", "empty_list"})),
    "compare(estimators[1])": Slot(lambda x: compared(None, [Reverse(), x])),
    "compare(exact=)": Slot(lambda x: compared(exact=x), frozenset({"none"})),
    "compare(repeats=)": Slot(lambda x: compared(repeats=x), INTEGERS),
    "cite": Slot(lambda x: diffopt.cite(x)),
    "check_estimator": Slot(lambda x: testing.check_estimator(x)),
    "check_optimizer": Slot(lambda x: testing.check_optimizer(x)),
    "Schedule in lr": Slot(lambda x: solved(optimizer=diffopt.SGD(diffopt.Schedule(x))), frozenset({"vector"})),
    "lr in a tree": Slot(lambda x: solved(_any_square, [start(), start()], optimizer=diffopt.SGD([0.1, x])), SCALARS),
    "factors": Slot(lambda x: solved(optimizer=diffopt.Preconditioned(0.1, factors=x)), frozenset({"none"})),
}


def _any_square(params: Any, *args: Any) -> Tensor:
    """The sum of squares of whatever tensors a tree holds."""
    leaves = torch.utils._pytree.tree_leaves(params)
    return sum(x.float().square().sum() for x in leaves if isinstance(x, Tensor))


# class -> the options that make it right, and the names of odd objects that some field takes
_OPTIMIZERS: dict[Any, dict[str, Any]] = {
    diffopt.SGD: {"lr": 0.1},
    diffopt.Adam: {},
    diffopt.AdamW: {},
    diffopt.RMSprop: {},
    diffopt.Adagrad: {},
    diffopt.ProximalGD: {"lr": 0.1, "strength": 0.1},
    diffopt.Preconditioned: {"lr": 0.1, "diagonal": 1.0},
}
_RULES: dict[Any, dict[str, Any]] = {
    estimators.Reverse: {},
    estimators.ForwardMode: {},
    estimators.Truncated: {"steps": 1},
    estimators.Binomial: {"order": 1},
    estimators.Krylov: {"order": 1},
    estimators.MultiStep: {"window": 2},
    estimators.Implicit: {},
    estimators.ESJacobian: {"directions": 2, "radius": 1e-3},
}
_SOLVERS: dict[Any, dict[str, Any]] = {
    linear_solve.ConjugateGradient: {},
    linear_solve.Dense: {},
    linear_solve.GMRES: {},
    linear_solve.Neumann: {},
    linear_solve.Nystrom: {"rank": 1, "damping": 0.1},
}
_OPTIONAL = {
    *("window", "chunk_size", "checkpoint", "memory", "center", "diagonal"),
    *("factors", "generator", "step_size", "rtol", "solver"),
}


def _right(name: str, default: Any) -> frozenset[str]:
    right = FLAGS if isinstance(default, bool) else INTEGERS if isinstance(default, int) else SCALARS
    if (
        name in ("order", "window", "chunk_size", "steps", "directions", "rank", "seed", "checkpoint", "memory")
        or "iter" in name
    ):
        right = INTEGERS
    if name in ("dampening", "scale", "center", "diagonal"):
        right = right | {"negative", "minus_infinity"}
    if name == "generator":
        right = frozenset({"torch_generator"})
    return right | ({"none"} if name in _OPTIONAL else frozenset())


def _fields(kind: Any, base: dict[str, Any], run: Callable[[Any], Any]) -> dict[str, Slot]:
    made = kind(**base)
    return {
        f"{kind.__name__}({field.name}=)": Slot(
            lambda x, n=field.name: run(kind(**{**base, n: x})), _right(field.name, getattr(made, field.name))
        )
        for field in fields(kind)
    }


FIELDS: dict[str, Slot] = {}
for _kind, _base in _OPTIMIZERS.items():
    FIELDS |= _fields(_kind, _base, lambda made: solved(optimizer=made))
for _kind, _base in _RULES.items():
    FIELDS |= _fields(_kind, _base, lambda made: solved(estimator=made))
for _kind, _base in _SOLVERS.items():
    FIELDS |= _fields(_kind, _base, lambda made: solved(estimator=Implicit(made), steps=40))
SLOTS = CALLS | FIELDS


def fault_of_argument(slot: str, odd: str) -> str:
    """What is wrong with how an odd object was met, in words; empty if it was taken rightly, or refused in type."""
    place = SLOTS[slot]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            place.call(OBJECTS[odd]())
        except diffopt.DiffoptError as error:
            said = str(error)
            return "" if "expected" in said and len(said) < _MOST else f"{type(error).__name__} says {said}"
        except Exception as error:
            own = place.own_errors and (isinstance(error, DeprecationWarning) or odd in MODULES)
            return "" if own else f"raw {type(error).__name__}: {error}"
    return "" if {odd, "any"} & place.right else "accepted"
