"""What one run found: kept as JSON, shown as tables."""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, final

import torch
from rich.table import Table

from benchmarks.goals import JAX, PEERS, Verdict, ratio
from benchmarks.measure import Measurement, Result, Role
from diffopt.experiments.framework.console import grid

LIBRARIES = ("torch", "higher", "torchopt", "jax", "jaxopt", "numpy")


@final
@dataclass
class Report:
    """One run.

    Attributes:
        about: date, device, versions, command and commit.
        results: one per cell.
        errors: for each problem, one row per estimator; see :func:`benchmarks.sweeps.errors`.
        accounts: for each cell profiled, operation, milliseconds and calls.
        compiling: what first calls take; see :func:`benchmarks.compiling.measure`.
    """

    about: dict[str, str]
    results: list[Result] = field(default_factory=list)
    errors: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    accounts: dict[str, list[tuple[str, float, int]]] = field(default_factory=dict)
    compiling: list[dict[str, Any]] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the JSON file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(self), indent=1, default=lambda role: role.value)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read what :meth:`save` wrote."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        results = [
            Result(
                **{**result, "measurements": tuple(_measurement(**m) for m in result["measurements"])},
            )
            for result in raw.pop("results")
        ]
        return cls(results=results, **raw)

    def cells(self, workload: str) -> list[Result]:
        """The results of one workload."""
        return [result for result in self.results if result.workload == workload]


def _measurement(role: str, **rest: Any) -> Measurement:
    return Measurement(role=Role(role), **rest)


def about(command: str) -> dict[str, str]:
    """Date, device, versions, command and commit."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "processor": f"{_processor()}, one thread",
        "GPU": gpu,
        "Python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
        "command": command,
        "commit": _commit(),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """Its model, what tells models of one name apart, and the instructions that torch uses."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    said = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    model = said.get("model name", platform.processor() or platform.machine())
    kind = f" (family {said['cpu family']}, model {said['model']})" if "model" in said and "cpu family" in said else ""
    return f"{model}{kind}, {torch.backends.cpu.get_cpu_capability()}"


def _commit() -> str:
    def git(*arguments: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


CELL_COLUMNS = ("method", "error (float64)", "time, ms", "ratio", "quartiles", "to JAX", "peak, MB", "ratio")


def cell_rows(result: Result) -> list[tuple[str, ...]]:
    """One cell's lines; ratios are to the fastest peer of torch's, which gets a star, and to the faster of JAX's."""
    best, jax = result.fastest(PEERS) or result.measurements[0], result.fastest(JAX)
    return [_cell_row(m, best, jax) for m in result.measurements]


def _cell_row(m: Measurement, best: Measurement, jax: Measurement | None) -> tuple[str, ...]:
    name = m.method + (" *" if m is best else "") + (" (WRONG)" if m.role is Role.WRONG_PEER else "")
    error = "-" if m.error is None else f"{m.error:.1e}"
    if m.missing:
        return (name, error, m.missing, "", "", "", "", "")
    middle, low, high = ratio(m, best)
    quartiles = "" if m is best else f"{low:.2f}-{high:.2f}"
    beside = "" if jax is None else f"{ratio(m, jax)[0]:.2f}"
    times = (name, error, f"{1e3 * m.seconds:.1f}", f"{middle:.2f}", quartiles, beside)
    if m.peak is None or m.role is Role.ARITHMETIC:
        return (*times, "-", "")
    return (*times, f"{m.peak / 1e6:.2f}", f"{m.peak / best.peak:.2f}" if best.peak else "-")


def cell_table(result: Result) -> Table:
    """One cell as a table for the terminal."""
    styles = ["bold" if m.role in (Role.OURS, Role.BIASED) else None for m in result.measurements]
    title = f"{result.workload}  {result.setting}"
    return grid(CELL_COLUMNS, cell_rows(result), title, "lr", len(CELL_COLUMNS), styles)


GOAL_COLUMNS = ("cell", "method", "compared with", "", "goal", "measured", "", "by hand")


def goal_rows(verdicts: list[Verdict]) -> list[tuple[str, ...]]:
    """The goals' lines, as text."""
    return [_goal_row(verdict) for verdict in verdicts]


def _goal_row(verdict: Verdict) -> tuple[str, ...]:
    goal = verdict.goal
    unit = "" if verdict.against else " MB"
    measured = "-" if verdict.measured is None else f"{verdict.measured:.3g}{unit}"
    if verdict.low is not None and verdict.high is not None:
        measured += f" ({verdict.low:.3g}-{verdict.high:.3g})"
    word = {True: "met", False: "MISSED", None: verdict.missing or "not measured"}[verdict.met]
    by_hand = "" if verdict.by_hand is None else f"{verdict.by_hand:.3g}"
    against, limit = verdict.against or "-", f"<= {goal.limit:.3g}{unit}"
    return (goal.cell, goal.method, against, goal.quantity, limit, measured, word, by_hand)


def goal_table(verdicts: list[Verdict]) -> Table:
    """The goals as a table for the terminal."""
    met = sum(verdict.met is True for verdict in verdicts)
    styles = [{True: "green", False: "red", None: "yellow"}[verdict.met] for verdict in verdicts]
    title = f"Goals: {met} of {len(verdicts)} met"
    return grid(GOAL_COLUMNS, goal_rows(verdicts), title, "llllrrlr", styles=styles)


COMPILING_COLUMNS = ("cell", "method", "cold, s", "elapsed", "warm, s", "elapsed")


def compiling_rows(found: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The lines of what first calls take."""
    rows = []
    for row in found:
        pairs = [row["cold"], row["warm"]]
        times = ["not installed", "", "", ""] if None in pairs else [f"{x:.1f}" for pair in pairs for x in pair]
        rows.append((row["cell"], row["method"], *times))
    return rows


def compiling_table(found: list[dict[str, Any]]) -> Table:
    """First calls as a table for the terminal."""
    return grid(COMPILING_COLUMNS, compiling_rows(found), "First calls, each in a process of its own", "llrrrr")


def account_table(title: str, rows: list[tuple[str, float, int]]) -> Table:
    """A profiler's account as a table for the terminal."""
    cells = [(operation, f"{milliseconds:.2f}", str(calls)) for operation, milliseconds, calls in rows]
    return grid(("operation", "own time, ms", "calls"), cells, f"Where the time goes: {title}", "lr", 3)
