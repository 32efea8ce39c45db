"""What an experiment found, as a small file that can be committed, and as tables on the terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffopt.experiments.framework.console import grid, plain_console
from diffopt.experiments.framework.experiment import Cell, Experiment, Summary
from diffopt.experiments.framework.run_folder import Header


def results_file(
    experiment: Experiment[Any],
    header: Header,
    summary: Summary,
    minutes: dict[str, float],
    left_out: Sequence[str],
    pictures: Sequence[str],
) -> dict[str, Any]:
    """The content of ``results.json``: no paths of this machine, nothing that is not in the tables or the claims."""
    return {
        "experiment": experiment.name,
        "title": experiment.title,
        "paper": experiment.paper,
        "data": experiment.needs.data,
        "command": header.command() + ("" if experiment.needs.data == "none" else " --data-dir DIR"),
        "date": time.strftime("%Y-%m-%d"),
        **minutes,
        "device": header.device_name,
        "threads": header.threads,
        "torch": header.torch,
        "diffopt": header.diffopt,
        "seed": header.seed,
        "scale": header.scale,
        "settings": header.settings,
        "left_out": list(left_out),
        "pictures": list(pictures),
        "tables": [asdict(table) for table in summary.tables],
        "claims": [asdict(claim) for claim in summary.claims],
        "notes": list(summary.notes),
    }


def shown(cell: Cell) -> str:
    """A cell as text: three significant digits."""
    if cell is None:
        return "-"
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def started(results: Mapping[str, Any], claim: Mapping[str, Any]) -> int:
    """How many starts a claim's answer rests on; results of diffopt 0.1 say so by the setting, if at all."""
    return int(claim.get("starts") or results.get("settings", {}).get("seeds", 1))


def show(results: dict[str, Any], folder: Path) -> None:
    """Print tables, claims, what was left out, and where the files are."""
    console = plain_console()
    for table in results["tables"]:
        columns, rows = table["columns"], table["rows"]
        numbers = [any(isinstance(row[i], int | float) for row in rows) for i in range(len(columns))]
        align = "".join("r" if each else "l" for each in numbers)
        console.print(grid(columns, [tuple(map(shown, row)) for row in rows], table["title"], align))
    claims = [
        (claim["text"], claim["source"], claim["answer"], str(started(results, claim)), claim["evidence"])
        for claim in results["claims"]
    ]
    title = "What the paper claims, and what was measured"
    console.print(grid(("claim", "source", "measured", "starts", "evidence"), claims, title))
    for note in results["notes"]:
        console.print(f"- {note}")
    if results["left_out"]:
        missing = ", ".join(results["left_out"])
        console.print(f"Left out for want of time ({len(results['left_out'])}): {missing}; go on with --resume")
    files = [folder / "results.json", *(folder / name for name in results["pictures"])]
    took = f"{results['minutes']} minutes of work, {results['processor_minutes']} of the processor"
    console.print(f"{took}; {', '.join(map(str, files))}", soft_wrap=True)
