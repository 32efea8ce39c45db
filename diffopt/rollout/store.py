"""Where stored states wait: in place, in the CPU's memory, or on the disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, final

import torch

from diffopt.rollout.disk import IN_FLIGHT, Disk
from diffopt.tensors import transfers
from diffopt.tensors.leaves import Leaves

Offload: TypeAlias = Literal["cpu", "disk"] | bool


class Waiting(Protocol):
    """A state that waits somewhere."""

    @property
    def nbytes(self) -> int:
        """Its size."""
        ...

    def fetch(self) -> Callable[[], Leaves]:
        """Begin to bring it back; what is returned hands it out, on the device that it came from."""
        ...

    def let_go(self) -> None:
        """Nobody will ask for it any more."""


@final
class Store(MutableMapping[int, Leaves]):
    """Stored states ``s_t`` by ``t``, in the order in which they were stored.

    A rollout stores them in the order of its steps, a backward pass takes the latest first and stores others after it.
    """

    def __init__(self, offload: Offload = False) -> None:
        """``False``: each waits where it is; ``"cpu"`` or ``True``, ``"disk"``: there."""
        self._disk = Disk() if offload == "disk" else None
        self._in_place = not offload
        self._devices: list[torch.device] = []
        self._waiting: dict[int, Waiting] = {}
        self._ahead: tuple[int, Callable[[], Leaves]] | None = None
        self._copies: deque[Any] = deque()

    @property
    def latest(self) -> int:
        """The number of the state that was stored last."""
        return next(reversed(self._waiting))

    @property
    def elsewhere(self) -> bool:
        """Whether they wait elsewhere than where they are computed."""
        return self._disk is not None or any([x.type != "cpu" for x in self._devices])

    @property
    def nbytes(self) -> int:
        """Bytes of all states, wherever they are."""
        return sum([waiting.nbytes for waiting in self._waiting.values()])

    def expect(self, count: int, state: Leaves) -> None:
        """Refuse ``count`` states like this one if there is no room for them on the disk.

        Raises:
            StorageError: there is none.
        """
        if self._disk is not None:
            self._disk.expect(count, sum([leaf.nbytes for leaf in state]))

    def settle(self) -> None:
        """Wait until all is where it is to wait; nothing then runs beside the caller, who may change tensors or fork.

        Raises:
            StorageError: it could not be written.
        """
        while self._copies:
            self._copies.popleft().synchronize()
        if self._disk is not None:
            self._disk.settle()

    def take(self, step: int) -> Leaves:
        """Hand out ``s_step`` and let go of it, and begin to bring back the latest that is left, which will be next."""
        state = self[step]
        del self[step]
        if self._waiting:
            self._ahead = self.latest, self._waiting[self.latest].fetch()
        elif self._disk is not None:
            self._disk.settle()
        return state

    def __setitem__(self, step: int, state: Leaves) -> None:
        """Store ``s_step``."""
        if step in self._waiting:
            del self[step]
        self._ahead = None  # else there would be one for every state on which others have been stored
        if self._in_place:
            self._waiting[step] = _InMemory(state, None)
            return
        copies, events = transfers.copied(state, [transfers.CPU] * len(state))
        self._devices = devices = [leaf.device for leaf in state]
        if self._disk is not None:
            self._waiting[step] = self._disk.put(copies, events, devices)
            return
        self._waiting[step] = _InMemory(copies, devices)
        self._copies += events
        while len(self._copies) > IN_FLIGHT * len(state):  # they keep what they copy alive
            self._copies.popleft().synchronize()

    def __getitem__(self, step: int) -> Leaves:
        """``s_step``, on the device that it came from."""
        ahead, self._ahead = self._ahead, None
        fetched = ahead[1] if ahead is not None and ahead[0] == step else self._waiting[step].fetch()
        return fetched()

    def __delitem__(self, step: int) -> None:
        """Let go of ``s_step``."""
        self._ahead = None
        self._waiting.pop(step).let_go()

    def __iter__(self) -> Iterator[int]:
        """The numbers, in the order in which they were stored."""
        return iter(self._waiting)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._waiting)


@final
@dataclass(frozen=True)
class _InMemory:
    """A state in place (``devices`` is ``None``), or in the CPU's memory."""

    state: Leaves
    devices: list[torch.device] | None

    @property
    def nbytes(self) -> int:
        return sum([leaf.nbytes for leaf in self.state])

    def fetch(self) -> Callable[[], Leaves]:
        return (lambda: self.state) if self.devices is None else transfers.brought(self.state, self.devices)

    def let_go(self) -> None:
        """Nothing is to be done."""
