"""The command line: ``python -m benchmarks [--quick | --smoke] [--only W1,W4] [--out DIR] [--profile]``."""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch: its profiler says hello on every start

import torch
from rich.console import Console

from benchmarks import compiling, gpu, pictures, sweeps
from benchmarks.goals import judge
from benchmarks.measure import Cell, Limit, Role, Size, measure
from benchmarks.report import Report, about, account_table, cell_table, compiling_table, goal_table
from benchmarks.workloads import binomial, images, leaves, long, penalties, sinusoid, weights

CELLS: dict[str, Callable[[Size], list[Cell]]] = {
    "W1": sinusoid.cells,
    "W2": lambda size: [cell for cell in images.cells(size) if cell.workload == "W2"],
    "W3": lambda size: [cell for cell in images.cells(size) if cell.workload == "W3"],
    "W4": penalties.cells,
    "W5": weights.cells,
    "Binomial": binomial.cells,
    "Leaves": leaves.cells,
    "Long": long.cells,
    "Steps": sweeps.steps,
    "Tasks": sweeps.tasks,
}
SECTIONS = (*CELLS, "Compiling", "Errors", "GPU")
LIMITS = {Size.FULL: Limit(1.0, (3, 31)), Size.QUICK: Limit(0.5, (2, 15)), Size.SMOKE: Limit(0.0, (1, 1))}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="the essential cells, fewer rounds; about 10 minutes")
    sizes.add_argument("--smoke", action="store_true", help="tiny sizes, only to see that everything runs")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"comma-separated: {', '.join(SECTIONS)}")
    parser.add_argument("--out", default="runs/benchmarks", help="folder for results.json and pictures")
    parser.add_argument("--profile", action="store_true", help="account for the time of our first method in each cell")
    given = parser.parse_args()
    given.only = [name.strip() for name in given.only.split(",")]
    unknown = [name for name in given.only if name not in SECTIONS]
    if unknown:
        parser.error(f"--only names {', '.join(unknown)}; known: {', '.join(SECTIONS)}")
    return given


def main() -> None:
    given = options()
    size = Size.SMOKE if given.smoke else Size.QUICK if given.quick else Size.FULL
    console = Console(width=None if os.isatty(1) else 140, markup=False, emoji=False)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torchopt")  # it calls functorch by its old name
    torch.set_num_threads(1)
    start = time.monotonic()
    report, out = Report(about(_command(given, size))), Path(given.out)
    for name, cells in CELLS.items():
        if name in given.only:
            run(cells(size), torch.device("cpu"), size, report, console, out, profile=given.profile)
    if "Compiling" in given.only:
        console.print("First calls, cold and warm ...")
        report.compiling = compiling.measure(size)
        console.print(compiling_table(report.compiling))
    if "Errors" in given.only:
        console.print("Errors of every estimator ...")
        report.errors = sweeps.errors(size)
    if "GPU" in given.only and (gpu.device().type == "cuda" or size is Size.SMOKE):
        run(gpu.cells(size), gpu.device(), size, report, console, out, profile=True)
    if verdicts := judge(report.results):
        console.print(goal_table(verdicts))
    report.save(out / "results.json")
    drawn = pictures.draw(report, out)
    console.print(f"{time.monotonic() - start:.0f} s; {out / 'results.json'} and {len(drawn)} pictures beside it")


def _command(given: argparse.Namespace, size: Size) -> str:
    """The command without the folder, which is no one else's business."""
    parts = ["python -m benchmarks"]
    parts += [] if size is Size.FULL else [f"--{size.value}"]
    parts += [] if given.only == list(SECTIONS) else [f"--only {','.join(given.only)}"]
    return " ".join(parts)


def run(
    cells: list[Cell], device: torch.device, size: Size, report: Report, console: Console, out: Path, *, profile: bool
) -> None:
    """Measure cells, showing each when it is done."""
    for cell in cells:
        if size is Size.SMOKE:
            cell = dataclasses.replace(cell, setting=f"{cell.setting}, tiny")
        start = time.monotonic()
        result = measure(cell, device, LIMITS[size])
        report.results.append(result)
        report.save(out / "results.json")  # a long run that breaks off leaves what it has
        console.print(cell_table(result))
        rounds = max(len(m.times) for m in result.measurements)
        console.print(f"{rounds} rounds, {time.monotonic() - start:.0f} s\n", style="dim", highlight=False)
        if profile and cell.x is None:
            own = next(method for method in cell.methods if method.role is Role.OURS)
            problem = cell.make(torch.float32, device, cell.tasks)
            title = f"{cell.workload} {cell.setting}, {own.name}"
            report.accounts[title] = gpu.account(lambda own=own, problem=problem: own.run(problem), device)
            console.print(account_table(title, report.accounts[title]))


if __name__ == "__main__":
    main()
