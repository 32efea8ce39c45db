"""Losses that have to be refused, each with the errors of which one must come."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fuzz.estimators import Spec, specs
from fuzz.rules import KINDS, Rule, rules
from hypothesis import strategies as st
from torch import Tensor

import diffopt
from diffopt import (
    CapturedTensorError,
    DiffoptError,
    DisconnectedError,
    InPlaceError,
    LossError,
    MissingDerivativeError,
    NonFiniteLossError,
    RandomnessError,
    VmapError,
)

Loss = Callable[..., Any]


@dataclass(frozen=True)
class Refused:
    """``make()`` is a loss of ``(w, x)``, with batches of ``(w, x, batch)``; ``unless`` says for whom it is right."""

    make: Callable[[], Loss]
    errors: tuple[type[DiffoptError], ...]
    unless: Callable[[Case], bool] = lambda case: False


@dataclass(frozen=True)
class Case:
    """A call with a loss of the table."""

    name: str
    rule: Rule
    estimator: Spec
    steps: int
    batched: bool
    mode: str

    def run(self) -> None:
        """Make the call, in float64, on three numbers."""
        w = torch.tensor([0.3, -0.4, 1.2], dtype=torch.float64)
        x = torch.tensor([1.0, 0.5, -0.7], dtype=torch.float64)
        loss, held = TABLE[self.name].make(), self.rule.shapes([(3,)], self.steps)
        numbers = {
            name: torch.full(shape, KINDS[self.rule.kind].numbers[name.split("/")[0]]) for name, shape in held.items()
        }
        optimizer = self.rule.optimizer({name: value.double() for name, value in numbers.items()}, 0, 1, self.steps)
        batches = torch.ones(self.steps, 3, dtype=torch.float64) if self.batched else None

        def end(w: Tensor, x: Tensor) -> Tensor:
            solution = diffopt.solve(
                loss, w, x, optimizer=optimizer, steps=self.steps, batches=batches, estimator=self.estimator.make()
            )
            return torch.sin(solution.params).sum()

        _MODES[self.mode](end, w, x)


def _plain(end: Callable[..., Tensor], w: Tensor, x: Tensor) -> None:
    torch.autograd.grad(end(w.requires_grad_(), x.requires_grad_()), [w, x], allow_unused=True)


def _no_grad(end: Callable[..., Tensor], w: Tensor, x: Tensor) -> None:
    with torch.no_grad():
        end(w, x)


_MODES: dict[str, Callable[..., Any]] = {
    "autograd": _plain,
    "no_grad": _no_grad,
    "func": lambda end, w, x: torch.func.grad(end, argnums=(0, 1))(w, x),
    "vmap": lambda end, w, x: torch.func.vmap(torch.func.grad(end))(torch.stack([w, x]), torch.stack([x, w])),
    "mean": lambda end, w, x: diffopt.mean_over_tasks(
        end, w.requires_grad_(), torch.stack([x, w.detach()]), in_dims=(None, 0)
    ),
}


def _square(w: Tensor, *rest: Tensor) -> Tensor:
    return sum((w * x).square().sum() for x in rest) + (w - 1).square().sum()


def _learned() -> Tensor:
    return torch.full((3,), 0.2, dtype=torch.float64, requires_grad=True)


class _Holder:
    """A loss with an attribute."""

    def __init__(self) -> None:
        self.scale = _learned()

    def __call__(self, w: Tensor, *rest: Tensor) -> Tensor:
        return _square(w * self.scale, *rest)


def _captured() -> Loss:
    scale = _learned()
    return lambda w, *rest: _square(w, *rest) + (scale * w).sum()


def _captured_module() -> Loss:
    layer = torch.nn.Linear(3, 1).double()
    return lambda w, *rest: _square(w, *rest) + layer(w).sum()


def _in_place(which: int) -> Loss:
    def loss(*given: Tensor) -> Tensor:
        given[min(which, len(given) - 1)].mul_(1.5)
        return _square(*given)

    return loss


class _NoSecond(torch.autograd.Function):
    """A function that has a first derivative only."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * cotangent


def _own_generator() -> Loss:
    generator = torch.Generator().manual_seed(0)
    return lambda w, *rest: _square(w * torch.rand(3, generator=generator), *rest)


def _from_numpy() -> Loss:
    generator = np.random.default_rng(0)
    return lambda w, *rest: _square(w * float(generator.random()), *rest)


def _needs_no_second(case: Case) -> bool:
    """Whether nothing is recomputed, nor differentiated a second time."""
    names = (case.estimator.name, case.estimator.get("adjoint"))
    return case.mode == "no_grad" or bool({"FirstOrder", "Reptile"} & set(names))


def _in_no_grad(case: Case) -> bool:
    return case.mode == "no_grad"


