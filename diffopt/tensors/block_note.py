"""What the first evaluation of a block that is computed again finds out, and what is refused there and later.

The blocks themselves are in ``checkpointed_blocks.py``.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from diffopt.errors import CapturedTensorError, HiddenStateError, InPlaceError
from diffopt.tensors import transforms
from diffopt.tensors.captures import everything_held
from diffopt.tensors.gate import gated, leads_past
from diffopt.tensors.marks import Marks
from diffopt.tensors.saved_hooks import kept_out
from diffopt.tensors.surroundings import Surroundings
from diffopt.tensors.tree import describe

_TENSOR = object()


@final
class Note:
    """What the first evaluation of a block found out, for those that follow.

    Attributes:
        written: the buffers, as the block has left them.
        constants: what it returned besides tensors, in its order.
        marks: by which its outputs are known again.
    """

    def __init__(self, name: str, surroundings: Surroundings) -> None:
        self.name, self.surroundings = name, surroundings
        self._levels = transforms.differentiating_levels()
        self.written: Sequence[Tensor] = ()
        self.constants: list[Any] = []
        self.marks: Marks | None = None
        self.is_first = True
        self._form: Any = None

    def taken_apart(self, outputs: Any) -> tuple[Tensor, ...]:
        """The tensors among outputs."""
        leaves, self._form = transforms.flattened(outputs)
        self.constants = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return tuple([leaf for leaf in leaves if isinstance(leaf, Tensor)])

    def rebuilt(self, tensors: Sequence[Tensor]) -> Any:
        """Outputs with these tensors."""
        rest = iter(tensors)
        return transforms.rebuilt([next(rest) if x is _TENSOR else x for x in self.constants], self._form)

    def refuse_objects_with_tensors(self, objects: Sequence[Any]) -> None:
        """Refuse what a block may have written to, or hides tensors from autograd."""
        for x in objects:
            if type(x).__module__ != "builtins" and everything_held([x]).tensors:
                raise HiddenStateError(
                    f"block {self.name!r}, which is to be computed again, takes or returns {describe(x)}, which holds "
                    "tensors",
                    "tensors, and tuples, lists and dictionaries of them",
                    "a cache of keys and values: pass use_cache=False; else leave the block out of checkpoint=",
                )

    def refuse_others_than_the_first(self, outputs: Sequence[Tensor], levels: int) -> None:
        """Refuse outputs that are not those of the first evaluation: something else than tensors has changed."""
        if self.marks is not None and not self.marks.are_of(outputs, levels):
            raise HiddenStateError(
                f"block {self.name!r} gives other numbers when it is computed again",
                "the same: from its inputs, its own weights and torch's global generators",
                "leave it out of checkpoint= if it draws by random or a torch.Generator, reads another layer, or an "
                "attribute that changes",
            )

    def first(self, run: Callable[..., Any], tensors: Sequence[Tensor], constants: range) -> tuple[Tensor, ...]:
        """Evaluate it for the first time, and refuse what autograd would not see: captured and hidden tensors."""
        given = [x.detach() for x in tensors]
        versions = list(map(transforms.version, given))
        try:
            if self._levels:
                with self.surroundings.aside():
                    transforms.apart_from(self._levels, run, *given)
            with self.surroundings.noted(), transforms.tangents_seen(), kept_out(), torch.enable_grad():
                gate = self._gated(given, tensors, constants)
                found = tuple(run(*given))
                rates = transforms.has_tangent(found)
        except transforms.WrappedTensorError as error:
            raise self._captured() from error
        except RuntimeError as error:
            if "is a view and is being modified inplace" in str(error):
                raise self._changed() from error
            if "escaped from inside" not in str(error):
                raise
            raise self._captured() from error
        if versions != list(map(transforms.version, given)):
            raise self._changed()
        if rates or leads_past(gate, found):
            raise self._captured()
        there = None if gate is None else weakref.ref(gate)
        found, given, gate = tuple([x.detach() for x in found]), [], None
        if self._levels and there is not None and there() is not None:
            gc.collect()
            if there() is not None:
                raise self.left_behind()
        self.is_first = False
        return found

    def _gated(self, given: list[Tensor], tensors: Sequence[Tensor], constants: range) -> Any:
        """Put a gate behind what may require grad, and return its node; ``None``: there is nothing.

        A transform that differentiates does not show, here below it, which tensors these are.
        """
        real = [i for i, x in enumerate(tensors) if x.is_floating_point() or x.is_complex()]
        behind = [i for i in real if tensors[i].requires_grad or (self._levels and i not in constants)]
        if not behind:
            return None
        leaves = [x if x.requires_grad else x.detach().requires_grad_() for x in (tensors[i] for i in behind)]
        there = gated(self.left_behind, *leaves)
        for i, x in zip(behind, there, strict=True):
            given[i] = x
        return there[0].grad_fn

    def left_behind(self) -> HiddenStateError:
        """The error for something else than an output that is differentiated: NOTE [what a block leaves behind]."""
        return HiddenStateError(
            f"block {self.name!r}, which is to be computed again, leaves a tensor in an attribute, a buffer or a list "
            "that depends on its inputs",
            "a block that returns what is differentiated",
            "return it, or detach() it there, or leave the block out of checkpoint=",
        )

    def _changed(self) -> InPlaceError:
        return InPlaceError(
            f"block {self.name!r}, which is to be computed again, changes an input or a weight in place",
            "inputs that are there for the second time",
            "pass inplace=False to its layers, write x = x + y for x += y, or leave the block out of checkpoint=",
        )

    def _captured(self) -> CapturedTensorError:
        return CapturedTensorError(
            f"block {self.name!r}, which is to be computed again, reads a tensor that requires grad, or is batched, "
            "and is neither an input nor a weight of its own",
            "a block that reads these only",
            "pass the tensor to the block's forward, or leave the block out of checkpoint=",
        )
