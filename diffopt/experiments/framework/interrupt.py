"""Ctrl-C, heard where it does no harm."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, final


@final
class Interrupt:
    """While this is entered, the first Ctrl-C waits for the next :meth:`check`; the second stops at once.

    # NOTE [why Ctrl-C waits]
    Raised anywhere, ``KeyboardInterrupt`` can fall into a callback of autograd, which turns it into another error, or
    between the updates of two parameters, after which nothing worth saving is left.
    """

    def __init__(self) -> None:
        """Nothing heard yet."""
        self.heard = False
        self._previous: Any = None

    def __enter__(self) -> Interrupt:
        """Start to listen; only the main thread of a process is told of Ctrl-C."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave Ctrl-C to whoever listened before."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def check(self) -> None:
        """Raise ``KeyboardInterrupt`` if Ctrl-C was heard."""
        if self.heard:
            raise KeyboardInterrupt

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.check()
        self.heard = True
