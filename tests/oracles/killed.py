"""A run in a process of its own that is killed at random moments and gone on with."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

from limits import PATIENCE


def killed_twice(argv: list[str], out: Path, marks: tuple[str, ...], longest: float) -> None:
    """Run a command to its end, killed twice, up to so many seconds after it has written a file of these suffixes."""

    def written() -> list[int]:
        return sorted(path.stat().st_mtime_ns for path in out.glob("*") if path.name.endswith(marks))

    moments, kills, resume = random.Random(0), 0, list[str]()
    while True:
        before = written()
        process = subprocess.Popen([*argv, *resume], stdout=subprocess.DEVNULL)
        while kills < 2 and process.poll() is None:
            if written() != before:  # it has begun to work
                time.sleep(moments.uniform(0, longest))
                process.kill()
                kills += 1
                break
            time.sleep(0.01)
        code = process.wait(timeout=PATIENCE)
        if code == 0:
            break
        assert code == -signal.SIGKILL, "it ended by itself, with an error"
        resume = ["--resume"]
    assert kills == 2
