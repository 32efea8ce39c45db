"""What a work unit is given: its seed and device, the time it has, and a place to save its state."""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import torch

from diffopt.experiments.framework.checkpoint_content import CheckpointError
from diffopt.experiments.framework.files import load_tensors, save_tensors
from diffopt.experiments.framework.interrupt import Interrupt


class OutOfTime(Exception):  # noqa: N818  (no error: the run ends in order and can be resumed)
    """The budget is used up, and the unit has saved its state."""


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
        store: Path | None = None,
        deadline: float | None = None,
        save_every: float = 10.0,
        tell: Callable[[float, str], None] = lambda share, text: None,
        interrupt: Interrupt | None = None,
        run: str = "",
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
        """
        self.seed, self.device, self.data_dir = seed, device, data_dir
        self._unit, self._store, self._deadline, self._save_every = unit, store, deadline, save_every
        self._tell, self._interrupt, self._run = tell, interrupt, run
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
        if self._store is None or not self._store.is_file():
            return None
        mend = "delete it: the unit is then computed from its start"
        content = load_tensors(self._store, mend)
        if not isinstance(content, dict) or content.get("unit") != self._unit:
            raise CheckpointError(
                f"{self._store} was written by something else", f"the state of the unit {self._unit}", mend
            )
        if self._run and content.get("run", self._run) != self._run:  # diffopt 0.1 did not write it
            raise CheckpointError(f"{self._store} was written by a run with another run.json", "one of this run", mend)
        seconds, state = content.get("seconds"), content.get("state")
        if not isinstance(seconds, list) or len(seconds) != 2 or not isinstance(state, dict):
            raise CheckpointError(f"{self._store} holds something else", "the state of a unit", mend)
        self._before = (float(seconds[0]), float(seconds[1]))
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Save tensors, numbers, texts, and lists and dictionaries of them, in one step."""
        self._saved_at = time.monotonic()
        if self._store is not None:
            content = {"unit": self._unit, "run": self._run, "seconds": list(self.seconds), "state": state}
            save_tensors(content, self._store)

    def step(self, done: int, total: int, text: str, state: Callable[[], dict[str, Any]]) -> None:
        """Say that ``done`` of ``total`` iterations are done; save, and stop, if it is time to.

        Args:
            done: iterations so far.
            total: iterations in all.
            text: how it goes, for people.
            state: what to save; called only when needed.

        Raises:
            OutOfTime: the budget is used up; the state has been saved.
            KeyboardInterrupt: Ctrl-C was heard; the state has been saved.
        """
        self._tell(done / total, text)
        now = time.monotonic()
        out_of_time = self._deadline is not None and now >= self._deadline and done < total
        heard = self._interrupt is not None and self._interrupt.heard
        if out_of_time or heard or now - self._saved_at >= self._save_every:
            self.save(state())
        if heard:
            raise KeyboardInterrupt
        if out_of_time:
            raise OutOfTime


def store_name(unit: str) -> str:
    """The name of the file for a unit's state."""
    return f"{re.sub('[^A-Za-z0-9.,=+-]', '_', unit)}.{zlib.crc32(unit.encode()):08x}.pt"
