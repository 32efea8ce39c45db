"""Batches that a function of the step hands out, whenever a step is evaluated.

# NOTE [what is asked for again]
The function is called where a step is taken, and wherever it is taken again: by a replay, in the backward pass. It must
hand out the same batch then. What draws from torch's global generator would not, unless it is given a seed of the step
first: so where a call has drawn, it is made once more and compared. What changes otherwise shows in the losses, which a
replay compares.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from diffopt.errors import BatchesError, CapturedTensorError, RandomnessError
from diffopt.tensors import random_state, torch_errors, transforms, tree
from diffopt.tensors.captures import everything_held
from diffopt.tensors.usable import usable_leaves


@final
class Stream:
    """A function of the step, and what is known of the batches that it returns.

    Attributes:
        structure: of every batch.
        count: how many tensors a batch has.
        example: a batch without its numbers.
    """

    def __init__(self, function: Callable[[int], Any], start: int, steps: int, device: torch.device) -> None:
        """Ask for the first batch, that of the step after ``start`` others, unless there is no step at all."""
        self._function, self._device = function, device
        self._recorded = torch.is_grad_enabled()
        held = everything_held([function]).tensors if transforms.transforms_active() else []
        level = transforms.transform_level() if any(map(transforms.is_wrapped, held)) else 0
        self._levels = range(1, level + 1)
        self.structure: tree.Structure | None = None
        self.example: Any = ()
        self.count = 0
        self._ahead: dict[int, list[Tensor]] = {}
        self._latest: tuple[int, list[Tensor]] | None = None
        self._remembers = False
        if steps:
            before = _other_generators()
            first = self._asked(start)
            self.count = len(first)
            assert self.structure is not None
            self.example = tree.unflatten(self.structure, [_NO_NUMBERS] * self.count)
            if transforms.has_tangent(first):
                raise torch_errors.forward_mode_error(f"batches({start})")
            if before != _other_generators():
                self._refuse_other(start, first, self._called(start))
            self._ahead[start] = first

    def at(self, number: int) -> list[Tensor]:
        """The tensors of the batch of step ``number``, counted from 0 since the optimizer's first."""
        latest = self._latest
        if latest is not None and latest[0] == number:
            return latest[1]
        first = self._ahead.pop(number, None)
        found = self._asked(number) if first is None else first
        if self._remembers:
            self._latest = number, found
        return found

    def remember(self, *, latest: bool) -> None:
        """Whether to hold the latest batch, for who asks for it twice in one step."""
        self._remembers, self._latest = latest, None

    def _asked(self, number: int) -> list[Tensor]:
        if random_state.standing() is not None:  # a function that seeds the global generator means that one
            with random_state.as_it_is(self._device):
                return self._called(number)
        before = random_state.snapshot(self._device)
        found = self._called(number)
        if random_state.changed(before, random_state.snapshot(self._device)):
            self._refuse_other(number, found, self._called(number))
        return found

    def _called(self, number: int) -> list[Tensor]:
        """The tensors that the function returns, constants of the solve."""
        with transforms.below_all(), torch.set_grad_enabled(self._recorded):
            try:
                value = self._apart(number)
            except transforms.WrappedTensorError as error:
                raise _captured(number, "belongs to a torch.func transform around the solve") from error
            except StopIteration as error:
                raise _ended(number) from error
            except TypeError as error:
                named = torch_errors.signature_error(error, "batches", self._function, 1, "the number of the step")
                if named is None:
                    raise
                raise BatchesError(named.got, named.expected, named.fix) from error
            leaves, structure = tree.flatten(value)
            self._refuse_bad(leaves, structure, number)
            self.structure = structure
            leaves = usable_leaves(leaves, lambda: [f"batches({number}){path}" for path in tree.paths(structure)])
            return [x.detach() for x in leaves]

    def _apart(self, number: int) -> Any:
        """What the function returns, evaluated apart from the transforms whose tensors it holds."""
        if not self._levels:
            return self._function(number)
        found: list[Any] = []

        def tensors() -> list[Tensor]:
            found.append(self._function(number))
            return [leaf for leaf in tree.flatten(found[0])[0] if isinstance(leaf, Tensor)]

        transforms.apart_from(self._levels, tensors)
        return found[0]

    def _refuse_bad(self, leaves: Sequence[Any], structure: tree.Structure, number: int) -> None:
        name = f"batches({number})"
        for path, leaf in zip(tree.paths(structure), leaves, strict=True):
            if not isinstance(leaf, Tensor):
                fix = (
                    "end the function with return"
                    if leaf is None
                    else "convert it with torch.as_tensor, or leave it out"
                )
                raise BatchesError(f"{name}{path} is {tree.describe(leaf)}", "a tensor", fix)
            if transforms.is_wrapped(leaf):
                raise _captured(number, "belongs to a torch.func transform around the solve", path)
            if self._recorded and leaf.requires_grad:
                raise _captured(number, "requires grad", path)
        if not leaves:
            raise BatchesError(f"{name} is {tree.describe(tree.unflatten(structure, []))}", "a tree of tensors", "")
        if self.structure is not None and structure != self.structure:
            first = tree.unflatten(self.structure, ["tensor"] * self.structure.num_leaves)
            raise BatchesError(
                f"{name} has other branches than the first batch: "
                f"{tree.brief(tree.unflatten(structure, ['tensor'] * len(leaves)))}",
                f"those of the first one, {tree.brief(first)}",
                "return the same keys and as many tensors at every step",
            )

    def _refuse_other(self, number: int, found: Sequence[Tensor], again: Sequence[Tensor]) -> None:
        """Refuse a batch that has drawn random numbers and comes out differently when it is asked for again."""
        if len(found) == len(again) and all(map(_same, found, again)):
            return
        raise RandomnessError(
            f"batches({number}) draws random numbers: asked for again, it is another batch",
            "the same batch whenever a step is asked for (the backward pass takes steps again)",
            "draw from torch.Generator().manual_seed(step), or draw inside the loss, whose numbers are drawn again",
        )


