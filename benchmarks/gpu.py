"""Larger versions for a GPU. Without one, ``--smoke`` runs tiny versions on the CPU, so that this cannot rot."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from benchmarks import attention, methods, ours
from benchmarks.measure import Cell, Method, Role, Size
from benchmarks.workloads import images, long, sinusoid

PEERS = (methods.PLAIN_LOOP, methods.HIGHER, methods.TORCHOPT_META)
GRAPH, STATES, SQRT = methods.GRAPH, methods.STATES, methods.SQRT
WEIGHED = (*PEERS, methods.OURS_LOOP_GRAPH, methods.OURS_LOOP_SQRT)
VMAPPED = Method("ours, graphs, one vmap", Role.OURS, lambda problem: ours.vmapped(images.plain(problem), GRAPH))


def device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cells(size: Size) -> list[Cell]:
    """Few-shot learning as large as it is done, attention, then memory against steps and against params."""
    if size is Size.SMOKE:
        return [
            *_few_shot(steps=(2,), tasks=3, filters=2, side=16, waves=4),
            *attention.cells([5]),
            *_memory("GPU steps", [(2, 3), (3, 3)]),
            *_memory("GPU params", [(2, 3), (2, 4)]),
        ]
    lengths = (10, 30, 100, 300, 1000) if size is Size.FULL else (10, 100)
    widths = (100, 1000, 3163, 10000) if size is Size.FULL else (100, 1000)
    return [
        *_few_shot(steps=(8, 16), tasks=32, filters=64, side=28, waves=1024, own=sinusoid.PROGRAMS),
        *attention.cells([1024, 4096]),
        *_memory("GPU steps", [(steps, 1000) for steps in lengths]),
        *_memory("GPU params", [(10, width) for width in widths]),
    ]


def _few_shot(
    steps: tuple[int, ...], tasks: int, filters: int, side: int, waves: int, own: tuple[Method, ...] = ()
) -> list[Cell]:
    conv = functools.partial(images.problem, filters=filters, channels=1, side=side)
    chunked = (images.chunks("graphs", GRAPH, tasks), images.chunks("states", STATES, tasks))
    methods_conv = (*PEERS, images.RIGHT, *images.JAX, *chunked, VMAPPED)
    methods_sine = (*PEERS, methods.FUNCTORCH, *sinusoid.JAX, *methods.OURS_VMAPPED, *own)
    sine = functools.partial(sinusoid.problem, steps=5)
    return [
        *(
            Cell("GPU", f"Conv4-{filters} T={t} B={tasks}", functools.partial(conv, steps=t), methods_conv, tasks)
            for t in steps
        ),
        Cell("GPU", f"sinusoid T=5 B={waves}", sine, methods_sine, waves),
    ]


def _memory(workload: str, sizes: list[tuple[int, int]]) -> list[Cell]:
    def cell(steps: int, width: int) -> Cell:
        make = functools.partial(long.problem, width=width, steps=steps)
        x = steps if workload == "GPU steps" else width**2
        # not verified at this size: the same methods are, under "Long"
        return Cell(workload, f"T={steps}, {width**2:,} params", make, WEIGHED, verified_tasks=0, seconds=2, x=x)

    return [cell(steps, width) for steps, width in sizes]


def account(job: Callable[[], object], device: torch.device, rows: int = 10) -> list[tuple[str, float, int]]:
    """Where the time goes, by torch's profiler: operation, milliseconds of its own, calls; the largest first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    job()
    with torch.profiler.profile(activities=activities) as profile:
        job()
        if device.type == "cuda":
            torch.cuda.synchronize()
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda event: -getattr(event, name))
    return [(event.key, getattr(event, name) / 1e3, event.count) for event in events[:rows]]
