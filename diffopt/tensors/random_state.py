"""Random numbers drawn by a loss: noticed in the rollout, drawn again in the backward pass.

The rollout uses torch's global generators as a plain loop would. The generators' state is taken before every step and
kept where the step changed it; a replay draws the numbers that followed it once more.

# NOTE [a replay while other threads draw]
The simple way to draw numbers again is to set the global generators back for a while. Another thread that draws
meanwhile (one that prepares data) would get numbers that were drawn before. So, while the process has other threads, a
replay leaves the global generators alone: a mode gives every operation that draws a generator of its own. A checkpoint
in the loss does not know of these: what it recomputes, whenever that is, is told where they stood (``saved_hooks.py``).
All that is said here of "the generators" is of those that operations draw from: in such a replay, its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from diffopt.tensors import transforms

GeneratorStates: TypeAlias = tuple[Tensor, ...]


def snapshot(device: torch.device) -> GeneratorStates:
    """The state of the CPU's generator and, on a GPU, of that device's."""
    if _here.drawing is None and device.type == "cpu":  # as it is before almost every step
        return (torch.default_generator.get_state(),)
    own = _own_generators()
    states = [own["cpu"].get_state() if "cpu" in own else torch.get_rng_state()]
    if device.type == "cuda":
        states.append(own["cuda"].get_state() if "cuda" in own else torch.cuda.get_rng_state(device))
    return tuple(states)


def restore(states: GeneratorStates, device: torch.device) -> None:
    """Let the generators stand where they stood."""
    own = _own_generators()
    for place, state in zip(("cpu", device.type), states, strict=False):
        if place in own:
            own[place].set_state(state)
        elif place == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)


def changed(before: GeneratorStates, after: GeneratorStates) -> bool:
    """Whether random numbers were drawn between the two."""
    return _bytes(before) != _bytes(after)


def _bytes(states: GeneratorStates) -> list[bytes]:
    """The numbers in them, which are compared in a tenth of the time that ``torch.equal`` takes."""
    if transforms.current_level() is not None:  # under one that differentiates ``numpy`` sees a wrapped tensor
        with transforms.below_all():
            return _bytes(states)
    return [x.numpy().tobytes() for x in states]


@final
class Draws:
    """The generators' states before the steps of a rollout, kept of those that drew random numbers.

    Attributes:
        known: the states before the steps that drew, or that are to draw the same numbers again.
    """

    def __init__(self, device: torch.device, known: Mapping[int, GeneratorStates] | None = None) -> None:
        """Take note of where the generators stand before the first step."""
        self.known = dict(known or {})
        self._device, self._now = device, snapshot(device)
        self._bytes = _bytes(self._now)

    def before(self, step: int) -> GeneratorStates:
        """Where they stood before step ``step``, which is being taken or has just been."""
        return self.known.get(step) or self._now

    def look(self, step: int) -> None:
        """Take note of what step ``step`` drew, now that it has been taken."""
        after = snapshot(self._device)
        now = _bytes(after)
        if now != self._bytes:
            self.known.setdefault(step, self._now)
        self._now, self._bytes = after, now


@contextmanager
def preserved(device: torch.device) -> Iterator[None]:
    """Leave the generators as they are now, whatever is drawn inside."""
    now = snapshot(device)
    try:
        yield
    finally:
        restore(now, device)


@contextmanager
def replayed(states: GeneratorStates | None, device: torch.device) -> Iterator[None]:
    """Draw the numbers that followed ``states`` again, and leave the generators as they were; ``None``: do nothing."""
    if states is None:
        yield
    elif threading.active_count() > 1:
        with _OwnGenerators(states, device):
            yield
    else:
        with preserved(device):
            restore(states, device)
            yield


@final
class _OwnGenerators(TorchDispatchMode):
    """Operations draw from generators that start at given states, not from the global ones."""

    def __init__(self, states: GeneratorStates, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._outer: _OwnGenerators | None = None
        self.generators = {}
        for place, state in zip(("cpu", device.type), states, strict=False):
            self.generators[place] = torch.Generator("cpu" if place == "cpu" else device)
            self.generators[place].set_state(state)

    def __enter__(self) -> _OwnGenerators:
        self._outer, _here.drawing = _here.drawing, self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: object) -> None:
        _here.drawing = self._outer
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def standing(self) -> tuple[GeneratorStates, torch.device]:
        """Where the generators stand now."""
        return tuple([generator.get_state() for generator in self.generators.values()]), self._device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or given.get("generator") is not None:
            return func(*args, **given)
        generator = self.generators.get(_place(args, given))
        if generator is None:
            return func(*args, **given)
        like = _LIKE.get(func.overloadpacket.__name__)
        if like is not None:
            return like(torch.empty_like(args[0], **given), args, generator)
        own = _with_generator(func)
        if own is not None:
            return own(*args, **given, generator=generator)
        return _drawing_globally(func, args, given, generator)


class _Here(threading.local):
    drawing: _OwnGenerators | None = None


_here = _Here()


def _own_generators() -> Mapping[str, torch.Generator]:
    """Those that operations draw from in place of the global ones, by the kind of device."""
    return {} if _here.drawing is None else _here.drawing.generators


@contextmanager
def _globally() -> Iterator[None]:
    """Let "the generators" be the global ones here."""
    outer, _here.drawing = _here.drawing, None
    try:
        yield
    finally:
        _here.drawing = outer


def standing() -> tuple[GeneratorStates, torch.device] | None:
    """Where the generators of a replay beside other threads stand now; ``None``: no such replay is running."""
    return None if _here.drawing is None else _here.drawing.standing()


def present(device: torch.device) -> GeneratorStates:
    """Where the generators stand from which an operation would draw now: those of a replay, or the global ones."""
    own = standing()
    return snapshot(device) if own is None else own[0]


@contextmanager
def as_it_is(device: torch.device) -> Iterator[None]:
    """Draw from the global generators in a replay beside other threads too, and put them back if that was done."""
    with _globally():
        before = snapshot(device)
        try:
            with _disable_current_modes():
                yield
        finally:
            if changed(before, snapshot(device)):
                restore(before, device)


def drawn_from(place: tuple[GeneratorStates, torch.device] | None) -> AbstractContextManager[Any]:
    """Draw, once more, the numbers that came after :func:`standing`; ``None``: those that come."""
    return nullcontext() if place is None else _OwnGenerators(*place)


def _place(args: Any, kwargs: Any) -> str:
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"]).type
    return next((x.device.type for x in args if isinstance(x, Tensor)), "cpu")


# what fills a new tensor with the numbers that torch's operation of this name draws
_LIKE: dict[str, Callable[[Tensor, Any, torch.Generator], Tensor]] = {
    "rand_like": lambda new, args, generator: new.uniform_(generator=generator),
    "randn_like": lambda new, args, generator: new.normal_(generator=generator),
    "randint_like": lambda new, args, generator: new.random_(*_bounds(args), generator=generator),
}


def _bounds(args: Any) -> tuple[int, int]:
    return (0, args[1]) if len(args) == 2 else (args[1], args[2])


def _with_generator(func: Any) -> Any:
    """The overload of an operation that takes a generator; ``None``: there is none."""
    if any(argument.name == "generator" for argument in func._schema.arguments):
        return func
    name = "generator" if func._overloadname == "default" else f"{func._overloadname}_generator"
    return getattr(func.overloadpacket, name, None) if name in func.overloadpacket.overloads() else None


def _drawing_globally(func: Any, args: Any, kwargs: Any, generator: torch.Generator) -> Any:
    """Let one operation that takes no generator (dropout on a GPU) draw from the global one, set for its length."""
    device = generator.device
    with _globally(), preserved(device):
        restore((torch.get_rng_state(), generator.get_state())[-1 if device.type == "cpu" else 0 :], device)
        result = func(*args, **kwargs)
        generator.set_state(snapshot(device)[-1])
    return result
