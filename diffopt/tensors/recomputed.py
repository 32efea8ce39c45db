"""Parts of a module whose forward pass is computed again in every backward pass, with the weights that were given.

# NOTE [why not torch.utils.checkpoint]
It computes again what a module's ``forward`` computes, when ``functional_call`` has ended and the module has its own
weights back; it fails under ``vmap``; and a gradient that is to be differentiated keeps what was computed again, so
that a second derivative saves no memory. Here weights and buffers are arguments of an autograd function. Its backward
pass is a function of the same kind, whose backward pass computes all of it anew: no derivative keeps more than the
arguments.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from diffopt.errors import CapturedTensorError, HiddenStateError, InPlaceError
from diffopt.tensors import transforms
from diffopt.tensors.captures import everything_held
from diffopt.tensors.marks import Marks
from diffopt.tensors.recomputation import Dims, Repeatable, recomputed
from diffopt.tensors.saved_hooks import kept_out
from diffopt.tensors.surroundings import Surroundings
from diffopt.tensors.tree import describe


@contextmanager
def recomputing(blocks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Calls of these modules, of which each has a name for errors, compute again in the backward pass."""
    with ExitStack() as stack:
        for name, block in blocks.items():
            stack.enter_context(_replaced(block, _Block(name, block, block.forward)))
        yield


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

    def __init__(self, name: str, block: nn.Module, forward: Any) -> None:
        self._name, self._block = name, block
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
        note = _Note(self._name, Surroundings(self._block, given))
        run = _Forward(self._inside, tuple(state), len(buffers), tuple(places), tuple(rest), form, note)
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
class _Note:
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
        if rates or _leads_past(gate, found):
            raise self._captured()
        there = None if gate is None else weakref.ref(gate)
        found, given, gate = tuple([x.detach() for x in found]), [], None
        if self._levels and there is not None and there() is not None:
            gc.collect()
            if there() is not None:
                raise _left_behind(self.name)
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
        gated = transforms.apply(_Gate, self.name, *leaves)
        for i, x in zip(behind, gated, strict=True):
            given[i] = x
        return gated[0].grad_fn

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


_TENSOR = object()


# NOTE [what a block leaves behind]
# Only what a block returns is linked to its inputs. What it leaves elsewhere (an auxiliary loss in an attribute, a
# record of a hook) would be a constant. So its first evaluation has a graph, which ends in a node that raises when
# something left behind is differentiated. A transform that differentiates does not come by that graph: there nothing
# may be left behind.
class _Gate(torch.autograd.Function):
    """The inputs of a block as they are, without a derivative."""

    @staticmethod
    def forward(ctx: Any, name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple([x.view_as(x) for x in tensors])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise _left_behind(ctx.name)


def _left_behind(name: str) -> HiddenStateError:
    return HiddenStateError(
        f"block {name!r}, which is to be computed again, leaves a tensor in an attribute, a buffer or a list that "
        "depends on its inputs",
        "a block that returns what is differentiated",
        "return it, or detach() it there, or leave the block out of checkpoint=",
    )


def _leads_past(gate: Any, found: Sequence[Tensor]) -> bool:
    """Whether any of these depends on something that requires grad and is not behind the gate."""
    if any(x.requires_grad and x.grad_fn is None for x in found):
        return True
    seen = {gate}
    pending = [x.grad_fn for x in found if x.requires_grad]
    while pending:
        node: Any = pending.pop()
        if node not in seen:
            seen.add(node)
            below = [inner for inner, _ in node.next_functions if inner is not None]
            if not below:
                return True
            pending.extend(below)
    return False


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
    note: _Note
    levels: tuple[tuple[Dims, int, str], ...] = ()

    @property
    def apart(self) -> frozenset[int]:
        return frozenset()

    def over(self, dims: Dims, size: int, mode: str) -> Repeatable:
        return replace(self, levels=(*self.levels, (dims, size, mode)))

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        dims, sizes, modes = ([level[i] for level in self.levels] for i in range(3))
        run = transforms.vmap(self._run, dims, sizes, modes)  # type: ignore[arg-type]
        if self.note.is_first:
            count = len(self.names)
            found = self.note.first(run, tensors, range(count - self.buffers, count))
            self.note.marks = Marks(found, len(self.levels), self.note.surroundings.eps)
            return found
        with self.note.surroundings.entered():
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
                raise _left_behind(self.note.name)
            self.note.written = [x.detach() for x in buffers]
        return self.note.taken_apart(outputs)
