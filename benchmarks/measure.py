"""Verifying, timing and weighing: what is done with every cell of the table."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, final

import torch
from torch import Tensor

from diffopt.errors import CompileWarning
from diffopt.tensors.memory import peak_bytes

SLOW_ROUND = 8.0
"""Seconds from which a round needs no warming up."""

TOLERANCE = 1e-9
"""Largest relative error of a method's float64 answer; methods that agree do so to about 1e-14."""


class Role(Enum):
    """What a method is in the comparison."""

    PEER = "peer"
    LOOP_PEER = "loop peer"
    WRONG_PEER = "wrong peer"
    LIMIT = "limit"
    OURS = "ours"
    BIASED = "ours, biased"


class Size(Enum):
    """How much is measured: everything, the essentials, or a tiny version of everything."""

    FULL = "full"
    QUICK = "quick"
    SMOKE = "smoke"


@final
@dataclass(frozen=True)
class Method:
    """A way to compute the hypergradient of a problem.

    Attributes:
        name: for tables.
        role: what it is in the comparison.
        run: ``run(problem)``, the gradients.
        compiles: whether its first call compiles, which is then measured apart.
    """

    name: str
    role: Role
    run: Callable[[Any], Sequence[Tensor]]
    compiles: bool = False


@final
@dataclass(frozen=True)
class Cell:
    """One problem and the methods that are set side by side on it; the first method is the reference.

    Attributes:
        workload: such as ``"W1"``.
        setting: such as ``"T=20 B=25"``.
        make: ``make(dtype, device, tasks)``, the problem with that many tasks.
        methods: what is compared.
        tasks: how many tasks are timed.
        verified_tasks: how many tasks the float64 check uses; 0: not verified at this size.
        seconds: about how long to time.
        x: where the cell stands on a picture's axis, if it is for a picture.
    """

    workload: str
    setting: str
    make: Callable[[torch.dtype, torch.device, int], Any]
    methods: Sequence[Method]
    tasks: int = 1
    verified_tasks: int = 4
    seconds: float = 20.0
    x: int | None = None


@final
@dataclass
class Measurement:
    """What was found of one method in one cell.

    Attributes:
        method: its name.
        role: its :class:`Role`.
        error: relative error in float64 against the reference; ``None``: not verified at this size.
        times: seconds of each round; none if it could not be run: out of memory, or no compiler.
        peak: bytes above the start; ``None``: likewise.
        compiling: elapsed seconds of a first call that compiles.
    """

    method: str
    role: Role
    error: float | None
    times: list[float] = field(default_factory=list)
    peak: int | None = None
    compiling: float | None = None

    @property
    def seconds(self) -> float:
        """The median time."""
        return statistics.median(self.times)


@final
@dataclass(frozen=True)
class Result:
    """All measurements of a cell."""

    workload: str
    setting: str
    measurements: tuple[Measurement, ...]
    x: int | None = None

    def of(self, method: str) -> Measurement | None:
        """The measurement of the method of this name."""
        return next((m for m in self.measurements if m.method == method), None)

    def fastest(self, roles: Sequence[Role]) -> Measurement | None:
        """The fastest method with one of these roles."""
        return min((m for m in self.measurements if m.role in roles and m.times), key=lambda m: m.seconds, default=None)


@final
@dataclass(frozen=True)
class Limit:
    """How long to time a cell: the share of its own seconds, and the fewest and the most rounds."""

    share: float
    rounds: tuple[int, int]


def measure(cell: Cell, device: torch.device, limit: Limit) -> Result:
    """Check every method's answer in float64; then time them in float32, in rounds; then weigh them.

    Raises:
        ArithmeticError: a method that should be exact is not.
    """
    errors = relative_errors(cell, device)
    rows = [Measurement(m.name, m.role, error) for m, error in zip(cell.methods, errors, strict=True)]
    for row in rows:
        exact = row.role in (Role.PEER, Role.LOOP_PEER, Role.LIMIT, Role.OURS)
        if exact and row.error is not None and not row.error < TOLERANCE:
            raise ArithmeticError(f"{cell.workload} {cell.setting}: {row.method} is off by {row.error:.1e} in float64")
    problem = cell.make(torch.float32, device, cell.tasks)
    jobs: list[Callable[[], object]] = [lambda m=m: m.run(problem) for m in cell.methods]
    for row, method, job in zip(rows, cell.methods, jobs, strict=True):
        row.compiling = _compiling(job) if method.compiles else None
    ready = [i for i, method in enumerate(cell.methods) if not method.compiles or rows[i].compiling is not None]
    times = interleaved([jobs[i] for i in ready], device, limit.share * cell.seconds, limit.rounds)
    for i, own in zip(ready, times, strict=True):
        rows[i].times = own
        rows[i].peak = peak_bytes(jobs[i]) if own else None
    return Result(cell.workload, cell.setting, tuple(rows), cell.x)


def relative_errors(cell: Cell, device: torch.device) -> list[float | None]:
    """Every method's float64 answer against the first one's: ``|g - reference| / |reference|``."""
    tasks = min(cell.tasks, cell.verified_tasks)
    if tasks == 0:
        return [None for _ in cell.methods]
    problem = cell.make(torch.float64, device, tasks)
    answers = [torch.cat([g.detach().flatten() for g in m.run(problem)]) for m in cell.methods]
    return [float((answer - answers[0]).norm() / answers[0].norm()) for answer in answers]


def _compiling(job: Callable[[], object]) -> float | None:
    """Elapsed seconds of a first call; ``None`` if it could not compile and ran as it was."""
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompileWarning)
        try:
            job()
        except CompileWarning:
            return None
    return time.monotonic() - start


def interleaved(
    jobs: Sequence[Callable[[], object]], device: torch.device, seconds: float, rounds: tuple[int, int]
) -> list[list[float]]:
    """The times of every job, all jobs once a round, to and fro; no times for a job that the memory does not suffice.

    The first round warms up and tells how many fit into ``seconds``; it counts only if it was a long one.
    """
    first = [_timed(job, device) for job in jobs]
    alive = [i for i, duration in enumerate(first) if duration is not None]
    known = [duration for duration in first if duration is not None]
    slow = sum(known) > SLOW_ROUND
    times = [[duration] if slow and duration is not None else [] for duration in first]
    count = max(rounds[0], min(rounds[1], int(seconds / max(sum(known), 1e-9)))) - slow
    for number in range(count):
        for i in alive[:: 1 - 2 * (number % 2)]:
            duration = _timed(jobs[i], device)
            assert duration is not None, "a job that had enough memory has it again"
            times[i].append(duration)
    return times


def _timed(job: Callable[[], object], device: torch.device) -> float | None:
    """Processor seconds of the process on a CPU; elsewhere elapsed seconds until the device is done."""
    if device.type == "cpu":
        start = time.process_time()
        job()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    try:
        job()
        torch.cuda.synchronize(device)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    return time.perf_counter() - start
