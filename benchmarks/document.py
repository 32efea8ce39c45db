"""Write ``docs/performance.md`` and its pictures from a run: ``python -m benchmarks.document results.json``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from string import Template

from benchmarks import pictures
from benchmarks.goals import PEERS, Verdict, judge, ratio
from benchmarks.measure import Result, Role
from benchmarks.report import CELL_COLUMNS, GOAL_COLUMNS, Report, cell_rows, goal_rows
from diffopt import reports

ROOT = Path(__file__).resolve().parents[1]
table = partial(reports.table, form="markdown", align="lr")


def write(report: Report, docs: Path, again: Report | None = None) -> None:
    """Write the page and the pictures; ``again`` is the same run once more, which shows the noise."""
    cells = [result for result in report.results if result.x is None]
    on_gpu = [result for result in cells if result.workload == "GPU"]
    verdicts = judge(report.results)
    met = sum(verdict.met is True for verdict in verdicts)
    missing = sum(verdict.met is None for verdict in verdicts)
    drawn = pictures.draw(report, docs / "performance")
    parts = {
        "about": table(("", ""), list(report.about.items())),
        "summary": f"{met} of {len(verdicts)} goals were met; {missing} were not measured.",
        "goals": goals(verdicts, [] if again is None else judge(again.results)),
        "losses": losses([result for result in cells if result.workload != "GPU"]),
        "pictures": "\n\n".join(f"![{path.stem}](performance/{path.name})" for path in drawn),
        "accounts": accounts(report),
        "cells": sections([result for result in cells if result.workload != "GPU"]),
        "gpu": gpu(report, on_gpu),
    }
    page = Template((Path(__file__).parent / "page.md").read_text(encoding="utf-8")).substitute(parts)
    (docs / "performance.md").write_text(page, encoding="utf-8")


def goals(verdicts: Sequence[Verdict], again: Sequence[Verdict]) -> str:
    """The table of goals, with what another run measured."""
    columns, rows = [column or " " for column in GOAL_COLUMNS], goal_rows(verdicts)
    if again:
        others = {(v.goal.cell, v.goal.method, v.goal.quantity, v.goal.limit): v.measured for v in again}
        columns.append("once more")
        for i, v in enumerate(verdicts):
            other = others.get((v.goal.cell, v.goal.method, v.goal.quantity, v.goal.limit))
            rows[i] = (*rows[i], "" if other is None else f"{other:.3g}")
    return table(columns, rows)


def sections(results: Sequence[Result]) -> str:
    """One table per cell."""
    return "\n\n".join(f"### {r.workload} {r.setting}\n\n{table(CELL_COLUMNS, cell_rows(r))}" for r in results)


def losses(results: Sequence[Result]) -> str:
    """The cells in which the fastest of ours is slower than the fastest peer, or needs more memory than it."""
    rows = []
    for result in results:
        own, peer = result.fastest([Role.OURS]), result.fastest(PEERS)
        if own is None or peer is None or own.peak is None or not peer.peak:
            continue
        time, memory = ratio(own, peer)[0], own.peak / peer.peak
        if time > 1 or memory > 1:
            cell = f"{result.workload} {result.setting}"
            rows.append((cell, own.method, peer.method, f"{time:.2f}", f"{memory:.2f}"))
    if not rows:
        return "In no cell was the fastest of ours slower, or larger, than the fastest peer."
    columns = ("cell", "our fastest", "fastest peer", "time", "memory")
    return f"Our fastest method against the fastest peer, wherever it is slower or larger:\n\n{table(columns, rows)}"


def accounts(report: Report) -> str:
    """Where the time of our first method in each cell goes: the operations with the most time of their own."""
    rows = [
        (title, ", ".join(f"`{operation}` {milliseconds:.1f}" for operation, milliseconds, _ in found[:4]))
        for title, found in report.accounts.items()
        if not title.startswith("GPU")
    ]
    return table(("cell and method", "own time of the largest operations, ms"), rows) if rows else "Not looked into."


def gpu(report: Report, results: Sequence[Result]) -> str:
    """The cells on the GPU and where their time goes."""
    if report.about["GPU"] == "none" or not results:
        return (
            "No GPU was at hand for this run, so nothing is claimed. With one, `python -m benchmarks` measures "
            "Conv4-64 with 32 tasks, sine waves with 1,024 tasks, and memory against steps and params; tiny "
            "versions run on the CPU in `--smoke`."
        )
    accounts = [
        f"Where the time goes: {title}\n\n"
        + table(("operation", "own time, ms", "calls"), [(f"`{a}`", f"{b:.2f}", str(c)) for a, b, c in rows])
        for title, rows in report.accounts.items()
        if title.startswith("GPU")
    ]
    return "\n\n".join([f"{report.about['GPU']}; elapsed time.", sections(results), *accounts])


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.document", description=__doc__, allow_abbrev=False)
    parser.add_argument("results", type=Path, nargs="?", default=Path("runs/benchmarks/results.json"))
    parser.add_argument("--again", type=Path, help="results of the same run once more, to show the noise")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of performance.md")
    given = parser.parse_args()
    write(Report.load(given.results), given.docs, Report.load(given.again) if given.again else None)
    print(given.docs / "performance.md")


if __name__ == "__main__":
    main()
