"""Several processes that do one run together: each takes a share of the tasks, the first one writes.

# NOTE [why a run does not depend on the number of ranks]
Every rank draws all tasks from the same generator, and takes its share of them; what is learned from all shares is
added up, so that all ranks make the same step. A checkpoint therefore knows nothing of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, final

import torch
from torch import Tensor, distributed

from diffopt.distributed import summed

Found = TypeVar("Found")


@final
@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    Attributes:
        rank: its number, from 0.
        count: how many there are.
        device: where what they tell one another lies.
    """

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def writes(self) -> bool:
        """Whether this process writes the files and tells how it goes: the first one."""
        return self.rank == 0

    def share(self, tasks: int) -> slice:
        """Which of so many tasks are this rank's: some may have one more than others, or none."""
        ends = [tasks * i // self.count for i in range(self.count + 1)]
        return slice(ends[self.rank], ends[self.rank + 1])

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over ranks of tensors, without a derivative, the same on all ranks."""
        found: list[Tensor] = list(tensors) if self.count == 1 else summed([x.detach() for x in tensors])
        return found

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set on some rank."""
        if self.count == 1:
            return flags
        held = torch.tensor([float(flag) for flag in flags], device=self.device)
        distributed.all_reduce(held, distributed.ReduceOp.MAX)
        return tuple(bool(x) for x in held.tolist())

    def of_first(self, function: Callable[[], Found]) -> Found:
        """What a function returns on the first rank, which alone calls it.

        Raises:
            SystemExit: on the others, if it has raised an error on the first, which tells it.
        """
        if self.count == 1:
            return function()
        told: list[Any] = [None, False]
        try:
            if self.writes:
                told = [function(), True]
        finally:
            distributed.broadcast_object_list(told, src=0, device=torch.device(self.device))
        if not told[1]:
            raise SystemExit(2)
        found: Found = told[0]
        return found

    def on_first(self, function: Callable[[], Found]) -> Found | None:
        """What a function returns on the first rank, where it stays; ``None`` on the others."""
        found: list[Found] = []
        self.of_first(lambda: found.append(function()))
        return found[0] if found else None


ALONE = Ranks()


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` has started, if it has; a number of the device is then torchrun's to say."""
    environment = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")]
    started = all(environment) and environment[1] != "1" and distributed.is_available()
    if not started or distributed.is_initialized():
        yield ALONE if not started else Ranks(distributed.get_rank(), distributed.get_world_size(), device)
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), "cuda" if cuda else "cpu")
    finally:
        distributed.destroy_process_group()
