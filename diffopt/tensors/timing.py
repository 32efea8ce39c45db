"""How long a piece of work takes: processor time on a CPU, events of the stream on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that ``work`` takes on ``device``.

    On a CPU the processor time of this process, which what else the machine does does not enter. On a GPU the time
    between two events of the current stream, which stands still before the first and is waited for after the second:
    the processor's own time would end when all is queued, not when it is done.
    """
    if device.type != "cuda":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    with torch.cuda.device(device):
        event: Any = torch.cuda.Event  # which torch leaves without types
        first, last = event(enable_timing=True), event(enable_timing=True)
        first.record()
        work()
        last.record()
    torch.cuda.synchronize(device)
    return float(first.elapsed_time(last)) / 1e3
