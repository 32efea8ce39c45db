"""State that a loss keeps besides its arguments: buffers of modules, other tensors, Python numbers, generators.

A step that is computed again sees it as later steps have left it. Batch norm in training mode writes to its running
statistics and reads none of them, so it is computed again to the bit; spectral norm's power iteration is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, final

import torch
from torch import Tensor

from diffopt.errors import DiffoptError, HiddenStateError, RandomnessError
from diffopt.tensors import transforms
from diffopt.tensors.captures import content_of, everything_held, named_tensors, refill
from diffopt.tensors.reads import Reads


@final
class HiddenState:
    """What a function holds: found once, and then compared with what it was, in a few microseconds each time."""

    def __init__(self, function: object) -> None:
        """Find everything that it holds, and take note of it."""
        self._function, self._held = function, everything_held([function])
        self._tensors = [x for x in map(transforms.unwrapped, self._held.tensors) if not x.is_inference()]
        self._versions = [x._version for x in self._tensors]
        self._objects = self._in_places()  # kept, so that no other object can come to lie where one was
        self._addresses = list(map(id, self._objects))
        self._drawn = [generator.get_state() for generator in self._held.generators]
        # batch norm writes to its statistics without counting that as written
        self._statistics = [(x, x.detach().clone()) for x in self._buffers() if x.numel() <= _SMALL]

    def has_moved(self) -> bool:
        """Whether a tensor has been written to, a place holds something else, or a generator has drawn."""
        return (
            [x._version for x in self._tensors] != self._versions
            or list(map(id, self._in_places())) != self._addresses
            or not all(torch.equal(x, before) for x, before in self._statistics)
            or self._have_drawn()
        )

    @contextmanager
    def put_back(self, tensors: Sequence[Tensor] | None = None) -> Iterator[None]:
        """Whatever a block does to what is held, it is afterwards as it is now.

        ``tensors``: those whose numbers are put back, too; ``None``: all of them.
        """
        kept = [(x, x.detach().clone()) for x in (self._tensors if tensors is None else tensors)]
        contents = [dict(x) if isinstance(x, dict) else list(x) for x in self._held.containers]
        cells, spaces = [content_of(cell) for cell in self._held.cells], [d.get(name) for d, name in self._held.names]
        drawn = [generator.get_state() for generator in self._held.generators]
        try:
            yield
        finally:
            for container, old in zip(self._held.containers, contents, strict=True):
                refill(container, old)
            for cell, content in zip(self._held.cells, cells, strict=True):
                if content_of(cell) is not content:
                    cell.cell_contents = content
            for (space, name), content in zip(self._held.names, spaces, strict=True):
                if space.get(name) is not content:
                    space[name] = content
            for generator, state in zip(self._held.generators, drawn, strict=True):
                generator.set_state(state)
            for x, numbers in kept:
                if not torch.equal(x, numbers):
                    x.data.copy_(numbers)

    def matters(
        self,
        again: Callable[[], tuple[Tensor, Sequence[Tensor]]],
        losses: Tensor,
        grads: Sequence[Tensor],
        *,
        exactly: bool,
    ) -> bool:
        """Whether a loss gives other numbers now that something has moved.

        ``again`` evaluates the losses and their gradients once more; everything is then put back to where it is now
        (past autograd, which may have saved it, as the loss's next evaluation will find it written to).
        ``exactly``: the gradients come from the same operations, so that their bits are the same.
        """
        with self.put_back((*self._written(), *self._buffers())):
            value, gradients = again()
        pairs = zip(grads, gradients, strict=True)
        return not (_same(value, losses, True) and all(_same(a, b, exactly) for a, b in pairs))

    def error(self) -> DiffoptError:
        """The error for an estimator that computes steps again, which names what has moved."""
        moved, held = {id(x) for x in self._moved()}, named_tensors(self._function)
        names = [f"`{name}`" for name, x in held.items() if id(transforms.unwrapped(x)) in moved]
        if not names and self._have_drawn():
            return RandomnessError(
                "the inner loss draws from a generator of its own",
                "torch's global one",
                "this estimator computes steps again, and would get other numbers. Pass them in batches, or use "
                "Reverse('graph')",
            )
        shown = (names[0][-40:] + " ..." * (len(names) > 1)) if names else "in a number or another object"
        return HiddenStateError(
            f"the inner loss keeps a state, {shown}, that its evaluations move and read",
            "the same number again",
            "this estimator computes steps again, when later ones have moved it. Use Reverse('graph') or "
            "Unrolled(); or freeze it (module.eval()), or pass it in *args",
        )

    def _have_drawn(self) -> bool:
        pairs = zip(self._held.generators, self._drawn, strict=True)
        return not all(torch.equal(generator.get_state(), state) for generator, state in pairs)

    def _written(self) -> list[Tensor]:
        """The tensors that have been written to."""
        return [x for x, version in zip(self._tensors, self._versions, strict=True) if x._version != version]

    def _buffers(self) -> list[Tensor]:
        """The buffers of modules."""
        inner = (x for module in self._held.modules for x in module._buffers.values() if x is not None)
        return [x for x in map(transforms.unwrapped, inner) if not x.is_inference()]

    def _moved(self) -> list[Tensor]:
        """Those, and the tensors that have taken a place."""
        known = set(self._addresses)
        return self._written() + [x for x in self._in_places() if isinstance(x, Tensor) and id(x) not in known]

    def _in_places(self) -> list[Any]:
        """What is in all places, one after the other."""
        found: list[Any] = []
        for container in self._held.containers:
            found += container.values() if isinstance(container, dict) else container
        found += map(content_of, self._held.cells)
        return found + [space.get(name) for space, name in self._held.names]


@contextmanager
def left_alone(functions: Iterable[object]) -> Iterator[None]:
    """What functions hold, and what they are given, is afterwards as it is now.

    A trace calls them with tensors that have no numbers, which must not stay in a list of the user's.
    """
    functions = [*functions]
    with Reads(functions).put_back(), ExitStack() as stack:
        for function in functions:
            stack.enter_context(HiddenState(function).put_back())
        yield


_SMALL = 2**16
"""Numbers in the largest buffer that is looked at number by number."""


def _same(a: Tensor, b: Tensor, exactly: bool) -> bool:
    if exactly and a.device.type == "cpu":
        return torch.equal(a.nan_to_num(), b.nan_to_num())
    # other processors may add in another order every time
    tolerance = 64 * torch.finfo(b.dtype).eps
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()), equal_nan=True)
