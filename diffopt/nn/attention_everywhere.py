"""Modules as they are, with attention that can be differentiated again."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch.nn.functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from diffopt.nn.attention import attention


@contextmanager
def second_order_attention() -> Iterator[None]:
    """Within it, ``scaled_dot_product_attention`` is :func:`diffopt.nn.attention`, whoever calls it.

    ``torch.nn.MultiheadAttention``, ``TransformerEncoderLayer`` and the models of ``transformers`` then have second
    derivatives, unchanged. Enter it inside the loss, around the call of the model: estimators evaluate the loss again
    in the backward pass, when what was entered around ``solve`` may have been left. It is a decorator as well::

        @diffopt.nn.second_order_attention()
        def loss(params, batch):
            return function(params, **batch).loss

    It holds for the thread that enters it. What calls torch's kernels below ``scaled_dot_product_attention``, or
    libraries of its own (``flash_attn``), is not reached: the error for a missing second derivative stays.

    Example:
        >>> import torch
        >>> query = torch.randn(1, 3, 2, requires_grad=True)
        >>> with second_order_attention():
        ...     value = torch.nn.functional.scaled_dot_product_attention(query, query, query).sum()
        >>> gradient = torch.autograd.grad(value, query, create_graph=True)[0]
        >>> torch.autograd.grad(gradient.square().sum(), query)[0].shape
        torch.Size([1, 3, 2])
    """
    with _Replacing():
        yield


@final
class _Replacing(TorchFunctionMode):
    """Calls another function where a certain one of torch's is called."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at one call of a function of torch's; what that calls in turn does not come here."""
        if func is F.scaled_dot_product_attention:
            return attention(*args, **kwargs or {})
        return _with_ours(func)(*args, **kwargs or {})


# NOTE [functions of torch's that call attention]
# A mode sees F.multi_head_attention_forward as one call, and is not asked within it. So that function is called with
# other globals, in which the name is ours: a copy of the function, not a change of torch's module.
@functools.cache
def _copied(function: types.FunctionType) -> Callable[..., Any]:
    ours = {**function.__globals__, "scaled_dot_product_attention": attention}
    copy = types.FunctionType(function.__code__, ours, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    ours[function.__name__] = copy  # what it hands to another mode, which calls that
    return copy


def _with_ours(function: Any) -> Callable[..., Any]:
    if isinstance(function, types.FunctionType) and "scaled_dot_product_attention" in function.__code__.co_names:
        return _copied(function)
    return function  # type: ignore[no-any-return]
