"""The probe of vmap: a loss, its gradient and its curvature for two sets of parameters at once, beside a loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from diffopt.checking.inner_loss import Subject
from diffopt.errors import VmapError
from diffopt.reports import Finding
from diffopt.tensors import derivatives

_Compared: TypeAlias = tuple[str, Tensor, Tensor]
"""What is compared, under vmap and by a loop."""


def probe_vmap(subject: Subject, *, products: bool) -> Finding:
    """Two sets of parameters at once give what they give one after the other; ``products``: their curvature, too.

    (Of a gradient that a loss or a field takes by itself, torch has under vmap a wrong derivative for batch norm.)
    """
    scale = [x.abs().mean() + 1e-3 for x in subject.params]
    others = [x + 1e-2 * s * _fixed_noise(x) for x, s in zip(subject.params, scale, strict=True)]
    along = [s * _fixed_noise(x).cos() for x, s in zip(subject.params, scale, strict=True)] if products else []
    losses, gradients, curved = subject.of_two(others, along)
    found, loop = [], []
    for row, params in enumerate((subject.params, others)):
        at = subject.at(params)
        _, loss, own = at.gradients(differentiable=False)
        expected = derivatives.or_zeros(own[: len(params)], params)
        got = [e if g is None else g[row] for g, e in zip(gradients, expected, strict=True)]
        names = [f"the gradient of {path}" for path in subject.params_paths]
        found.append(_worst([("the loss", losses[row], loss.detach()), *zip(names, got, expected, strict=True)]))
        loop.append(at.products(along) if products else ())
    if products:
        names = [f"the second derivative in {path}" for path in subject.paths]
        found.append(_worst([*zip(names, curved, _stacked(loop, len(others)), strict=True)]))
    tolerance = 10 * torch.finfo(losses.dtype).eps ** 0.5
    error, where = next((worst for worst in found if worst[0] > tolerance), max(found))
    if not error <= tolerance:
        raise VmapError(
            f"under vmap {where} is {error:.1e} off that of a loop",
            "the same numbers",
            "look for operations that mix tasks or read a shape, or for torch.func.grad of batch norm; or loop over "
            "the tasks",
        )
    return Finding("safe under vmap", "ok", f"two sets of params at once: {error:.1e} off a loop")


def _stacked(rows: Sequence[tuple[Tensor, ...]], count: int) -> list[Tensor]:
    """Products of two sets of parameters: of the parameters side by side, of what both share the sum."""
    pairs = list(zip(*rows, strict=True))
    return [*(torch.stack(pair) for pair in pairs[:count]), *(torch.stack(pair).sum(0) for pair in pairs[count:])]


def _worst(compared: Sequence[_Compared]) -> tuple[float, str]:
    """The largest error, relative to the size of all together, and where it is."""
    size = float(torch.stack([expected.double().norm() for _, _, expected in compared]).sum()) + 1e-300
    errors = [(float((got - expected).detach().double().norm()) / size, name) for name, got, expected in compared]
    return max((math.inf if math.isnan(error) else error, name) for error, name in errors)


def _fixed_noise(like: Tensor) -> Tensor:
    """Numbers between -1 and 1 without a pattern, always the same."""
    return (12.9898 * torch.arange(1, like.numel() + 1, device=like.device)).sin().to(like.dtype).reshape(like.shape)