_NO_NUMBERS = torch.empty(0)


def check_stream(batches: Any, steps: int) -> None:
    """Refuse a class where a function of the step is expected."""
    if isinstance(batches, type):
        raise BatchesError(
            f"batches is the class {batches.__name__}",
            f"a function of the step, or a tree of tensors with {steps} entries each",
            "call it, as in diffopt.Batches(dataset, batch_size)",
        )


def stacked(rows: Sequence[Sequence[Tensor]], at: int, name: str) -> Tensor:
    """The tensors numbered ``at`` of the batches of some steps, stacked.

    Raises:
        BatchesError: their shapes differ.
    """
    shapes = list(dict.fromkeys(tuple(row[at].shape) for row in rows))
    if len(shapes) > 1:
        raise BatchesError(
            f"{name} has shapes {shapes[0]} and {shapes[1]} at different steps",
            "one shape: this estimator (Binomial, Krylov) evaluates the steps together",
            "leave an incomplete batch out, or use Reverse() or Truncated()",
        )
    return torch.stack([row[at] for row in rows])


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))


def _captured(number: int, what: str, path: str = "") -> CapturedTensorError:
    return CapturedTensorError(
        f"batches({number}){path} {what}",
        "constant data: a function of the step gives nothing a hypergradient, and all tasks of a vmap the same batch",
        "pass the tensor in *args and index it inside the loss by indices that the batch holds; a constant: .detach()",
    )


def _ended(number: int) -> BatchesError:
    return BatchesError(
        f"batches({number}) asks an iterator for more (next(...)), and it has ended",
        "a function that returns the batch of any step, whenever it is asked for",
        "use diffopt.Batches(dataset, batch_size)",
    )


def _other_generators() -> list[Any]:
    """Where the generators of Python and numpy stand."""
    states: list[Any] = [random.getstate()]
    numpy = sys.modules.get("numpy")
    if numpy is not None and hasattr(numpy, "random"):
        name, keys, *rest = numpy.random.get_state()
        states += [name, keys.tobytes(), *rest]
    return states
