"""What holds after every test of the backward pass: no mode of torch's is left changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch


def modes() -> tuple[Any, ...]:
    """What code around a call might find changed by it."""
    autograd = torch._C._autograd
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        autograd._top_saved_tensors_default_hooks(True),
        torch._C._len_torch_dispatch_stack(),
        torch._C._functorch.maybe_current_level(),
        autograd._push_saved_tensors_default_hooks,
        autograd._pop_saved_tensors_default_hooks,
    )


@pytest.fixture(autouse=True)
def _modes_are_left_as_they_were() -> Iterator[None]:
    before, drawn = modes(), torch.get_rng_state()
    yield
    assert modes() == before
    torch.set_rng_state(drawn)
