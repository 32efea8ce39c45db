"""Saved-tensor hooks: kept out of the graphs recorded here, and, inside a loss, made to recompute what they should.

# NOTE [a recomputation reads the module's own weights]
``torch.utils.checkpoint(use_reentrant=False)`` runs a part of the loss again when the gradient is taken. Called by
``functional_call``, a module has its own weights back by then, and the recomputed part silently reads those in place of
``params``. So every pair of hooks that a loss sets is told which tensors modules held at that time, and puts them back
for as long as it recomputes. What that does not reach (a module that is neither found from the loss nor running) is
recognised by the tensors that are read: the recomputation reads one that the first computation did not.

# NOTE [how hooks are noticed]
Nothing of torch's says that hooks have been set. So, while a loss is evaluated, the function by which they are set is
another one, which hands on what other threads set as it is. A loss that sets none pays nothing for that.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError

from diffopt.errors import RecomputationError
from diffopt.tensors import random_state, transforms
from diffopt.tensors.captures import content_of, everything_held, named_tensors

_autograd: Any = torch._C._autograd  # type: ignore[attr-defined, unused-ignore]  # pyright: ignore
_push: Callable[..., None] = _autograd._push_saved_tensors_default_hooks
_pop: Callable[[], None] = _autograd._pop_saved_tensors_default_hooks


@contextmanager
def kept_out() -> Iterator[None]:
    """Record graphs without the hooks of code around the caller, such as a checkpoint around a whole task.

    They would pack tensors of the inner problem, whose graphs are used up before that code sees them again.
    """
    outer = []
    while (pair := _top()) is not None:
        outer.append(pair)
        _pop()
    try:
        yield
    finally:
        for pack, unpack in reversed(outer):
            _push(pack, unpack)


def _top() -> Any:
    """The hooks that apply now; ``None``: none, or a torch that does not say."""
    top = getattr(_autograd, "_top_saved_tensors_default_hooks", None)
    return None if top is None else top(True)


@final
class RecomputingAsBefore:
    """While this is entered, hooks that are set recompute with the tensors that modules hold when they are set.

    See NOTE [a recomputation reads the module's own weights].
    """

    __slots__ = ("_functions", "_given", "_modules", "_open", "_outer")

    def __init__(self, functions: Callable[[], Sequence[object]], *given: Sequence[Tensor]) -> None:
        """Look for nothing yet. ``functions()`` may hold modules; what is ``given`` may be read at any time."""
        self._functions, self._given = functions, given
        self._modules: dict[int, torch.nn.Module] | None = None
        self._open: list[_Reads] = []
        self._outer: RecomputingAsBefore | None = None

    def __enter__(self) -> None:
        """Notice hooks from here on, in this thread."""
        global _evaluations
        self._outer, _here.noticing = _here.noticing, self
        with _lock:
            _evaluations += 1
            if _evaluations == 1:
                _autograd._push_saved_tensors_default_hooks = _pushed
                _autograd._pop_saved_tensors_default_hooks = _popped

    def __exit__(self, *exception: object) -> None:
        """Let things be as they were."""
        global _evaluations
        with _lock:
            _evaluations -= 1
            if _evaluations == 0:
                _autograd._push_saved_tensors_default_hooks = _push
                _autograd._pop_saved_tensors_default_hooks = _pop
        _here.noticing = self._outer

    def opened(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
        """A pair of hooks is to be set."""
        if self._modules is None:
            self._modules = {id(module): module for module in everything_held(self._functions()).modules}
        for running in _running_modules():
            if id(running) not in self._modules:
                self._modules.update((id(inner), inner) for inner in running.modules())
        reads = _Reads()
        reads.known.update(_address(x) for part in self._given for x in part)
        place = random_state.standing() if _draws_again(pack) else None
        _push(pack, _Unpack(unpack, _held_by(self._modules.values()), reads.known, self._functions, place))
        reads.__enter__()  # type: ignore[no-untyped-call]
        self._open.append(reads)

    def closed(self) -> None:
        """The last pair of hooks is to be taken away."""
        if self._open:
            self._open.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]
        _pop()


@final
class _Here(threading.local):
    noticing: RecomputingAsBefore | None = None


_here, _lock = _Here(), threading.Lock()
_evaluations = 0
"""How many evaluations of losses are running, in all threads: hooks are noticed while there are any."""


def _pushed(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
    noticing = _here.noticing
    if noticing is None:
        _push(pack, unpack)
    else:
        noticing.opened(pack, unpack)


def _popped() -> None:
    noticing = _here.noticing
    if noticing is None:
        _pop()
    else:
        noticing.closed()


def _running_modules() -> list[torch.nn.Module]:
    """The modules that the functions which are running now hold in their variables, as ``forward`` does in ``self``."""
    found: list[torch.nn.Module] = []
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") != "diffopt.rollout.dynamics":
        found += (held for held in frame.f_locals.values() if isinstance(held, torch.nn.Module))
        frame = frame.f_back
    return found


_Member = tuple[dict[str, Any], str, Tensor]


def _held_by(modules: Iterable[torch.nn.Module]) -> tuple[_Member, ...]:
    """What modules hold now, each tensor cut off from the graph that it comes from, which would hold itself."""
    return tuple(
        (members, name, x if x.is_leaf else x.detach().requires_grad_())
        for module in modules
        for members in (module._parameters, module._buffers)
        if isinstance(members, dict)  # those of compiled modules are not
        for name, x in members.items()
        if x is not None
    )


@final
class _Unpack:
    """A hook that unpacks with the tensors that modules held before in their places again."""

    def __init__(
        self,
        unpack: Callable[[Any], Tensor],
        held: tuple[_Member, ...],
        known: set[int],
        functions: Callable[[], Sequence[object]],
        place: Any,
    ) -> None:
        """``known``: the addresses of what may be read on the way; ``functions()``: what may know names.

        ``place``: where random numbers came from, see :func:`diffopt.tensors.random_state.standing`.
        """
        self._unpack, self._held, self._known, self._functions = unpack, held, known, functions
        self._drawn = place

    def __call__(self, packed: Any) -> Tensor:
        """Unpack, and refuse it if that reads what is not known."""
        now = [members.get(name) for members, name, _ in self._held]
        for members, name, x in self._held:
            members[name] = x
        reads = _Reads()
        try:
            with reads, random_state.drawn_from(self._drawn):
                tensor = self._unpack(packed)
        except CheckpointError as error:  # other shapes, or other tensors that require grad
            self._refuse_others(list(reads.read.values()))
            raise _recomputation_error("other tensors") from error
        finally:
            for (members, name, _), own in zip(self._held, now, strict=True):
                members[name] = own
        self._refuse_others(list(reads.read.values()))
        return tensor

    def _refuse_others(self, read: Sequence[Tensor]) -> None:
        """Refuse tensors that have been read and are not known."""
        other = next((x for x in read if _address(x) not in self._known), None)
        if other is not None:
            named = [named_tensors(function) for function in self._functions()]
            held = {_address(x): name for names in named for name, x in names.items()}
            kind = "a parameter" if isinstance(other, torch.nn.Parameter) else "a tensor"
            raise _recomputation_error(held.get(_address(other), kind)[:40])


def _draws_again(pack: Callable[..., Any]) -> bool:
    """Whether hooks are those of a checkpoint that draws the same random numbers again; told not to, it does not."""
    recompute = getattr(_variables(pack).get("frame"), "recompute_fn", None)
    return _variables(recompute).get("preserve_rng_state", True) is not False


def _variables(function: Any) -> dict[str, Any]:
    """The variables of functions around a function that it reads."""
    cells = getattr(function, "__closure__", None) or ()
    return dict(zip(function.__code__.co_freevars, map(content_of, cells), strict=True)) if cells else {}


def _recomputation_error(what: str) -> RecomputationError:
    return RecomputationError(
        f"a checkpoint in the inner loss reads {what} in the backward pass only",
        "what its forward pass read",
        "functional_call is over by then. Pass the weights to it, checkpoint(f, weights, x, use_reentrant=False), or "
        "take diffopt.functional(module, checkpoint=blocks) or Reverse('sqrt')",
    )


@final
class _Reads(TorchDispatchMode):
    """Notes what operations read and make, by the addresses of their numbers.

    Attributes:
        read: what operations have read and none has made before.
        known: the addresses of what they have read or made.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        """Nothing has been read yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.read: dict[int, Tensor] = {}
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at one operation."""
        given = kwargs or {}
        makes = func is torch.ops.aten.lift_fresh.default  # by which torch.tensor() hands out what it has made
        for x in _tensors((args, tuple(given.values()))):
            address = _address(x)
            if address and address not in self.known and not makes:
                self.read[address] = x
            self.known.add(address)
        result = func(*args, **given)
        self.known.update(_address(x) for x in _tensors(result))
        return result


def _address(tensor: Tensor) -> int:
    """Where the numbers of a tensor begin, under all wrappers; 0 if it has none of its own."""
    try:
        return transforms.unwrapped(tensor).data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
