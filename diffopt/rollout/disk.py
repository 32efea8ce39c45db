"""Stored states on the disk: one temporary file, and one thread that writes and reads it.

# NOTE [why plain bytes in one file]
Nobody but the process that wrote it reads the file, while it knows shapes and dtypes: a format that describes itself
(safetensors) would add a header for each state, a file for each (its files cannot be written in part), and names that
something must remove after a crash. This file has no name: the system frees it with the process, however that ends.
Mapped into memory instead, its pages would count as the process's own.
"""

from __future__ import annotations

import errno
import os
import tempfile
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from diffopt.errors import EstimatorError, StorageError
from diffopt.tensors import transfers
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.spread import is_spread
from diffopt.tensors.tree import describe

IN_FLIGHT = 2
"""How many states may be on their way to where they wait; each of them is still where it came from, too."""


@final
class Disk:
    """Where states are written to and read from."""

    def __init__(self) -> None:
        """Open nothing yet."""
        self._file: _File | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._flying: deque[_OnDisk] = deque()

    def expect(self, count: int, nbytes: int) -> None:
        """Refuse more states than there is room for.

        Raises:
            StorageError: there is not.
        """
        self._file = self._file or _File()
        free = self._file.free
        if count * nbytes > free:
            raise StorageError(
                f"offload='disk': {count:,} states of {nbytes:,} bytes are to be stored in the folder of temporary "
                f"files, {tempfile.gettempdir()!r}, where {free:,} bytes are free",
                f"{count * nbytes:,} bytes to be",
                _MORE_ROOM,
            )

    def put(self, state: Leaves, events: Sequence[Any], devices: Sequence[torch.device]) -> _OnDisk:
        """Begin to write a state that is in the CPU's memory after these events, and comes from these devices.

        Raises:
            EstimatorError: it cannot be written.
            StorageError: there is no room for it, or for an earlier one.
        """
        self._file = self._file or _File()
        written = _OnDisk(self, self._file, state, events, devices)
        self._flying.append(written)
        while len(self._flying) > IN_FLIGHT:
            self._flying.popleft().wait()
        return written

    def run(self, work: Callable[[], None]) -> Future[None]:
        """Let the thread do this after all that it was given before."""
        self._thread = self._thread or ThreadPoolExecutor(1, "diffopt-disk")
        return self._thread.submit(work)

    def settle(self) -> None:
        """Wait for what is being written, and end the thread.

        # NOTE [a file that is full is not written to again]
        What is stored later goes to another file: so this one stays as it is for a process that was forked meanwhile.

        Raises:
            StorageError: it could not be written.
        """
        while self._flying:
            self._flying.popleft().wait()
        if self._thread is not None:
            self._thread.shutdown()
        self._thread = self._file = None


@final
class _OnDisk:
    """A state in a file; until it has been written it stays in memory as well."""

    def __init__(
        self, disk: Disk, file: _File, state: Leaves, events: Sequence[Any], devices: Sequence[torch.device]
    ) -> None:
        self._disk, self._file, self._devices = disk, file, devices
        self._pinned = bool(events)
        # What has holes in memory stays there: an initial state may, which is not copied by being held.
        self._held = [None if _is_dense(leaf) else leaf for leaf in state]
        self._forms = [(leaf.shape, leaf.stride(), leaf.dtype) for leaf in state]
        self._unwritten: Leaves | None = state
        parts = self._parts(state)
        self.nbytes = sum([leaf.nbytes for leaf in state])
        self._size = sum([len(part) for part in parts])
        self._place = file.place(self._size)
        self._writing: Future[None] | None = disk.run(partial(file.write, parts, self._place, events))

    def _parts(self, state: Leaves) -> list[memoryview]:
        """The bytes of what is in the file, in the order in which they lie in memory."""
        leaves = [leaf.detach() for leaf, held in zip(state, self._held, strict=True) if held is None]
        return [x.as_strided((x.numel(),), (1,)).view(torch.uint8).numpy().data for x in leaves]

    def wait(self) -> None:
        """Wait until it has been written.

        (Nothing is kept of the future: its locks, between large tensors, would leave holes in the C library's heap.)
        """
        if self._writing is not None and not self._writing.cancelled():
            self._writing.result()
        self._unwritten = self._writing = None

    def fetch(self) -> Callable[[], Leaves]:
        """Begin to read it."""
        if self._unwritten is not None:
            return transfers.brought(self._unwritten, self._devices)
        made = [
            torch.empty_strided(size, stride, dtype=dtype, device="cpu", pin_memory=self._pinned)
            for size, stride, dtype in self._forms
        ]
        state = Leaves([new if held is None else held for new, held in zip(made, self._held, strict=True)])
        reading = self._disk.run(partial(self._file.read, self._parts(state), self._place))

        def read() -> Leaves:
            reading.result()
            return transfers.brought(state, self._devices)()

        return read

    def let_go(self) -> None:
        """Give its place to others; what has begun with it ends before they are written."""
        if self._writing is not None:
            self._writing.cancel()
        self._file.free_places[self._size].append(self._place)


