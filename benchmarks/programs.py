"""Small problems as one program: eager, ``compile=True``, ``diffopt.compiled`` and JAX on W1, and what compiling takes.

``python -m benchmarks.programs [--jax PYTHON] [--steps 20] [--tasks 4 25 100]``, where PYTHON is an interpreter that
has JAX (``pip install "jax[cpu]"``); else JAX is left out. Processor time, one thread, float32; all ways once in every
round, so that whatever else the machine does falls on all alike; ratios are medians over rounds. Answers are compared
in float64 first, the gradients of JAX too.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

import diffopt
from benchmarks import jax_peer, ours
from benchmarks.problem import Problem
from benchmarks.workloads.sinusoid import problem
from diffopt.estimators import Reverse

Run = Callable[[int], float]
"""``calls -> milliseconds`` of processor time, each."""


def compiled(given: Problem) -> Callable[[], list[Tensor]]:
    """The gradient by ``diffopt.compiled``."""

    def outer(initial: Any, support: Any, query: Any) -> Tensor:
        def of_task(support: Any, query: Any) -> Tensor:
            return given.outer(ours.adapt(given, initial, {}, support, Reverse()), query)

        return vmap(of_task)(support, query).mean()

    program = diffopt.compiled(outer)
    return lambda: list(program.value_and_grad(given.initial, given.support, given.query)[1].values())


def ways(given: Problem) -> dict[str, Callable[[], Any]]:
    """Ours, by name."""
    return {
        "eager": lambda: ours.vmapped(given, Reverse("graph")),
        "compile=True": lambda: ours.vmapped(given, Reverse(1), compiled=True),
        "diffopt.compiled": compiled(given),
    }


def timed(call: Callable[[], Any]) -> Run:
    """A way in this process."""

    def run(calls: int) -> float:
        began = time.process_time()
        for _ in range(calls):
            call()
        return (time.process_time() - began) / calls * 1e3

    return run


class Jax:
    """A way in a process of JAX's."""

    def __init__(self, python: str, given: Problem, remat: bool) -> None:
        import numpy

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "data.npz"
            names = ("support_x", "support_y", "query_x", "query_y")
            data = dict(zip(names, (*given.support, *given.query), strict=True)) | given.initial
            numpy.savez(path, **{name: x.numpy() for name, x in data.items()})
            options = [str(given.steps), str(given.lr), "remat" if remat else "plain"]
            self._process = subprocess.Popen(
                [python, jax_peer.__file__, str(path), *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            first = self._answer()
        self.seconds = first["compiled"]
        self.gradient = [torch.tensor(first["gradient"][name], dtype=torch.float64) for name in given.initial]

    def __call__(self, calls: int) -> float:
        """Milliseconds of processor time, each."""
        assert self._process.stdin is not None
        print(calls, file=self._process.stdin, flush=True)
        return float(self._answer())

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the process of JAX has ended: has this Python JAX?")
        return json.loads(line)


def seconds(call: Callable[[], Any]) -> float:
    """Of processor time, those of the compiler's own processes among them."""

    def spent() -> float:
        return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

    before = spent()
    call()
    return spent() - before


def check(python: str | None, steps: int, tasks: int) -> float:
    """The largest relative difference of any way from the eager one, in float64."""
    given = problem(torch.float64, torch.device("cpu"), tasks, steps)
    found = {name: call() for name, call in ways(given).items()}
    if python is not None:
        peer = Jax(python, given, remat=False)
        found["JAX"] = peer.gradient
        peer.close()
    right = torch.cat([x.flatten() for x in found["eager"]])
    others = [torch.cat([x.flatten() for x in gradient]) for gradient in found.values()]
    return max(float((other - right).norm() / right.norm()) for other in others)


def compare(python: str | None, steps: int, tasks: int, rounds: int) -> None:
    """Print one setting."""
    given = problem(torch.float32, torch.device("cpu"), tasks, steps)
    made = ways(given)
    cost = {name: seconds(call) for name, call in made.items()}
    for _ in range(_BEFORE):  # the plain calls among those of a program then come seldom
        made["diffopt.compiled"]()
        made["compile=True"]()
    runs: dict[str, Run] = {name: timed(call) for name, call in made.items()}
    peers = {} if python is None else {f"JAX{', remat' * r}": Jax(python, given, bool(r)) for r in (0, 1)}
    runs |= peers
    cost |= {name: peer.seconds for name, peer in peers.items()}
    calls = max(2, 200 // tasks)
    table: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            table[name].append(run(calls))
    best = min((statistics.median(table[name]), name) for name in (peers or ["eager"]))[1]
    for name, times in table.items():
        ratio = statistics.median(a / b for a, b in zip(times, table[best], strict=True))
        row = f"| T={steps} B={tasks} | {name} | {statistics.median(times):.2f} | {ratio:.2f} | {cost[name]:.0f} |"
        print(row, flush=True)
    for peer in peers.values():
        peer.close()


_BEFORE = 260
"""Calls of a program before it is timed, of which the 2nd, 4th, ..., 256th are plain ones as well."""


def main() -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.programs", description=__doc__)
    parser.add_argument("--jax", metavar="PYTHON", help="an interpreter that has JAX")
    parser.add_argument("--steps", type=int, nargs="+", default=[20])
    parser.add_argument("--tasks", type=int, nargs="+", default=[4, 25, 100])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    off = check(options.jax, min(options.steps), min(options.tasks))
    print(f"In float64 all gradients agree to {off:.0e}.\n")
    print("| W1 | way | ms | over JAX | first call, s of processor time |\n|---|---|---|---|---|")
    for steps in options.steps:
        for tasks in options.tasks:
            compare(options.jax, steps, tasks, options.rounds)


if __name__ == "__main__":
    main()
