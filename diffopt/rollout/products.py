"""Products that the steps of a traced rollout compute, kept for the way back where that costs less than computing them.

# NOTE [which are kept]
The way back evaluates every step's loss again. An entry of a product is a sum of as many terms as its factors have in
common: from some hundred on, it is written and read sooner than summed again. But what is kept never outweighs the
states that are: of large batches and small states nothing is.

# NOTE [other products on the way back]
There, what the loss reads may require grad, by which torch chooses between a product of matrices and one of stacks of
them (``A @ x`` of two axes by three), and a function with a backward of its own what it computes. So products are
recalled all or none: where one is another, or missing, the loss is evaluated as if nothing had been noted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffopt.tensors.leaves import Leaves

_aten = torch.ops.aten
_TERMS: dict[Any, Callable[..., tuple[int, ...]]] = {
    _aten.mv.default: lambda a, b: (a.shape[1], a.shape[0]),
    _aten.mm.default: lambda a, b: (a.shape[1], a.shape[0], b.shape[1]),
    _aten.bmm.default: lambda a, b: (a.shape[2], *a.shape[:2], b.shape[2]),
    _aten.addmm.default: lambda x, a, b: (a.shape[1], a.shape[0], b.shape[1]),
    _aten.baddbmm.default: lambda x, a, b: (a.shape[2], *a.shape[:2], b.shape[2]),
}
"""Of each product: how many terms an entry has, and the shape."""

_MANY = 128
"""Terms of an entry from which a product is kept."""


def _shape(operation: Any, factors: Sequence[Any]) -> tuple[int, ...] | None:
    """The shape of a product that is worth keeping; ``None``: it is another operation."""
    if operation not in _TERMS:
        return None
    terms, *shape = _TERMS[operation](*factors[:3])
    return tuple(shape) if terms >= _MANY else None


@final
class Noting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, products are noted.

    Attributes:
        found: the products, in the order in which they were computed.
    """

    def __init__(self) -> None:
        """Nothing has been noted yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, and note."""
        found = func(*args, **(kwargs or {}))
        if _shape(func, args) is not None:
            self.found.append(found.clone())  # (it may be changed in place)
        return found

    def kept(self, state: Leaves) -> list[Tensor]:
        """All of them, or none if they outweigh the state."""
        return self.found if sum([x.nbytes for x in self.found]) <= sum([x.nbytes for x in state]) else []


@final
class Recalling(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, products are those that were noted of the same loss.

    Attributes:
        differs: whether a product was not the next one that was noted.
    """

    def __init__(self, products: Sequence[Tensor]) -> None:
        """In the order in which they were noted; none: all are computed."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._products, self._recalls, self.differs = list(products), bool(products), False

    @property
    def as_noted(self) -> bool:
        """Whether the products were those that were noted, and all of them; else what was recalled may be wrong."""
        return not (self.differs or self._products)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Recall, or compute."""
        shape = _shape(func, args) if self._recalls else None
        if shape is None:
            return func(*args, **(kwargs or {}))
        if not self._products or (shape, args[0].dtype) != (self._products[0].shape, self._products[0].dtype):
            self.differs = True
            return func(*args, **(kwargs or {}))
        return self._products.pop(0).clone()
