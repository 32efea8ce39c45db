"""Worlds of several ranks, each started once for all checks of a module."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch.distributed

HERE = Path(__file__).resolve().parent
PATIENCE = 900.0
"""Seconds after which ranks that hang are killed."""


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, bool], dict[str, str]]:
    """What came of the checks of a module on so many ranks: by name, empty where all ranks agree that it holds.

    (The slow ones are left out if the third argument is ``False``.)
    """
    if sys.platform == "win32" or not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")

    @cache
    def started(module: str, world: int, slow: bool) -> dict[str, str]:
        return _started(module, world, slow, tmp_path_factory.mktemp(f"{module}_{world}"))

    return started


def _started(module: str, world: int, slow: bool, folder: Path) -> dict[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    logs = [(folder / f"{rank}.log").open("w") for rank in range(world)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "rank.py"), str(rank), str(world), str(folder), module, *["slow"][: int(slow)]],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    ending = _waited(ranks)
    for log in logs:
        log.close()
    found: dict[str, str] = {}
    for rank in range(world):
        path = folder / f"{rank}.json"
        said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for name, text in said.items():
            found[name] = found.get(name, "") + (f"rank {rank}: {text}\n" if text else "")
    if ending:
        tails = "\n".join(f"rank {r}: {(folder / f'{r}.log').read_text()[-2000:]}" for r in range(world))
        found[""] = f"{ending}\n{tails}"
    return found


def _waited(ranks: list[subprocess.Popen[bytes]]) -> str:
    """Wait for all ranks, and end those that others wait for in vain; empty if all ended well."""
    deadline = time.monotonic() + PATIENCE
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.02)
    hung = [i for i, rank in enumerate(ranks) if rank.poll() is None]
    for i in hung:
        ranks[i].kill()
    codes = [rank.wait() for rank in ranks]
    if hung:
        return f"ranks {hung} hung for {PATIENCE:.0f} s and were killed"
    return "" if not any(codes) else f"the ranks ended with {codes}"
