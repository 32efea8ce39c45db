"""Verifying, timing and weighing: what is done with every cell of the table."""

from __future__ import annotations

import importlib.util
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, final

import torch
from torch import Tensor

from diffopt.errors import CompileWarning
from diffopt.tensors.memory import peak_bytes
from diffopt.tensors.timing import seconds_of

SLOW_ROUND = 8.0
"""Seconds from which a round needs no warming up."""

TOLERANCE = 1e-9
"""Largest relative error of a method's float64 answer; methods that agree do so to about 1e-14."""

LONG_ENOUGH, MOST_CALLS = 0.01, 8
"""A call shorter than so many seconds is repeated within its round, at most so often."""


class Role(Enum):
    """What a method is in the comparison."""

    PEER = "peer"
    LOOP_PEER = "loop peer"
    JAX = "JAX"
    WRONG_PEER = "wrong peer"
    LIMIT = "limit"
    ARITHMETIC = "arithmetic"
    OURS = "ours"
    BIASED = "ours, biased"
    BIASED_PEER = "biased peer"


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
        compiles: whether it compiles at its first call, and makes its 2nd, 4th, 8th ... call plainly as well.
        needs: the module without which its row says "not installed".
        weigh: ``weigh(problem)``, its peak in bytes, where torch's allocator does not see it.
    """

    name: str
    role: Role
    run: Callable[[Any], Sequence[Any]]
    compiles: bool = False
    needs: str = "torch"
    weigh: Callable[[Any], int] | None = None

    def lacks(self, device: torch.device) -> bool:
        """Whether what it needs is missing, here or for this device."""
        if importlib.util.find_spec(self.needs) is None:
            return True
        if self.role is not Role.JAX or device.type == "cpu":
            return False
        import jax

        return jax.default_backend() != "gpu"


class Prepared:
    """A way to run a problem for which something is made once: a program compiled, data carried over."""

    def __init__(self, make: Callable[[Any], Callable[[], Sequence[Any]]]) -> None:
        self._make, self._made = make, list[Any]()

    def of(self, problem: Any) -> Any:
        """What was made for this problem; what was made for another one is let go."""
        if not self._made or self._made[0] is not problem:
            self._made[:] = [problem, self._make(problem)]
        return self._made[1]

    def __call__(self, problem: Any) -> Sequence[Any]:
        """Its answer."""
        return self.of(problem)()


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
        times: seconds of a call in each round; none if it could not be run.
        peak: bytes above the start; ``None``: likewise.
        missing: why it could not be run: ``"not installed"``, ``"not compiled"`` or ``"out of memory"``.
    """

    method: str
    role: Role
    error: float | None
    times: list[float] = field(default_factory=list)
    peak: int | None = None
    missing: str = ""

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
        exact = row.role in (Role.PEER, Role.LOOP_PEER, Role.JAX, Role.LIMIT, Role.OURS)
        if exact and row.error is not None and not row.error < TOLERANCE:
            raise ArithmeticError(f"{cell.workload} {cell.setting}: {row.method} is off by {row.error:.1e} in float64")
    problem = cell.make(torch.float32, device, cell.tasks)
    jobs: list[Callable[[], object]] = [lambda m=m: m.run(problem) for m in cell.methods]
    for row, method, job in zip(rows, cell.methods, jobs, strict=True):
        row.missing = "not installed" if method.lacks(device) else ""
        if method.compiles and not row.missing:
            row.missing = _settled(job, device, limit.rounds[1])
        elif method.needs.startswith("jax") and not row.missing:
            job()  # which compiles
    ready = [i for i, row in enumerate(rows) if not row.missing]
    times = interleaved([jobs[i] for i in ready], device, limit.share * cell.seconds, limit.rounds)
    for i, own in zip(ready, times, strict=True):
        weigh = cell.methods[i].weigh
        rows[i].times, rows[i].missing = own, "" if own else "out of memory"
        rows[i].peak = None if not own else weigh(problem) if weigh else peak_bytes(jobs[i])
    return Result(cell.workload, cell.setting, tuple(rows), cell.x)


def relative_errors(cell: Cell, device: torch.device) -> list[float | None]:
    """Every method's float64 answer against the first one's: ``|g - reference| / |reference|``."""
    tasks = min(cell.tasks, cell.verified_tasks)
    if tasks == 0:
        return [None for _ in cell.methods]
    problem = cell.make(torch.float64, device, tasks)
    reference = _flat(cell.methods[0].run(problem))
    return [
        None
        if method.role is Role.ARITHMETIC or method.lacks(device)
        else float((_flat(method.run(problem)) - reference).norm() / reference.norm())
        for method in cell.methods
    ]


def _flat(answer: Sequence[Any]) -> Tensor:
    return torch.cat([(g if isinstance(g, Tensor) else torch.from_dlpack(g)).detach().flatten() for g in answer])


def _settled(job: Callable[[], object], device: torch.device, rounds: int) -> str:
    """Call until the plain calls among a program's are further off than it is going to be timed; or why it cannot."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompileWarning)
        try:
            for _ in range(2):
                job()
        except CompileWarning:
            return "not compiled"
    needed = 2 + (rounds + 2) * _repeats(seconds_of(job, device))
    for _ in range((1 << needed.bit_length()) - 3):
        job()
    return ""


def _repeats(seconds: float) -> int:
    return max(1, min(MOST_CALLS, int(LONG_ENOUGH / max(seconds, 1e-9))))


def interleaved(
    jobs: Sequence[Callable[[], object]], device: torch.device, seconds: float, rounds: tuple[int, int]
) -> list[list[float]]:
    """The times of every job, all jobs once a round, to and fro; no times for a job that the memory does not suffice.

    The first round warms up and tells how many fit into ``seconds``; it counts only if it was a long one.
    """
    first = [_timed(job, device, 1) for job in jobs]
    alive = [i for i, duration in enumerate(first) if duration is not None]
    known = [duration for duration in first if duration is not None]
    slow = sum(known) > SLOW_ROUND
    times = [[duration] if slow and duration is not None else [] for duration in first]
    repeats = [_repeats(duration) if duration is not None and rounds[1] > 1 else 1 for duration in first]
    one = sum(duration * n for duration, n in zip(first, repeats, strict=True) if duration is not None)
    count = max(rounds[0], min(rounds[1], int(seconds / max(one, 1e-9)))) - slow
    for number in range(count):
        for i in alive[:: 1 - 2 * (number % 2)]:
            duration = _timed(jobs[i], device, repeats[i])
            assert duration is not None, "a job that had enough memory has it again"
            times[i].append(duration)
    return times


def _timed(job: Callable[[], object], device: torch.device, calls: int) -> float | None:
    """Seconds of one of so many calls; ``None``: the GPU's memory does not suffice."""

    def work() -> None:
        for _ in range(calls):
            job()

    try:
        return seconds_of(work, device) / calls
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
