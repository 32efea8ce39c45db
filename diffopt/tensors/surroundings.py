"""What an evaluation depends on besides tensors, to be there again when it is repeated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffopt.tensors import random_state
from diffopt.tensors.derivatives import Autocast

_overrides: Any = torch.overrides


@final
class Surroundings:
    """Autocast, function modes, kernels of attention, training mode, and where the random numbers come from.

    All are those of the time when this is made.
    """

    def __init__(self, module: nn.Module, tensors: Sequence[Tensor]) -> None:
        """``tensors`` tell the device."""
        self._device = tensors[0].device if tensors else torch.device("cpu")
        self._autocast = Autocast(self._device)
        self._modes = list(_overrides._get_current_function_mode_stack())
        self._kernels = _kernels()
        self._training = [(part, part.training) for part in module.modules()]
        self._drawn: random_state.GeneratorStates | None = None

    @property
    def eps(self) -> float:
        """The precision that autocast lowers a computation to; 0: it does not."""
        return self._autocast.eps

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Evaluate here and now, and take note of where random numbers came from, if any were drawn."""
        before = random_state.present(self._device)
        yield
        if random_state.changed(before, random_state.present(self._device)):
            self._drawn = before

    def aside(self) -> AbstractContextManager[None]:
        """Evaluate here and now, without drawing the numbers that others are to draw."""
        return random_state.replayed(random_state.present(self._device), self._device)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be where this was made, and draw the same random numbers."""
        with ExitStack() as stack:
            stack.enter_context(random_state.replayed(self._drawn, self._device))
            stack.enter_context(self._autocast.entered())
            stack.enter_context(_under(self._modes))
            if _kernels() != self._kernels:
                stack.enter_context(sdpa_kernel(self._kernels))
            stack.enter_context(_training(self._training))
            yield


def _kernels() -> list[SDPBackend]:
    """The kernels of attention that may be used."""
    cuda: Any = torch.backends.cuda
    allowed = {
        SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: cuda.math_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled(),
    }
    return [kernel for kernel, is_allowed in allowed.items() if is_allowed]


@contextmanager
def _under(modes: Sequence[Any]) -> Iterator[None]:
    """Under those of these function modes that are not there."""
    there = list(map(id, _overrides._get_current_function_mode_stack()))
    missing = [mode for mode in modes if id(mode) not in there]
    for mode in missing:
        _overrides._push_mode(mode)
    try:
        yield
    finally:
        for _ in missing:
            _overrides._pop_mode()


@contextmanager
def _training(flags: Sequence[tuple[nn.Module, bool]]) -> Iterator[None]:
    """With each module in the mode that is given, and then in the one that it was in."""
    changed = [(part, part.training) for part, training in flags if part.training != training]
    for part, now in changed:
        part.training = not now
    try:
        yield
    finally:
        for part, now in changed:
            part.training = now
