r"""Attention as autograd sees it: four functions, each the derivative of the one before, that save no matrix.

With ``F(z) = <g, O(q, k, v, mask)>``, ``_Attention`` is ``O``, ``_First`` the gradient of ``F``, ``_Second`` its
Hessian times a direction ``x``, and ``_Third`` the gradient of ``<u, F'' x>``. The Hessian is symmetric, so what
``_Second`` pulls back to ``x``, and pushes forward from it, is itself. ``x`` and ``u`` have a part for ``g`` as well.

# NOTE [vmap]
The functions take any leading axes, the same for all. So a vmap is one axis more in front; a point is expanded, not
copied, where the tasks share it, for each task's gradient is its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from diffopt.errors import MissingDerivativeError
from diffopt.nn import attention_derivatives as derivatives
from diffopt.nn.attention_sums import Options, Point
from diffopt.tensors.transforms import apply

Maybe: TypeAlias = "Tensor | None"


def _batched(function: Any, info: Any, dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Any, Any]:
    """``function`` of arguments that a vmap has batched; see NOTE [vmap]."""
    given = [_in_front(x, dim, info.batch_size) for x, dim in zip(arguments, dims, strict=True)]
    found = apply(function, *given)
    return found, 0 if isinstance(found, Tensor) else (0,) * len(found)


def _in_front(x: Any, dim: int | None, size: int) -> Any:
    if not isinstance(x, Tensor):
        return x
    if dim is not None:
        return x.movedim(dim, 0)
    return x.expand(size, *x.shape) if x.is_floating_point() else x.unsqueeze(0)


def _direction(z: Point, rates: Sequence[Maybe], mask: Maybe) -> Point:
    """A direction at ``z``, in which ``None`` is zero."""
    q, k, v, g = (torch.zeros_like(x) if rate is None else rate for x, rate in zip(z.tensors(), rates, strict=True))
    return Point(q, k, v, g, mask)


def _without_autocast(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def differentiable(options: Options, noise: Maybe, mask: Maybe, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``O`` ``[..., L, Ev]``; ``noise`` are the numbers from which dropout is made, ``None`` without."""
    found: Tensor = apply(_Attention, options, noise, mask, q, k, v)
    return found


