"""What a work unit is given: its seed and device, the time it has, and a place to save its state."""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from diffopt.experiments.framework.checkpoint import Checkpoint
from diffopt.experiments.framework.files import CheckpointError, load_tensors, save_tensors
from diffopt.experiments.framework.interrupt import Interrupt
from diffopt.experiments.framework.ranks import ALONE, Ranks


class OutOfTime(Exception):  # noqa: N818  (no error: the run ends in order and can be resumed)
    """The budget is used up, and the unit has saved its state."""


@final
@dataclass(frozen=True)
class UnitFile:
    """The file for the state of one unit: its path, the unit's name, and the fingerprint of its run."""

    path: Path
    unit: str
    run: str

    def write(self, state: dict[str, Any], seconds: tuple[float, float]) -> None:
        """Replace the file in one step."""
        save_tensors({"unit": self.unit, "run": self.run, "seconds": list(seconds), "state": state}, self.path)

    def read(self) -> tuple[dict[str, Any], tuple[float, float]] | None:
        """The state and the seconds that it took; ``None`` if there is no file.

        Raises:
            CheckpointError: the file is damaged, another unit's or another run's.
        """
        if not self.path.is_file():
            return None
        fix = "delete it: the unit is then computed from its start"
        content = load_tensors(self.path, fix)
        if not isinstance(content, dict) or content.get("unit") != self.unit:
            got = f"{self.path} was written by something else"
            raise CheckpointError(got, f"the state of the unit {self.unit}", fix)
        if self.run and content.get("run", self.run) != self.run:  # diffopt 0.1 did not write it
            raise CheckpointError(f"{self.path} was written by a run with another run.json", "one of this run", fix)
        seconds, state = content.get("seconds"), content.get("state")
        if not isinstance(seconds, list) or len(seconds) != 2 or not isinstance(state, dict):
            raise CheckpointError(f"{self.path} holds something else", "the state of a unit", fix)
        return state, (float(seconds[0]), float(seconds[1]))


@final
class Work:
    """What a unit is given.

    Attributes:
        seed: of the run.
        device: where to compute.
        data_dir: folder of the data, ``None`` for the default of ``diffopt.tasks``.
    """

    def __init__(
        self,
        seed: int,
        device: str = "cpu",
        data_dir: str | None = None,
        *,
        unit: str = "",
        store: Path | Checkpoint | None = None,
        deadline: float | None = None,
        save_every: float = 10.0,
        tell: Callable[[float, str], None] = lambda share, text: None,
        interrupt: Interrupt | None = None,
        run: str = "",
        ranks: Ranks = ALONE,
    ) -> None:
        """Describe the work.

        Args:
            seed: of the run.
            device: where to compute.
            data_dir: folder of the data.
            unit: the unit's name.
            store: the file for its state; ``None``: nothing is saved.
            deadline: the ``time.monotonic()`` at which it must stop.
            save_every: seconds between two saves.
            tell: is told the share that is done, 0 to 1, and how it goes.
            interrupt: hears Ctrl-C.
            run: the fingerprint of the run that the unit belongs to.
            ranks: the processes that do the unit together; the first one has the file.
        """
        self.seed, self.device, self.data_dir = seed, device, data_dir
        self._store = UnitFile(store, unit, run) if isinstance(store, Path) else store
        self._deadline, self._save_every, self._ranks = deadline, save_every, ranks
        self._tell, self._interrupt = tell, interrupt or Interrupt()
        self._before, self._began = (0.0, 0.0), (time.monotonic(), time.process_time())
        self._saved_at = time.monotonic()

    @property
    def seconds(self) -> tuple[float, float]:
        """How long this unit has taken, by the clock and of the processor, the time before it was resumed included."""
        now = (time.monotonic(), time.process_time())
        clock, processor = (a + b - c for a, b, c in zip(self._before, now, self._began, strict=True))
        return clock, processor

    def generator(self, label: str, device: str = "cpu") -> torch.Generator:
        """A new generator, the same for every unit of the run that asks for the same label."""
        number = zlib.crc32(f"{self.seed} {label}".encode())
        return torch.Generator(device).manual_seed(number)

    def saved(self) -> dict[str, Any] | None:
        """What this unit saved before it was stopped; ``None`` if it starts anew. Tensors lie on the CPU.

        Raises:
            CheckpointError: the file is damaged, another unit's or another run's.
        """
        found = self._ranks.of_first(lambda: self._store and self._store.read())
        if found is None:
            return None
        state, self._before = found
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Save tensors, numbers, texts, and lists and dictionaries of them, in one step."""
        self._saved_at = time.monotonic()
        if self._store is not None:
            self._store.write(state, self.seconds)

    def is_late(self, to_come: float = 0.0) -> bool:
        """Whether the budget has no more than so many seconds left."""
        late = self._deadline is not None and time.monotonic() + to_come >= self._deadline
        return self._ranks.any(late)[0]

    def step(
        self, done: int, total: int, text: str, state: Callable[[], dict[str, Any]], *, in_time: bool = True
    ) -> None:
        """Say that ``done`` of ``total`` iterations are done; save, and stop, if it is time to.

        Args:
            done: iterations so far.
            total: iterations in all.
            text: how it goes, for people.
            state: what to save; called only when needed.
            in_time: stop when the budget is used up; else the unit asks :meth:`is_late` and ends by itself.

        Raises:
            OutOfTime: the budget is used up; the state has been saved.
            KeyboardInterrupt: Ctrl-C was heard; the state has been saved.
        """
        self._tell(done / total, text)
        out_of_time = in_time and done < total and self.is_late()
        heard = self._ranks.any(self._interrupt.heard)[0]
        if out_of_time or heard or time.monotonic() - self._saved_at >= self._save_every:
            self.save(state())
        if heard:
            raise KeyboardInterrupt
        if out_of_time:
            raise OutOfTime


def store_name(unit: str) -> str:
    """The name of the file for a unit's state."""
    return f"{re.sub('[^A-Za-z0-9.,=+-]', '_', unit)}.{zlib.crc32(unit.encode()):08x}.pt"
