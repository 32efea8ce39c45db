"""Parts of a module whose forward pass is computed again in every backward pass, with the weights that were given.

# NOTE [why not torch.utils.checkpoint]
It computes again what a module's ``forward`` computes, when ``functional_call`` has ended and the module has its own
weights back; it fails under ``vmap``; and a gradient that is to be differentiated keeps what was computed again, so
that a second derivative saves no memory. Here weights and buffers are arguments of an autograd function. Its backward
pass is a function of the same kind, whose backward pass computes all of it anew: no derivative keeps more than the
arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from diffopt.tensors import transforms
from diffopt.tensors.block_note import Note
from diffopt.tensors.marks import Marks
from diffopt.tensors.repeatable import Dims, Repeatable, recomputed
from diffopt.tensors.surroundings import Surroundings


@contextmanager
def recomputing(blocks: Mapping[str, nn.Module], lock: AbstractContextManager[Any]) -> Iterator[None]:
    """Calls of these modules, of which each has a name for errors, compute again in the backward pass.

    The caller holds ``lock``, without which no other thread puts tensors into these modules.
    """
    turn = _Turn(lock)
    with ExitStack() as stack:
        for name, block in blocks.items():
            stack.enter_context(_replaced(block, _Block(name, block, block.forward, turn)))
        try:
            yield
        finally:
            turn.has_ended = True


@final
class _Turn:
    """When a block of one call may be computed again.

    After the call, with the lock. During it, when the call differentiates something of its own, the call holds the lock
    and waits: the backward pass may run in a thread of torch's, which would wait for ever.
    """

    def __init__(self, lock: AbstractContextManager[Any]) -> None:
        self._lock, self.has_ended = lock, False

    def taken(self) -> AbstractContextManager[Any]:
        """The time of one evaluation."""
        return self._lock if self.has_ended else nullcontext()


@contextmanager
def _replaced(block: nn.Module, forward: Any) -> Iterator[None]:
    """Another ``forward`` for one object; ``functional_call``, around this, changes the module in the same way."""
    own = block.__dict__.get("forward")
    block.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del block.__dict__["forward"]
        else:
            block.__dict__["forward"] = own


@final
class _Block:
    """A block's ``forward``, that keeps its arguments only."""

    def __init__(self, name: str, block: nn.Module, forward: Any, turn: _Turn) -> None:
        self._name, self._block, self._turn = name, block, turn
        self._inside = _Inside(block, forward)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._inside.function(*inputs, **named)
        leaves, form = transforms.flattened((inputs, named))
        weights = dict(self._block.named_parameters())
        buffers = {key: buffer.clone() for key, buffer in self._block.named_buffers()}
        state = {f"block.{key}": x for key, x in {**weights, **buffers}.items()}
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        given = [*state.values(), *(leaves[i] for i in places)]
        rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        note = Note(self._name, Surroundings(self._block, given))
        run = _Forward(self._inside, tuple(state), len(buffers), tuple(places), tuple(rest), form, note, self._turn)
        found = recomputed(run, *given)
        note.refuse_objects_with_tensors([*rest, *note.constants])
        for buffer, written in zip(self._block.buffers(), note.written, strict=True):
            with torch.no_grad():
                buffer.copy_(written)
        return note.rebuilt(found)


class _Inside(nn.Module):
    """A block inside another module, so that ``functional_call`` runs its own ``forward``, not what stands for it."""

    def __init__(self, block: nn.Module, function: Any) -> None:
        super().__init__()
        self.block, self.function = block, function

    def forward(self, *inputs: Any, **named: Any) -> tuple[Any, list[Tensor]]:
        found = self.function(*inputs, **named)
        return found, list(self.block.buffers())


@final
@dataclass(frozen=True)
class _Forward(Repeatable):
    """The forward pass of a block: of its weights and buffers, and of the tensors among its inputs."""

    inside: _Inside
    names: tuple[str, ...]
    buffers: int
    places: tuple[int, ...]
    rest: tuple[Any, ...]
    form: Any
    note: Note
    turn: _Turn
    levels: tuple[tuple[Dims, int, str], ...] = ()

    @property
    def apart(self) -> frozenset[int]:
        return frozenset()

    def over(self, dims: Dims, size: int, mode: str) -> Repeatable:
        return replace(self, levels=(*self.levels, (dims, size, mode)))

    def left_behind(self) -> Exception:
        return self.note.left_behind()

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        dims, sizes, modes = ([level[i] for level in self.levels] for i in range(3))
        run = transforms.vmap(self._run, dims, sizes, modes)  # type: ignore[arg-type]
        if self.note.is_first:
            count = len(self.names)
            found = self.note.first(run, tensors, range(count - self.buffers, count))
            self.note.marks = Marks(found, len(self.levels), self.note.surroundings.eps)
            return found
        with self.turn.taken(), self.note.surroundings.entered():
            found = tuple(run(*tensors))
        self.note.refuse_others_than_the_first(found, len(self.levels))
        return found

    def _run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(self.names)
        state = dict(zip(self.names, tensors, strict=False))
        for name in self.names[count - self.buffers :]:
            state[name] = state[name].clone()
        leaves = list(self.rest)
        for place, x in zip(self.places, tensors[count:], strict=True):
            leaves[place] = x
        inputs, named = transforms.rebuilt(leaves, self.form)
        outputs, buffers = transforms.functional_call(self.inside, state, inputs, named)
        if self.note.is_first:
            if any(x.requires_grad for x in buffers):
                raise self.note.left_behind()
            self.note.written = [x.detach() for x in buffers]
        return self.note.taken_apart(outputs)
