"""The outer loop of a unit that trains: iterate, save, stop in time, and go on where it stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from statistics import fmean

import torch
from torch import Tensor

from diffopt.errors import DivergenceError, NonFiniteGradientError, NonFiniteLossError
from diffopt.experiments.framework.experiment import Row
from diffopt.experiments.framework.unit_context import Work

FAILED = (DivergenceError, NonFiniteLossError, NonFiniteGradientError)
"""What a run ends with that diverges; its row then says so in place of its numbers."""


def train(
    work: Work,
    params: Mapping[str, Tensor],
    outer: torch.optim.Optimizer,
    generators: Mapping[str, torch.Generator],
    iterations: int,
    iterate: Callable[[int], float],
    *,
    tensors: Mapping[str, Tensor] | None = None,
    curves: Mapping[str, list[float]] | None = None,
) -> tuple[list[float], list[float]]:
    """Run ``iterate`` so many times, each followed by a step of the outer optimizer; resumable.

    Args:
        work: of the unit, which must be ``resumable``.
        params: what is trained, leaves of ``outer``.
        outer: the outer optimizer.
        generators: every generator that ``iterate`` draws from, by name.
        iterations: how often.
        iterate: given the number of the iteration, from 0, puts the hypergradient into the ``grad`` of ``params``
            (which has been set to ``None``) and returns the outer loss.
        tensors: whatever else ``iterate`` changes in place, such as warm starts.
        curves: lists that ``iterate`` appends to, such as accuracies.

    Returns:
        The outer losses, and the processor seconds that had passed when each was known; ``iterations`` of both. The
        latter are the only numbers that depend on the machine.
    """
    losses: list[float] = []
    seconds: list[float] = []
    tensors, curves = tensors or {}, curves or {}
    if saved := work.saved():
        with torch.no_grad():
            for kind, held in (("params", params), ("tensors", tensors)):
                for name, value in held.items():
                    value.copy_(saved[kind][name])
        outer.load_state_dict(saved["outer"])
        for name, generator in generators.items():
            generator.set_state(saved["generators"][name])
        for name, curve in curves.items():
            curve[:] = saved["curves"][name]
        losses, seconds = saved["losses"], saved["seconds"]

    def state() -> dict[str, object]:
        return {
            "params": {name: value.detach() for name, value in params.items()},
            "outer": outer.state_dict(),
            "generators": {name: generator.get_state() for name, generator in generators.items()},
            "tensors": {name: value.detach() for name, value in tensors.items()},
            "curves": dict(curves),
            "losses": losses,
            "seconds": seconds,
        }

    before, began = seconds[-1] if seconds else 0.0, time.process_time()
    for iteration in range(len(losses), iterations):
        outer.zero_grad()
        losses.append(iterate(iteration))
        outer.step()
        seconds.append(before + time.process_time() - began)
        work.step(iteration + 1, iterations, f"outer loss {losses[-1]:.3f}", state)
    return losses, seconds


def smoothed(values: list[float], window: int) -> list[float]:
    """The mean of up to ``window`` values around each one."""
    half = window // 2
    return [sum(part) / len(part) for part in (values[max(0, i - half) : i + half + 1] for i in range(len(values)))]


def outcome(row: Row, target: float, window: int) -> Row:
    """How a run that trained went, as columns of a long table; all infinite if it diverged.

    ``final`` is the mean outer loss of the last tenth, ``iterations`` and ``seconds`` are those to the target (infinite
    if it is not reached), ``ms`` is the processor time of an iteration.
    """
    if "losses" not in row:
        return dict.fromkeys(("final", "iterations", "seconds", "ms"), math.inf)
    losses, times = row["losses"], row["seconds"]
    curve = smoothed(losses, window)
    reached = first_below(curve, target, [float(i) for i in range(1, len(curve) + 1)])
    at = first_below(curve, target, times)
    return {
        "final": fmean(losses[-max(1, len(losses) // 10) :]),
        "iterations": math.inf if reached is None else reached,
        "seconds": math.inf if at is None else at,
        "ms": 1e3 * times[-1] / len(times),
    }


def curve(row: Row, window: int) -> Iterator[Row]:
    """The smoothed outer loss of a run over iterations and over processor time, as rows of a long table."""
    if "losses" in row:
        pairs = zip(smoothed(row["losses"], window), row["seconds"], strict=True)
        for at, (loss, seconds) in enumerate(pairs, start=1):
            yield {"at": at, "iteration": at, "time": seconds, "loss": loss}


AXES = {"iteration": "outer iteration", "time": "processor time [s]", "loss": "outer training loss"}
"""The axes of :func:`curve`, for :func:`pictures.curves`."""


def first_below(values: list[float], threshold: float, times: list[float]) -> float | None:
    """The time of the first value below a threshold; ``None`` if there is none."""
    return next((at for value, at in zip(values, times, strict=True) if value < threshold), None)