_ANY = (CapturedTensorError, VmapError)
TABLE: dict[str, Refused] = {
    "captured": Refused(_captured, _ANY, lambda case: _in_no_grad(case) or "Unrolled" in repr(case)),
    "captured_by_attribute": Refused(_Holder, _ANY, lambda case: _in_no_grad(case) or "Unrolled" in repr(case)),
    "captured_by_module": Refused(_captured_module, _ANY, lambda case: _in_no_grad(case) or "Unrolled" in repr(case)),
    "captured_by_partial": Refused(
        lambda: functools.partial(lambda s, w, *rest: _square(w * s, *rest), _learned()),
        _ANY,
        lambda case: _in_no_grad(case) or "Unrolled" in repr(case),
    ),
    "changes_params": Refused(lambda: _in_place(0), (InPlaceError,)),
    "changes_an_argument": Refused(lambda: _in_place(1), (InPlaceError,)),
    "changes_the_batch": Refused(lambda: _in_place(2), (InPlaceError,)),
    "nan": Refused(lambda: lambda w, *rest: _square(w, *rest) * float("nan"), (NonFiniteLossError,)),
    "infinite": Refused(lambda: lambda w, *rest: _square(w, *rest) + 1e308 * 10, (NonFiniteLossError,)),
    "logarithm": Refused(lambda: lambda w, *rest: torch.log(w - 10).sum(), (NonFiniteLossError,)),
    "constant": Refused(lambda: lambda w, x, *rest: x.square().sum(), (DisconnectedError,)),
    "number": Refused(lambda: lambda w, *rest: torch.tensor(3.0), (DisconnectedError,)),
    "detached": Refused(lambda: lambda w, *rest: _square(w.detach(), *rest), (DisconnectedError,)),
    "item": Refused(
        lambda: lambda w, *rest: torch.tensor(float(w.sum()), dtype=torch.float64), (DisconnectedError, VmapError)
    ),
    "numpy": Refused(
        lambda: lambda w, *rest: torch.as_tensor(np.sin(w.detach().numpy())).sum(), (DisconnectedError, VmapError)
    ),
    "no_grad": Refused(lambda: torch.no_grad()(_square), (DisconnectedError,)),
    "vector": Refused(lambda: lambda w, *rest: w * w, (LossError,)),
    "matrix": Refused(lambda: lambda w, *rest: (w * w).sum().reshape(1, 1), (LossError,)),
    "integer": Refused(lambda: lambda w, *rest: (w > 0).sum(), (LossError,)),
    "boolean": Refused(lambda: lambda w, *rest: (w > 0).any(), (LossError,)),
    "complex": Refused(lambda: lambda w, *rest: (w * 1j).sum(), (LossError,)),
    "none": Refused(lambda: lambda w, *rest: None, (LossError,)),
    "float": Refused(lambda: lambda w, *rest: 1.0, (LossError,)),
    "pair": Refused(lambda: lambda w, *rest: (_square(w), w), (LossError,)),
    "takes_nothing": Refused(lambda: lambda: torch.zeros(()), (LossError,)),
    "takes_one": Refused(lambda: lambda w: (w * w).sum(), (LossError,)),
    "takes_a_keyword": Refused(lambda: lambda w, *rest, scale: _square(w, *rest) * scale, (LossError,)),
    "no_function": Refused(lambda: torch.zeros(()), (LossError,)),
    "no_second_derivative": Refused(
        lambda: lambda w, *rest: _NoSecond.apply(w).square().sum() + _square(w, *rest),
        (MissingDerivativeError, VmapError),
        lambda case: _needs_no_second(case) or case.mode in ("vmap", "mean"),
    ),
    "own_generator": Refused(_own_generator, (RandomnessError, VmapError), lambda case: True),
    "numpy_numbers": Refused(_from_numpy, (RandomnessError,), lambda case: True),
}
"""The last two are right in rules that recompute nothing; that no wrong number comes of them other tests hold."""


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A call with a loss of the table."""
    steps = draw(st.integers(1, 4))
    return Case(
        draw(st.sampled_from(sorted(TABLE))),
        draw(rules(tuple(kind for kind in KINDS if kind != "centered"))),
        draw(specs(steps)),
        steps,
        draw(st.booleans()),
        draw(st.sampled_from(sorted(_MODES))),
    )


def fault_of(case: Case) -> str:
    """What is wrong with what came of a call, in words; empty if it is as it should be."""
    row = TABLE[case.name]
    ahead = tuple(e for e in (diffopt.StepsError,) if case.estimator.name in ("Truncated", "Binomial", "Implicit"))
    ahead += (diffopt.EstimatorError,) if case.estimator.name == "Implicit" else ()  # of an optimizer's buffers
    try:
        case.run()
    except DiffoptError as error:
        allowed = (*row.errors, *ahead)
        if type(error) not in allowed and not row.unless(case):
            return f"{type(error).__name__}, expected {[e.__name__ for e in allowed]}: {error}"
        return "" if "expected" in str(error) else f"says nothing of what was expected: {error}"
    except Exception as error:
        return f"raw {type(error).__name__}: {error}"
    return "" if row.unless(case) else "accepted"
