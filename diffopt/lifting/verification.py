"""The check that an optimizer of another library is still the same once lifted: its values, derivatives and batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, final

import torch
from torch import Tensor

from diffopt.errors import DiffoptError, LiftError
from diffopt.lifting.cells import BranchError
from diffopt.optimizers.base import Buffers, Optimizer
from diffopt.optimizers.binding import bind
from diffopt.tensors import transforms, tree
from diffopt.tensors.leaves import Leaves

Result = TypeVar("Result")
Gradients: TypeAlias = Callable[[Sequence[Tensor], int], list[Tensor]]
Run: TypeAlias = Callable[[list[Tensor], Gradients, dict[str, Any]], Sequence[Tensor]]

Form: TypeAlias = "tuple[tuple[torch.Size, torch.dtype], ...]"
"""Shapes and dtypes of the leaves of params."""

STEPS = 8  # RAdam changes its formula at step 6
FORM: Form = ((torch.Size((3, 2)), torch.float64), (torch.Size((4,)), torch.float64))
_STARTS, _GRADIENTS = "the initial parameters", "the gradients"


@final
@dataclass(frozen=True)
class Lift:
    """An optimizer of another library beside its lifted form.

    Attributes:
        name: for messages.
        advice: what to use instead, for messages.
        original: ``original(params, gradients, values)``: the parameters after :data:`STEPS` steps of the other library
            itself, with these numbers as the learned options.
        lifted: the lifted form, with these scalar tensors as the learned options.
        samples: a number for each learned option, at which derivatives are looked at.
    """

    name: str
    advice: str
    original: Run
    lifted: Callable[[dict[str, Tensor]], Optimizer]
    samples: dict[str, float]

    def run_lifted(self, params: list[Tensor], gradients: Gradients, values: dict[str, Tensor]) -> Leaves:
        """The parameters after :data:`STEPS` steps of the lifted form."""
        return run(self.lifted(values), params, gradients, STEPS)


def isolated(function: Callable[..., Result], *args: Any) -> Result:
    """Call in a thread of its own: no transform, grad mode, autocast or default device of the caller reaches there.

    Torch's global random numbers are left as they were.
    """

    def call() -> Result:
        with torch.random.fork_rng(devices=[]):
            return function(*args)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def guarded(function: Callable[..., Result], *args: Any) -> Result:
    """Call :func:`isolated`; any error of the other library's code becomes a :class:`LiftError`."""
    try:
        return isolated(function, *args)
    except DiffoptError:
        raise
    except Exception as error:
        what = " ".join(str(error).split())[:120]
        raise LiftError(f"its step raises {type(error).__name__}: {what}", "a step that runs") from error


def run(optimizer: Optimizer, params: list[Tensor], gradients: Gradients, steps: int) -> Leaves:
    """The parameters after a plain loop over an optimizer's updates."""
    bound = bind(optimizer, params, tree.flatten(params)[1], steps)
    now = Leaves(params)
    buffers: Buffers = bound.at(1, now, bound.tensors).init(now)
    for step in range(1, steps + 1):
        grads = Leaves(gradients(now.tensors, step))
        now, buffers = bound.at(step, now, bound.tensors).update(now, grads, buffers, step)
    return now


@contextmanager
def named(name: str, advice: str) -> Iterator[None]:
    """Say in a :class:`LiftError` what cannot be lifted, and what to use instead."""
    try:
        yield
    except LiftError as error:
        if error.got.startswith(name):
            raise
        raise type(error)(
            f"{name} cannot be lifted: {error.got}", error.expected, "; ".join(filter(None, (error.fix, advice)))
        ) from error


def form(params: Sequence[Tensor]) -> Form:
    """Shapes and dtypes."""
    return tuple((p.shape, p.dtype) for p in params)


def random_tensors(form: Form, count: int) -> list[list[Tensor]]:
    """Some sets of normal numbers of this form, the same at every call."""
    random = torch.Generator().manual_seed(0)
    return [[torch.randn(s, generator=random, dtype=torch.float64).to(d) for s, d in form] for _ in range(count)]


def check(lift: Lift) -> None:
    """Compare values with the original, derivatives with central differences of it, batches with a loop.

    Raises:
        LiftError: one of these differs, or a derivative is not finite where a coordinate's gradient is always zero.
    """
    with named(lift.name, lift.advice):
        guarded(_check, lift)


def _check(lift: Lift) -> None:
    starts, shifts, weights, *directions = random_tensors(FORM, 5)
    experiment = _Experiment(starts, shifts, weights, (directions[0], directions[1]))
    _check_values(lift, experiment)
    _check_derivatives(lift, experiment)
    with suppress(BranchError):  # it works where tasks agree, and says so itself where they do not
        _check_batches(lift, experiment)


