"""The peak memory of a piece of work, by the log of torch's own allocators."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch._C import _autograd, _profiler


def peak_bytes(work: Callable[[], object]) -> int | None:
    """The largest number of bytes that torch's allocators held above the start while ``work`` ran.

    ``None`` if the CPU's cannot be measured because the caller is profiling: there is one profiler per thread.

    # NOTE [which profiler]
    The public ``torch.profiler`` starts Kineto, which writes lines to stderr unless an environment variable told it not
    to before its first use in the process. The older one below it logs the same allocations and touches nothing else.

    # NOTE [garbage first]
    Torch warns on stderr of a block that is freed under its profiler and was allocated before. Reference cycles of
    earlier calls hold such blocks, and the collector might come upon them while ``work`` runs; so it runs before. Work
    that lets go of what an earlier call of it has kept still makes torch warn, once.
    """
    if torch.cuda.is_available() and torch.cuda.memory_allocated() > 0:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if _autograd._profiler_enabled():
        work()
        return None
    # records neither shapes nor stacks, flops or modules: memory only
    options = _profiler.ProfilerConfig(
        _profiler.ProfilerState.CPU, False, True, False, False, False, _profiler._ExperimentalConfig()
    )
    log: Any = ()
    gc.collect()
    _autograd._enable_profiler_legacy(options)
    try:
        work()
    finally:
        log = _autograd._disable_profiler_legacy()
    changes = [event.cpu_memory_usage() for events in log for event in events if event.kind() == "memory_alloc"]
    return max(accumulate(changes), default=0)
