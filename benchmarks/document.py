"""Write ``docs/performance.md`` and its pictures from a run: ``python -m benchmarks.document results.json``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from string import Template

from benchmarks import pictures
from benchmarks.goals import JAX, PEERS, Verdict, judge, ratio
from benchmarks.measure import Measurement, Result, Role
from benchmarks.reasons import EARLIER, REASONS
from benchmarks.report import (
    CELL_COLUMNS,
    COMPILING_COLUMNS,
    GOAL_COLUMNS,
    Report,
    cell_rows,
    compiling_rows,
    goal_rows,
)
from diffopt import reports

ROOT = Path(__file__).resolve().parents[1]
table = partial(reports.table, form="markdown", align="lr")


def write(report: Report, docs: Path, again: Report | None = None) -> None:
    """Write the page and the pictures; ``again`` is the same run once more, which shows the noise."""
    cells = [result for result in report.results if result.x is None]
    on_gpu = [result for result in cells if result.workload == "GPU"]
    cells = [result for result in cells if result.workload != "GPU"]
    verdicts = judge(report.results)
    met = sum(verdict.met is True for verdict in verdicts)
    missing = sum(verdict.met is None for verdict in verdicts)
    drawn = pictures.draw(report, docs / "performance")
    parts = {
        **{name.replace(" ", "_"): value for name, value in report.about.items()},
        "about": table(("", ""), list(report.about.items())),
        "standing": standing(cells),
        "summary": f"{met} of {len(verdicts)} goals were met; {missing} were not measured.",
        "goals": goals(verdicts, [] if again is None else judge(again.results)),
        "reasons": reasons(verdicts),
        "compiling": compiling(report, again),
        "processors": processors(report, cells),
        "pictures": "\n\n".join(f"![{path.stem}](performance/{path.name})" for path in drawn),
        "accounts": accounts(report),
        "cells": sections(cells),
        "gpu": gpu(report, on_gpu),
    }
    page = Template((Path(__file__).parent / "page.md").read_text(encoding="utf-8")).substitute(parts)
    (docs / "performance.md").write_text(page, encoding="utf-8")


def standing(results: Sequence[Result]) -> str:
    """The fastest of ours beside the fastest peer of torch's and of JAX's, cell by cell, and how often it wins."""
    rows, won, compared = [], [0, 0], [0, 0]
    for result in results:
        own = result.fastest([Role.OURS])
        if own is None:
            continue
        row = [f"{result.workload} {result.setting}", own.method]
        for i, roles in enumerate((PEERS, JAX)):
            peer = result.fastest(roles)
            compared[i] += peer is not None
            won[i] += peer is not None and ratio(own, peer)[0] < 1
            row += ["", ""] if peer is None else [peer.method, _bold(ratio(own, peer)[0])]
        rows.append((*row, _memory(own, result.fastest(PEERS))))
    counts = [f"{of} in {a} of {n} cells" for of, a, n in zip(("torch's", "JAX's"), won, compared, strict=True) if n]
    columns = ("cell", "our fastest", "torch's fastest peer", "time", "JAX's fastest", "time", "memory")
    return f"We are faster than {' and '.join(counts)}.\n\n{table(columns, rows)}"


def _bold(time: float) -> str:
    """A ratio, in bold where it is lost."""
    return f"{time:.2f}" if time < 1 else f"**{time:.2f}**"


def _memory(own: Measurement, peer: Measurement | None) -> str:
    return f"{own.peak / peer.peak:.2f}" if peer is not None and own.peak is not None and peer.peak else ""


def goals(verdicts: Sequence[Verdict], again: Sequence[Verdict]) -> str:
    """The table of goals, with what another run measured."""
    columns, rows = [column or " " for column in GOAL_COLUMNS], goal_rows(verdicts)
    if again:
        others = {_key(v): v.measured for v in again}
        columns.append("once more")
        for i, v in enumerate(verdicts):
            other = others.get(_key(v))
            rows[i] = (*rows[i], "" if other is None else f"{other:.3g}")
    return table(columns, rows)


def _key(verdict: Verdict) -> tuple[object, ...]:
    goal = verdict.goal
    return goal.cell, goal.method, goal.quantity, goal.limit, goal.against


def reasons(verdicts: Sequence[Verdict]) -> str:
    """What limits each goal that was missed, those of one reason together."""
    missed: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.met is False:
            goal = f"{verdict.goal.cell} ({verdict.goal.method}, {verdict.goal.quantity})"
            names = missed.setdefault(verdict.goal.why, [])
            names += [] if goal in names else [goal]
    lines = [f"- **{'; '.join(names)}**. {REASONS.get(why, 'Not looked into.')}" for why, names in missed.items()]
    return "\n".join(lines) if lines else "No goal was missed."


def compiling(report: Report, again: Report | None) -> str:
    """What first calls take, in both runs."""
    runs = [compiling_rows(run.compiling) for run in (report, again) if run is not None and run.compiling]
    return "\n\n".join(table(COMPILING_COLUMNS, rows) for rows in runs) if runs else "Not measured in this run."


def processors(report: Report, results: Sequence[Result]) -> str:
    """Ratios of the same code, or nearly so, on another processor and on this one."""
    cells = {f"{result.workload} {result.setting}": result for result in results}
    rows = []
    for (cell, one, other), (before, commit) in EARLIER.items():
        found = [cells[cell].of(name) for name in (one, other)] if cell in cells else []
        if len(found) == 2 and found[0] and found[1] and found[0].times and found[1].times:
            rows.append((cell, f"{one} / {other}", f"{before:.2f} ({commit})", f"{ratio(found[0], found[1])[0]:.2f}"))
    return table(("cell", "time of", "AMD EPYC", report.about["processor"]), rows) if rows else "Not measured."


def sections(results: Sequence[Result]) -> str:
    """One table per cell."""
    return "\n\n".join(f"### {r.workload} {r.setting}\n\n{table(CELL_COLUMNS, cell_rows(r))}" for r in results)


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
