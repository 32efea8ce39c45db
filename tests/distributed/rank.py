"""One rank of several: run the checks of a module and write down what came of each.

    python rank.py RANK WORLD FOLDER MODULE [slow]

``FOLDER`` is where the ranks meet and where ``RANK.json`` goes: for each check ``""``, or what went wrong. ``MODULE``
is a file of checks, or a folder of such files. A start costs seconds, a check less; so all checks of a world run in one
start (tests/distributed/conftest.py makes it); those called ``check_slow_...`` with ``slow`` only.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from checks_in import files_of
from torch import distributed

SECONDS = 120
"""After which a rank that waits for another gives up."""


def checks_of(module: str) -> dict[str, Callable[[], None]]:
    """The checks of a module: its functions called ``check_...``, in the order in which they are written."""
    here, found = Path(__file__).resolve().parent, {}
    for file in files_of(module):
        found |= vars(importlib.import_module(".".join(file.relative_to(here).with_suffix("").parts)))
    return {name.removeprefix("check_"): found[name] for name in found if name.startswith("check_")}


def outcome(check: Callable[[], None]) -> str:
    """Run one check on this rank; empty if it holds."""
    try:
        check()
    except BaseException:  # pytest's Failed, too
        return traceback.format_exc()
    return ""


def run(rank: int, world: int, folder: Path, module: str, slow: bool) -> None:
    """Run all checks; after a failure the ranks may wait for one another, and the rest is not run."""
    torch.set_num_threads(1)
    os.environ["RANKS_FOLDER"] = str(folder)  # for what all ranks write
    store = (folder / "store").as_uri()
    patience = timedelta(seconds=SECONDS)
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=patience)
    results: dict[str, str] = {}
    failed = ""
    for name, check in checks_of(module).items():
        if name.startswith("slow") and not slow:
            continue
        began = time.perf_counter()
        results[name] = f"not run, because {failed} failed" if failed else outcome(check)
        print(f"{name}: {time.perf_counter() - began:.2f} s", flush=True)
        if results[name] and not failed:
            failed = name
        (folder / f"{rank}.json").write_text(json.dumps(results), encoding="utf-8")
    if failed:
        os._exit(1)  # without waiting for the others
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5:] == ["slow"])
