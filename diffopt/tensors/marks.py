"""Marks by which the outputs of a function are known again when it is evaluated a second time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

_SAMPLES = 64
"""How many entries of a tensor are kept."""

_POWER = 0.4
"""Numbers may differ by this power of the machine epsilon: a batched kernel rounds otherwise than one that is not."""


@final
class Marks:
    """Some entries of each floating tensor, and its means: a fixed size, whatever that of the tensors is."""

    def __init__(self, outputs: Sequence[Tensor], levels: int, eps: float) -> None:
        """``levels``: under how many ``vmap``s these are, outermost first; ``eps``: that of the arithmetic behind."""
        self._levels, self._eps = levels, eps
        self._kinds = _kinds(outputs, 0)
        self._marks = [] if _is_traced(outputs) else [_mark(x) for x in outputs if _counts(x)]

    def are_of(self, outputs: Sequence[Tensor], levels: int) -> bool:
        """Whether these are the same outputs; those under more ``vmap``s are so many times the same."""
        more = levels - self._levels
        if _kinds(outputs, more) != self._kinds:
            return False
        if not self._marks or _is_traced([*outputs, *self._marks]):
            return True
        floating = [x for x in outputs if _counts(x)]
        found = [_mark(x[(0,) * more]) for x in floating]
        with torch.no_grad():
            tolerances = [max(self._eps, torch.finfo(x.dtype).eps) ** _POWER for x in floating]
            near = [_near(a, b, tol) for a, b, tol in zip(found, self._marks, tolerances, strict=True)]
            return bool(torch.stack([x.to(near[0].device) for x in near]).all())


def _counts(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _kinds(outputs: Sequence[Tensor], more: int) -> list[Any]:
    return [(x.dtype, x.shape[more:]) for x in outputs]


def _is_traced(tensors: Sequence[Tensor]) -> bool:
    """Whether these have no numbers to look at: they are those of a program that is being traced."""
    modes: Any = torch._C
    proxy = modes._get_dispatch_mode(modes._TorchDispatchModeKey.PROXY)
    return proxy is not None or any(x.is_meta or type(x) not in (Tensor, torch.nn.Parameter) for x in tensors)


@torch.no_grad()
def _mark(x: Tensor) -> Tensor:
    x = (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).detach().reshape(-1)
    some = x[:: max(1, x.numel() // _SAMPLES)].double()
    return torch.cat([some, torch.stack([x.mean(dtype=torch.float64), x.abs().mean(dtype=torch.float64)])])


def _near(found: Tensor, mark: Tensor, tolerance: float) -> Tensor:
    """Whether two marks are the same up to round-off; a tensor, so that there is one look at all of them."""
    size = mark.abs() + mark[-1]
    same = (found == mark) | (found.isnan() & mark.isnan())
    return (same | ((found - mark).abs() <= tolerance * size)).all()
