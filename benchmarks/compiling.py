"""What compiling takes: the first call of every way that compiles, cold and warm, each in a process of its own.

Cold is the first process with an empty cache, warm another one after it. Processor time, that of the compiler's own
processes included, and elapsed time. JAX keeps nothing from process to process unless it is told to, as here.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Cell, Method, Size
from benchmarks.workloads import sinusoid, weights

CPU = torch.device("cpu")


def _cells(size: Size) -> list[Cell]:
    """Those whose programs are made anew."""
    wanted = {Size.FULL: ("T=20 B=25", "T=100 B=25", "T=10"), Size.QUICK: ("T=20 B=25", "T=10"), Size.SMOKE: ()}[size]
    return [cell for cell in (*sinusoid.cells(Size.FULL), *weights.cells(Size.FULL)) if cell.setting in wanted]


def _ways(cell: Cell) -> list[Method]:
    return [m for m in cell.methods if m.compiles or m.needs == "jax"]


def measure(size: Size) -> list[dict[str, Any]]:
    """One row per cell and way: ``{"cell", "method", "cold", "warm"}``, each a pair of seconds or ``None``."""
    rows = []
    for cell in _cells(size):
        for method in _ways(cell):
            with tempfile.TemporaryDirectory() as folder:
                found = [None, None] if method.lacks(CPU) else [_first_call(cell, method, folder) for _ in range(2)]
            name = f"{cell.workload} {cell.setting}"
            rows.append({"cell": name, "method": method.name, "cold": found[0], "warm": found[1]})
    return rows


def _first_call(cell: Cell, method: Method, folder: str) -> list[float]:
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": folder,
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-m", "benchmarks.compiling", cell.workload, cell.setting, method.name]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True, check=True, cwd=root)
    return list(json.loads(done.stdout.splitlines()[-1]))


def main(workload: str, setting: str, name: str) -> None:
    """Print the seconds of the first call: of processor time, and elapsed."""
    torch.set_num_threads(1)
    cell = next(cell for cell in _cells(Size.FULL) if (cell.workload, cell.setting) == (workload, setting))
    method = next(method for method in _ways(cell) if method.name == name)
    problem = cell.make(torch.float32, CPU, cell.tasks)
    before = _processor_seconds(), time.monotonic()
    method.run(problem)
    print(json.dumps([_processor_seconds() - before[0], time.monotonic() - before[1]]))


def _processor_seconds() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


if __name__ == "__main__":
    main(*sys.argv[1:])
