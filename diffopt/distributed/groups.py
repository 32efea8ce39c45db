"""Which ranks compute together."""

from __future__ import annotations

import os
from typing import Any, TypeAlias

import torch
from torch import distributed

from diffopt.errors import RanksError

Group: TypeAlias = Any
"""A process group of torch's; ``None``: that of all ranks. (On a torch built without them there is no such class.)"""


def is_running() -> bool:
    """Whether this program is one of several processes that have joined up."""
    return distributed.is_available() and distributed.is_initialized()


def several(group: Group, name: str) -> bool:
    """Whether there is more than one rank, for a function that is called ``name``.

    Raises:
        RanksError: the ranks have not joined up, or this one is not of the group.
    """
    if not is_running():
        processes = os.environ.get("WORLD_SIZE", "1")
        if processes.strip() not in ("", "1"):
            raise RanksError(
                f"{name} was called in one of WORLD_SIZE={processes[:20]} processes without a process group",
                "ranks that have joined up",
                "call torch.distributed.init_process_group() first",
            )
        return False
    if distributed.get_rank(group) < 0:
        raise RanksError(
            f"rank {distributed.get_rank()} called {name} with a group that it is not of",
            "a group that has this rank",
            "make it by torch.distributed.new_group on every rank, and use it on its ranks only",
        )
    return distributed.get_world_size(group) > 1


def groups_of_this_rank() -> list[Any]:
    """Every process group of more than one rank that this process is of."""
    if not is_running():
        return []
    known = getattr(getattr(distributed.distributed_c10d, "_world", None), "pg_map", None) or {}
    groups = [group for group in known if distributed.get_rank(group) >= 0]
    return [group for group in groups or [distributed.group.WORLD] if distributed.get_world_size(group) > 1]


def collectives_so_far(group: Any) -> int:
    """How many collectives a group has been asked for; 0 if its backend does not count."""
    try:
        return int(group._get_sequence_number_for_group())
    except (AttributeError, RuntimeError):
        return 0


def largest(number: float, group: Group, device: torch.device) -> float:
    """The largest of the ranks' numbers."""
    held = torch.tensor(float(number), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    distributed.all_reduce(held, distributed.ReduceOp.MAX, group=group)
    return float(held)