@dataclass(frozen=True)
class _Experiment:
    """A run from ``starts`` under a bounded, smooth gradient made of waves, which changes sign on the way.

    A *point* holds the distance gone from ``starts`` and from ``shifts`` in their directions, and learned options.
    """

    starts: list[Tensor]
    shifts: list[Tensor]
    weights: list[Tensor]
    directions: tuple[list[Tensor], list[Tensor]]

    def finals(self, run: Run, point: dict[str, Any], *, dead: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters at the start and at the end; ``dead``: each leaf's first coordinate has gradient zero."""
        options = dict(point)
        by_starts, by_shifts = options.pop(_STARTS), options.pop(_GRADIENTS)
        starts = [s + by_starts * d for s, d in zip(self.starts, self.directions[0], strict=True)]
        shifts = [s + by_shifts * d for s, d in zip(self.shifts, self.directions[1], strict=True)]

        def gradients(params: Sequence[Tensor], step: int) -> list[Tensor]:
            waves = [torch.sin(1.3 * p + s + step) + 0.2 * p.tanh() for p, s in zip(params, shifts, strict=True)]
            return [g * torch.arange(g.numel()).reshape(g.shape).sign() for g in waves] if dead else waves

        return starts, list(run(starts, gradients, options))

    def moved(self, run: Run, point: dict[str, Any], *, dead: bool = False) -> Tensor:
        """A weighted sum of how far each coordinate went: the parameters themselves would hide a small derivative."""
        starts, finals = self.finals(run, point, dead=dead)
        return torch.stack([(w * (b - a)).sum() for w, a, b in zip(self.weights, starts, finals, strict=True)]).sum()


def _point(lift: Lift, factor: float = 1.0) -> dict[str, float]:
    return {_STARTS: factor - 1, _GRADIENTS: factor - 1, **{k: v * factor for k, v in lift.samples.items()}}


def _leaves(point: dict[str, float]) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in point.items()}


def _check_values(lift: Lift, experiment: _Experiment) -> None:
    before = torch.get_rng_state()
    expected = experiment.finals(lift.original, _point(lift))[1]
    if not torch.equal(before, torch.get_rng_state()):
        raise LiftError("it draws random numbers", "none")
    got = experiment.finals(lift.run_lifted, _leaves(_point(lift)))[1]
    compare_values(got, expected, STEPS, bool(lift.samples))


def compare_values(got: Sequence[Tensor], expected: Sequence[Tensor], steps: int, learned: bool) -> None:
    """Refuse parameters that differ by more than round-off.

    What an optimizer keeps in float32 is rounded otherwise where it meets a learned float64 tensor, not a number.
    """
    allowed = max(64 * max(torch.finfo(x.dtype).eps for x in expected), 1e-6 if learned else 1e-11)
    error = _difference(got, expected)
    if not error <= allowed:
        raise LiftError(
            f"after {steps} steps on {Leaves(expected)} it differs from the original by {error:.1e}",
            f"at most {allowed:.1e}",
        )


def _difference(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, relative where numbers are larger than 1; NaN where only one of two is NaN."""
    pairs = [(g.detach(), e.detach()) for g, e in zip(got, expected, strict=True)]
    errors = [torch.where((g == e) | (g.isnan() & e.isnan()), 0, (g - e).abs() / (1 + e.abs())) for g, e in pairs]
    return float(torch.stack([error.max() for error in errors]).max())


def _check_derivatives(lift: Lift, experiment: _Experiment) -> None:
    leaves = _leaves(_point(lift))
    for dead in (False, True):
        moved = experiment.moved(lift.run_lifted, leaves, dead=dead)
        found = torch.autograd.grad(moved, list(leaves.values()), allow_unused=True, materialize_grads=True)
        if not bool(torch.stack(found).isfinite().all()):
            where = " where a coordinate's gradient is always zero" if dead else ""
            raise LiftError(f"its derivative is NaN or infinite{where}", "finite numbers")
        for name, got in zip(leaves, found, strict=True):
            _compare_with_differences(lift, experiment, name, float(got), dead)


def _compare_with_differences(lift: Lift, experiment: _Experiment, name: str, got: float, dead: bool) -> None:
    """Refuse a derivative that central differences of the original do not confirm, at any of three step sizes.

    A large one is for an original that rounds to float32 on the way, a small one for a kink near by, as of a maximum.
    """
    point, expected = _point(lift), float("nan")
    for step in (1e-2, 1e-3, 1e-5):
        step = min(step, 0.1 * abs(point[name])) if name in lift.samples else step
        values = [
            float(experiment.moved(lift.original, {**point, name: point[name] + offset * step}, dead=dead))
            for offset in (-2, -1, 1, 2)
        ]
        expected = (8 * (values[2] - values[1]) - (values[3] - values[0])) / (12 * step)
        if abs(got - expected) <= 1e-3 * abs(expected) + 1e-5 * max(map(abs, values)):
            return
    raise LiftError(f"its derivative by {name} is {got:.4g}", f"{expected:.4g} as by differences of the original")


def _check_batches(lift: Lift, experiment: _Experiment) -> None:
    """Two tasks under vmap, with different values of everything, against one after the other."""
    tasks = [_leaves(_point(lift)), _leaves(_point(lift, 0.9))]
    names = list(tasks[0])

    def moved(*values: Tensor) -> Tensor:
        return experiment.moved(lift.run_lifted, dict(zip(names, values, strict=True)))

    stacked = [torch.stack([task[name] for task in tasks]) for name in names]
    batched = transforms.vmap(moved, [[0] * len(names)], [len(tasks)], ["error"])(*stacked)
    single = torch.stack([moved(*task.values()) for task in tasks])
    leaves = [leaf for task in tasks for leaf in task.values()]
    got, expected = (
        [out, *torch.autograd.grad(out.sum(), leaves, allow_unused=True, materialize_grads=True)]
        for out in (batched, single)
    )
    error = _difference(got, expected)
    if not error <= 1e-6:
        raise LiftError(f"under vmap it differs from a loop over the tasks by {error:.1e}", "at most 1e-06")