def _is_dense(leaf: Tensor) -> bool:
    """Whether the bytes of a leaf are all that lies between its first and its last.

    Raises:
        EstimatorError: it is no plain tensor.
    """
    if type(leaf) is not Tensor:
        raise EstimatorError(
            f"offload='disk' with a leaf of the state that is {'a DTensor' if is_spread(leaf) else describe(leaf)}",
            "plain tensors",
            "use offload='cpu'",
        )
    expected = 1
    for stride, size in sorted(zip(leaf.stride(), leaf.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return not (leaf.is_conj() or leaf.is_neg())


@final
class _File:
    """A temporary file without a name."""

    def __init__(self) -> None:
        if not (hasattr(os, "pwrite") and hasattr(os, "preadv")):
            raise StorageError(
                "offload='disk' on a system that has no positional reads and writes of files",
                "os.pwrite and os.preadv",
                "use offload='cpu', or checkpoint='log'",
            )
        with _errors_named("no temporary file can be made"):
            file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # closed with this object
        self._number = file.fileno()
        weakref.finalize(self, file.close)
        self._end = 0
        self.free_places: defaultdict[int, list[int]] = defaultdict(list)
        """By their size, from where on in the file."""

    @property
    def free(self) -> int:
        """The bytes that are free where it lies."""
        system = os.fstatvfs(self._number)
        return system.f_bavail * system.f_frsize

    def place(self, size: int) -> int:
        """From where on ``size`` bytes are free."""
        if self.free_places[size]:
            return self.free_places[size].pop()
        self._end += size
        return self._end - size

    def write(self, parts: list[memoryview], place: int, events: Sequence[Any]) -> None:
        """Write bytes from ``place`` on, once ``events`` are over; none is held when that is done, nor after a read."""
        for event in events:
            event.synchronize()
        with _errors_named(f"a state of {sum(map(len, parts)):,} bytes cannot be written, after {place:,} others"):
            while parts:
                part = parts.pop(0)
                while part:
                    done = os.pwrite(self._number, part, place)
                    part, place = part[done:], place + done

    def read(self, parts: list[memoryview], place: int) -> None:
        """Read into ``parts`` the bytes from ``place`` on."""
        with _errors_named("a state cannot be read"):
            while parts:
                part = parts.pop(0)
                while part:
                    done = os.preadv(self._number, [part], place)
                    if not done:
                        raise EOFError("the file is shorter than what was written to it")
                    part, place = part[done:], place + done


_MORE_ROOM = (
    "let the environment variable TMPDIR name a folder with more room, on a disk, or store fewer states: "
    "checkpoint='sqrt' or 'log'"
)


@contextmanager
def _errors_named(what: str) -> Iterator[None]:
    """Say of an error of the system what it was about."""
    try:
        yield
    except (OSError, EOFError) as error:
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
            raise StorageError(
                f"offload='disk': {what}: {error}",
                "one more open file",
                "each rollout that is kept holds one: let go of solutions that are not needed, or raise ulimit -n",
            ) from error
        where = f"the folder of temporary files, {tempfile.gettempdir()!r}"
        raise StorageError(f"offload='disk': {what} in {where}: {error}", "room for it", _MORE_ROOM) from error
