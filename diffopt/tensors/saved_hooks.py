"""Saved-tensor hooks: kept out of the graphs recorded here, and, inside a loss, made to recompute what they should.

# NOTE [a recomputation reads the module's own weights]
``torch.utils.checkpoint(use_reentrant=False)`` runs a part of the loss again when the gradient is taken. Called by
``functional_call``, a module has its own weights back by then, and the recomputed part silently reads those in place of
``params``. So while a loss that sets hooks is evaluated, every pair of hooks is told which tensors stood in for the
modules' own when it was set, and puts them back for as long as it recomputes. What that does not reach (a module that
cannot be found from the loss) is recognised by the tensors that are read: the backward pass reads one more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffopt.errors import RecomputationError
from diffopt.tensors import transforms
from diffopt.tensors.captures import modules_of

_autograd: Any = torch._C._autograd  # type: ignore[attr-defined, unused-ignore]  # pyright: ignore

_USED = "the inner loss uses saved-tensor hooks"


class HooksUsedError(Exception):
    """A function that was to run without saved-tensor hooks sets some."""


@contextmanager
def kept_out() -> Iterator[None]:
    """Record graphs without the hooks of code around the caller, such as a checkpoint around a whole task.

    They would pack tensors of the inner problem, whose graphs are used up before that code sees them again.
    """
    outer = []
    while (pair := _top()) is not None:
        outer.append(pair)
        _autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(outer):
            _autograd._push_saved_tensors_default_hooks(pack, unpack)


def without(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function that sets no hooks, where none are set.

    Raises:
        HooksUsedError: it does, or there are.
    """
    if _top() is not None:
        raise HooksUsedError
    before = _autograd._saved_tensors_hooks_get_disabled_error_message()
    _autograd._saved_tensors_hooks_disable(_USED)
    try:
        return function(*arguments)
    except RuntimeError as error:
        if _USED not in str(error):
            raise
        raise HooksUsedError from error
    finally:
        if before is None:
            _autograd._saved_tensors_hooks_enable()
        else:
            _autograd._saved_tensors_hooks_disable(before)


@final
@dataclass
class HookUse:
    """Whether a loss has been seen to set hooks; it is evaluated under :class:`RecomputingAsBefore` from then on."""

    used: bool = False


@final
class RecomputingAsBefore(TorchFunctionMode):
    """While this is on, hooks that are set recompute with the tensors that modules hold at that time.

    See NOTE [a recomputation reads the module's own weights]. A new pair of hooks is noticed at the first operation
    under it, before anything has been saved.
    """

    def __init__(self, functions: Sequence[object]) -> None:
        """Find the modules that ``functions`` hold, and what they hold themselves."""
        super().__init__()
        self._own = [
            (members, name, tensor)
            for module in modules_of(functions)
            for members in _members(module)
            for name, tensor in members.items()
        ]
        self._outer = _top()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the hooks that are set, and go on."""
        pair = _top()
        if pair is not None and not isinstance(pair[1], _Unpack) and pair != self._outer:
            _autograd._pop_saved_tensors_default_hooks()
            _autograd._push_saved_tensors_default_hooks(pair[0], _Unpack(pair[1], self._stand_ins()))
        return func(*args, **(kwargs or {}))

    def _stand_ins(self) -> tuple[_Member, ...]:
        now = ((members, name, own, members.get(name)) for members, name, own in self._own)
        return tuple(
            (members, name, x.detach().requires_grad_(x.requires_grad))
            for members, name, own, x in now
            if x is not own and x is not None
        )


def _members(module: torch.nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module._parameters, module._buffers


_Member = tuple[dict[str, Any], str, Tensor]


@final
@dataclass(frozen=True)
class _Unpack:
    """A hook that unpacks, with other tensors in the places of modules' own."""

    unpack: Callable[[Any], Tensor]
    stand_ins: tuple[_Member, ...]

    def __call__(self, packed: Any) -> Tensor:
        own = [members[name] for members, name, _ in self.stand_ins]
        for members, name, tensor in self.stand_ins:
            members[name] = tensor
        try:
            return self.unpack(packed)
        finally:
            for (members, name, _), tensor in zip(self.stand_ins, own, strict=True):
                members[name] = tensor


def refuse_other_reads(
    losses: Callable[[Sequence[Tensor]], Tensor], params: Sequence[Tensor], held: Callable[[], Mapping[str, Tensor]]
) -> None:
    """Refuse a loss whose backward pass reads a tensor that its forward pass did not.

    Args:
        losses: the losses at given params.
        params: where to look; copies are read.
        held: the tensors that the loss holds, by name.

    Raises:
        RecomputationError: it does.
    """
    reads = _Reads()
    roots = [leaf.detach().clone().requires_grad_() for leaf in params]
    with torch.enable_grad(), reads:
        value = losses(roots)
        first = set(reads.found)
        if value.requires_grad:
            torch.autograd.grad(value.sum(), roots, allow_unused=True)
    others = {address: x for address, x in reads.found.items() if address not in first}
    if not others:
        return
    names = {transforms.storage(x): name for name, x in held().items()}
    wrong = [names.get(i, "a parameter") for i, x in others.items() if i in names or isinstance(x, torch.nn.Parameter)]
    if wrong:
        raise RecomputationError(
            f"the inner loss computes a part of itself again in the backward pass (torch.utils.checkpoint), and reads "
            f"{wrong[0]} there, which its forward pass does not, expected the same tensors both times: by then a "
            "module that was called by torch.func.functional_call has its own weights back. Pass the weights to "
            "checkpoint as arguments, checkpoint(lambda q, x: functional_call(block, q, (x,)), q, x, "
            "use_reentrant=False); or take checkpoint out of the loss (model.gradient_checkpointing_disable()) and use "
            "estimator=Reverse('sqrt'), which stores less around it"
        )


@final
class _Reads(TorchDispatchMode):
    """Notes every tensor that an operation reads and none of them has made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[int, Tensor] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in _tensors((args, tuple((kwargs or {}).values()))):
            address = transforms.storage(x)
            if address not in self._made:
                self.found.setdefault(address, x)
        result = func(*args, **(kwargs or {}))
        self._made.update(transforms.storage(x) for x in _tensors(result))
        return result


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)


def _top() -> Any:
    """The hooks that apply now; ``None``: none, or a torch that does not say."""
    top = getattr(_autograd, "_top_saved_tensors_default_hooks", None)
    return None if top is None else top(True)
