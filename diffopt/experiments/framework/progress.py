"""How a long run tells where it is: a live bar on a terminal, a line now and then in a file."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from diffopt.experiments.framework.console import plain_console

SECONDS_BETWEEN_LINES = 30.0


class Reporter(ABC):
    """Where a run tells its progress."""

    @abstractmethod
    def update(self, done: float, text: str) -> None:
        """So much is done, and ``text`` is how it goes; may be shown or passed over."""

    @abstractmethod
    def say(self, text: str) -> None:
        """Show a line that stays."""


@contextmanager
def reporter(total: int, counted: str = "iteration", *, silent: bool = False) -> Iterator[Reporter]:
    """A reporter on standard output for a run of so many iterations (or ``counted``); or one that says nothing."""
    console = plain_console()
    if silent or not console.is_terminal:
        yield _Lines(total, counted, silent)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console) as progress:
        yield _Bar(progress, total)


@final
class _Bar(Reporter):
    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._task = progress, progress.add_task("", total=total)

    def update(self, done: float, text: str) -> None:
        self._progress.update(self._task, completed=done, description=text)

    def say(self, text: str) -> None:
        self._progress.console.print(text)


@final
class _Lines(Reporter):
    def __init__(self, total: int, counted: str, silent: bool) -> None:
        self._total, self._counted, self._silent, self._told = total, counted, silent, time.monotonic()

    def update(self, done: float, text: str) -> None:
        if time.monotonic() - self._told >= SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            self.say(f"{self._counted} {int(done + 1e-6)} of {self._total}: {text}")

    def say(self, text: str) -> None:
        if not self._silent:
            print(text, flush=True)
