"""State that a loss keeps besides its arguments: buffers of modules, and other tensors that it writes to.

A step that is computed again sees it as later steps have left it. Batch norm in training mode writes to its running
statistics and reads none of them, so it is computed again to the bit; spectral norm's power iteration is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from diffopt.errors import HiddenStateError
from diffopt.tensors import transforms
from diffopt.tensors.captures import named_tensors, tensors_of


@final
class HiddenState:
    """The tensors that a function holds, as they are now."""

    def __init__(self, function: object) -> None:
        """Find them: a walk of some ten microseconds for a small module."""
        self._function = function
        self._before = [(x, transforms.version(x)) for x in tensors_of([function])]

    def changed(self) -> list[Tensor]:
        """Those that have been written to since, and those that have taken the place of others."""
        written = [x for x, version in self._before if transforms.version(x) != version]
        known = {id(x) for x, _ in self._before}
        return written + [x for x in tensors_of([self._function]) if id(x) not in known]

    def names(self, changed: Sequence[Tensor]) -> str:
        """What a reader of the function's code would call some of them."""
        held = {id(x): name for name, x in named_tensors(self._function).items()}
        names = [f"`{held[id(x)]}`" for x in changed if id(x) in held]
        return ", ".join([*names[:2], "..."] if len(names) > 2 else names) or "a tensor"


def matters(changed: Sequence[Tensor], again: Callable[[], Sequence[Tensor]], losses: Tensor) -> bool:
    """Whether a loss gives other numbers now that some state has changed.

    ``again`` evaluates the losses, which were ``losses`` at first, and their gradients. The state is put back.
    """
    kept = [x.detach().clone() for x in changed]
    first, second = again(), again()
    with torch.no_grad():
        for x, value in zip(changed, kept, strict=True):
            x.detach().copy_(value)
    pairs = [(losses.detach(), first[0]), *zip(first, second, strict=True)]
    return not all(_same(a, b) for a, b in pairs)


def hidden_state_error(names: str) -> HiddenStateError:
    """The error for a rule that computes steps again of a loss that keeps a state."""
    return HiddenStateError(
        f"the inner loss keeps a state, {names}, that its evaluations change and its value depends on, and this "
        "estimator computes steps again, which would read it as later steps have left it; expected a loss that gives "
        "the same number again. Use Reverse('graph') or Unrolled(), which compute each step once; or freeze the state "
        "(module.eval()), or pass it in *args"
    )


def _same(a: Tensor, b: Tensor) -> bool:
    if a.device.type == "cpu":
        return torch.equal(a.nan_to_num(), b.nan_to_num())
    # other processors may add in another order every time
    tolerance = 64 * torch.finfo(b.dtype).eps
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()), equal_nan=True)