class _Attention(torch.autograd.Function):
    """``O`` ``[..., L, Ev]``."""

    @staticmethod
    def forward(options: Options, noise: Maybe, mask: Maybe, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with _without_autocast(q):
            return derivatives.output(Point(q, k, v, _shaped_as_output(q, v), mask), options, noise)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.options = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        noise, mask, q, k, v = ctx.saved_tensors
        found = apply(_First, ctx.options, ctx.needs_input_grad[2], noise, mask, q, k, v, g)
        return None, None, found[4] if ctx.needs_input_grad[2] else None, *found[:3]

    @staticmethod
    def jvp(ctx: Any, _options: None, _noise: None, mask_rate: Maybe, *rates: Maybe) -> Any:
        noise, mask, q, k, v = ctx.saved_tensors
        z = Point(q, k, v, torch.zeros_like(_shaped_as_output(q, v)), mask)
        x = _direction(z, [*rates, None], mask_rate)
        return apply(_Second, ctx.options, False, noise, *_reordered(z), *_reordered(x))[3]

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return _batched(_Attention, info, dims, arguments)


def _shaped_as_output(q: Tensor, v: Tensor) -> Tensor:
    return v.new_empty(()).expand(*q.shape[:-1], v.shape[-1])


def _reordered(z: Point) -> tuple[Maybe, ...]:
    """The mask first, as the functions take it."""
    return z.mask, *z[:4]


class _First(torch.autograd.Function):
    """The gradient of ``F`` in ``q, k, v, g``, and in the mask if that is ``wanted``."""

    @staticmethod
    def forward(
        options: Options, wanted: bool, noise: Maybe, mask: Maybe, q: Tensor, k: Tensor, v: Tensor, g: Tensor
    ) -> tuple[Tensor, ...]:
        with _without_autocast(q):
            return derivatives.first(Point(q, k, v, g, mask), options, noise, mask=wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.options, ctx.wanted = inputs[:2]
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *x: Tensor) -> tuple[Any, ...]:
        noise, mask, *point = ctx.saved_tensors
        along = Point(*x)
        wanted = ctx.needs_input_grad[3]
        found = apply(_Second, ctx.options, wanted, noise, mask, *point, *_reordered(along))
        return None, None, None, found[4] if wanted else None, *found[:4]

    @staticmethod
    def jvp(ctx: Any, _options: None, _wanted: None, _noise: None, mask_rate: Maybe, *rates: Maybe) -> Any:
        noise, mask, *point = ctx.saved_tensors
        x = _direction(_points([mask, *point])[0], rates, mask_rate)
        return apply(_Second, ctx.options, ctx.wanted, noise, mask, *point, *_reordered(x))

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return _batched(_First, info, dims, arguments)


class _Second(torch.autograd.Function):
    """The Hessian of ``F`` at ``z`` times ``x``, its parts as ``_First`` gives them."""

    @staticmethod
    def forward(options: Options, wanted: bool, noise: Maybe, *parts: Maybe) -> tuple[Tensor, ...]:
        z, x = _points(parts)
        with _without_autocast(z.q):
            return derivatives.second(z, x, options, noise, mask=wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.options, ctx.wanted = inputs[:2]
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *u: Tensor) -> tuple[Any, ...]:
        noise, *parts = ctx.saved_tensors
        along, needs = Point(*u), ctx.needs_input_grad[3:]
        by_z: list[Maybe] = [None] * 5
        by_x: list[Maybe] = [None] * 5
        if any(needs[:5]):
            found = apply(_Third, ctx.options, needs[0], noise, *parts, *_reordered(along))
            by_z = [found[4] if needs[0] else None, *found[:4]]
        if any(needs[5:]):
            found = apply(_Second, ctx.options, needs[5], noise, *parts[:5], *_reordered(along))
            by_x = [found[4] if needs[5] else None, *found[:4]]
        return None, None, None, *by_z, *by_x

    @staticmethod
    def jvp(ctx: Any, _options: None, _wanted: None, _noise: None, *rates: Maybe) -> Any:
        noise, *parts = ctx.saved_tensors
        z, x = _points(parts)
        u, y = _direction(z, rates[1:5], rates[0]), _direction(x, rates[6:], rates[5])
        turned = apply(_Second, ctx.options, ctx.wanted, noise, *parts[:5], *_reordered(y))
        moved = apply(_Third, ctx.options, ctx.wanted, noise, *parts, *_reordered(u))
        return tuple(a + b for a, b in zip(turned, moved, strict=True))

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return _batched(_Second, info, dims, arguments)


def _points(parts: Any) -> tuple[Point, ...]:
    """Points and directions out of one row of tensors, five for each."""
    return tuple([Point._make([*parts[i + 1 : i + 5], parts[i]]) for i in range(0, len(parts), 5)])


class _Third(torch.autograd.Function):
    """The gradient of ``<u, F'' x>`` in ``z``. It has no derivative."""

    @staticmethod
    def forward(options: Options, wanted: bool, noise: Maybe, *parts: Maybe) -> tuple[Tensor, ...]:
        z, x, u = _points(parts)
        with _without_autocast(z.q):
            return derivatives.third(z, x, u, options, noise, mask=wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise _fourth()

    @staticmethod
    def jvp(ctx: Any, *rates: Any) -> Any:
        raise _fourth()

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return _batched(_Third, info, dims, arguments)


def _fourth() -> MissingDerivativeError:
    return MissingDerivativeError(
        "diffopt.nn.attention is differentiated four times",
        "at most three times",
        "run it under torch.nn.attention.sdpa_kernel([SDPBackend.MATH]), without second_order_attention()",
    )
