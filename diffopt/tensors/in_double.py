"""Running a function in double precision that was written for a lower one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffopt.tensors import tree

_CASTS = (Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16)
"""Operations whose purpose is another precision."""

_ABOUT = tuple(
    getattr(Tensor, name).__get__
    for name in ("dtype", "requires_grad", "is_leaf", "grad", "grad_fn", "data", "_version")
)
"""What is asked about a tensor itself."""

_DIFFERENTIATING = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
"""What must be given a tensor itself: a raised copy has no place in the graph."""


@final
class InDouble(TorchFunctionMode):
    """Where double precision meets a lower one, as in constants of a function's own, raises the latter.

    What is written into keeps its precision: a raised copy of it would take the write instead. Casts to a lower
    precision, which a function makes to save time, are left out.

    Args:
        always: tensors to raise wherever they are met; they themselves are left as they are.
    """

    def __init__(self, always: Sequence[Tensor] = ()) -> None:
        """Note which tensors to raise."""
        super().__init__()
        self._always = {id(x) for x in always}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation on raised copies."""
        if func in _CASTS and _is_double(args[0]):
            found = func(*args, **(kwargs or {}))
            return args[0].to(found.device, copy=True) if _is_lower(found) else found
        leaves, structure = tree.flatten((args, kwargs or {}))
        if self._raises(func, leaves) and any(map(_is_lower, leaves)) and not _needs_itself(func):
            args, kwargs = tree.unflatten(structure, [x.double() if _is_lower(x) else x for x in leaves])
        return func(*args, **(kwargs or {}))

    def _raises(self, func: Any, leaves: Sequence[Any]) -> bool:
        if any(map(_is_double, leaves)):
            return True
        return func not in _ABOUT and any(id(x) in self._always for x in leaves)


@final
class WatchDraws(TorchDispatchMode):
    """Takes note of the precisions in which random numbers are drawn.

    # NOTE [other numbers in double precision]
    From one and the same seed, most of torch's distributions draw other numbers in double precision than in a lower
    one. A program that draws like what it is given is then another in it, and what the two give says nothing of either.

    Attributes:
        kinds: the precisions.
    """

    def __init__(self) -> None:
        """None yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.kinds: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        found = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            leaves, _ = tree.flatten((args, found))
            self.kinds |= {x.dtype for x in leaves if isinstance(x, Tensor) and x.is_floating_point()}
        return found


def run_in_double(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, run in double precision wherever it is called."""

    @wraps(function, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        with InDouble():
            return function(*args, **kwargs)

    return run


def doubled(tensor: Tensor) -> Tensor:
    """The same in double precision, if it is of a lower one."""
    return tensor.double() if _is_lower(tensor) else tensor


def _is_double(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.float64


def _is_lower(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64


def _needs_itself(func: Any) -> bool:
    """Whether a copy of an argument will not do: an operation writes into it, as its name says, or looks for it."""
    name = getattr(func, "__name__", "")
    return func in _DIFFERENTIATING or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
