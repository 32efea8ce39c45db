"""Attention that can be differentiated three times, in memory linear in the length of the sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffopt.errors import DtypeError, HyperparameterError, ShapeError
from diffopt.nn.attention_functions import differentiable
from diffopt.nn.attention_sums import Options, mixed


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    r"""``torch.nn.functional.scaled_dot_product_attention`` with second and third derivatives.

    .. math:: O_i = \sum_j M_{ij} P_{ij} v_j, \qquad P_i = \mathrm{softmax}_j(s\, q_i^\top k_j + B_{ij})

    The kernels by which torch computes attention fast have a first derivative only, and its ``SDPBackend.MATH`` keeps
    several matrices ``[L, S]`` for each head. Here all derivatives are explicit (derivations (13.3) to (13.5)) and are
    computed in chunks of queries, of which nothing is kept. So memory is linear in the length, and time that of about
    two attentions for each pass. Exact to round-off: values, gradients, second and third derivatives, by ``backward``,
    ``torch.func.grad``, ``jvp`` and ``vmap``, those of a mask of numbers included; half precision is computed in single
    precision. (A gradient of a mask is as large as the mask.)

    What is dropped is decided by numbers made from one that torch's generator draws, and is not what torch would drop
    after the same seed; a replay drops the same. A query that may see no key gets zeros, as in torch.

    Where memory allows and nothing is dropped, torch's ``SDPBackend.MATH`` is as exact, and may be faster for short
    sequences. A fourth derivative is refused.

    Args:
        query: ``[..., heads, L, E]``.
        key: ``[..., heads, S, E]``.
        value: ``[..., heads, S, Ev]``.
        attn_mask: broadcasts to ``[..., heads, L, S]``; booleans (``True``: takes part), or numbers that are added.
        dropout_p: the probability with which a weight is dropped. As in torch, it is applied whenever it is given.
        is_causal: query ``i`` sees the keys ``0, ..., i``; not together with a mask.
        scale: of the scores; ``None``: ``1 / sqrt(E)``.
        enable_gqa: ``key`` and ``value`` may have fewer heads, each for as many consecutive heads of ``query``.

    Returns:
        ``[..., heads, L, Ev]``, in the dtype of ``query``.

    Raises:
        ShapeError: shapes that do not fit together, or a mask beside ``is_causal``.
        DtypeError: dtypes that differ, or are not floating; a mask of integers; a tensor as ``scale`` or ``dropout_p``.
        HyperparameterError: ``dropout_p`` is outside 0 to 1.
        MissingDerivativeError: in the backward pass, a fourth derivative.

    Reference: Dao et al. (2022), "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
    appendix B, for the first derivative; the others are derived on the page of derivations.

    Example:
        >>> one_key = torch.ones(1, 1, 2)
        >>> attention(torch.randn(1, 3, 2), one_key, torch.tensor([[[5.0, 7.0]]]))
        tensor([[[5., 7.],
                 [5., 7.],
                 [5., 7.]]])
    """
    for name, number in (("scale", scale), ("dropout_p", dropout_p)):
        if isinstance(number, Tensor):  # as torch does: it would be taken for a constant
            raise DtypeError(f"{name} is a tensor", "a number", "a scale that is learned: multiply the query by it")
    if not 0 <= dropout_p <= 1:
        raise HyperparameterError(f"dropout_p={dropout_p}", "a probability, 0 to 1", "0.0 drops nothing")
    query, key, value = (_as_autocast(x) for x in (query, key, value))
    _check_dtypes(query, key, value, attn_mask)
    _check_shapes(query, key, value, enable_gqa)
    if enable_gqa:
        heads = query.shape[-3]
        key, value = (x.repeat_interleave(heads // x.shape[-3], -3) for x in (key, value))
    try:
        batch = _broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        query, key, value = (x.expand(*batch, *x.shape[-2:]) for x in (query, key, value))
        mask = _aligned(attn_mask, (*batch, query.shape[-2], key.shape[-2]))
    except RuntimeError as error:
        raise _shape_error(query, key, value, attn_mask) from error
    if mask is not None and is_causal:
        raise ShapeError(
            f"attn_mask of shape {tuple(mask.shape)} beside is_causal=True",
            "one of the two",
            "write the causal part into the mask: attn_mask & torch.ones(L, S, dtype=torch.bool).tril()",
        )
    options = Options(
        1 / math.sqrt(max(query.shape[-1], 1)) if scale is None else float(scale), is_causal, float(dropout_p)
    )
    noise = _noise(batch, query.device) if dropout_p > 0 else None
    return differentiable(options, noise, mask, query, key, value)


def _broadcast(*shapes: Sequence[int]) -> torch.Size:
    return torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call, no-any-return]


def _aligned(mask: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """The mask with as many axes as ``shape``, to which it broadcasts."""
    if mask is None:
        return None
    if _broadcast(mask.shape, shape) != torch.Size(shape):
        raise RuntimeError("a mask with more entries than scores")
    return mask[(None,) * (len(shape) - mask.ndim)]


def _noise(batch: tuple[int, ...], device: torch.device) -> Tensor:
    """For each head, a number ``[..., 1, 1]`` from which those of its entries are made; one is drawn."""
    drawn = torch.randint(2**63 - 1, (), device=device)
    return mixed(drawn, torch.arange(math.prod(batch), device=device)).reshape(*batch, 1, 1)


def _as_autocast(x: Tensor) -> Tensor:
    """The tensor in the precision in which autocast computes attention, if it does."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def _check_dtypes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    kinds = {x.dtype for x in (query, key, value)}
    if len(kinds) > 1 or not query.is_floating_point():
        shown = ", ".join(str(x.dtype) for x in (query, key, value))
        raise DtypeError(f"query, key and value are {shown}", "one floating dtype", "convert them with .to()")
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise DtypeError(f"attn_mask is {mask.dtype}", "booleans or floating numbers", "write mask.bool() or mask != 0")
    if mask is not None and mask.dtype == torch.float64 != query.dtype:
        raise DtypeError(
            "attn_mask is torch.float64", f"booleans or {query.dtype} as the query", "convert it with .to()"
        )


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, grouped: bool) -> None:
    least = 3 if grouped else 2
    fits = (
        min(query.ndim, key.ndim, value.ndim) >= least
        and query.shape[-1] == key.shape[-1]
        and key.shape[-2] == value.shape[-2]
        and (not grouped or all(x.shape[-3] and query.shape[-3] % x.shape[-3] == 0 for x in (key, value)))
    )
    if not fits:
        raise _shape_error(query, key, value, None)


def _shape_error(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> ShapeError:
    shown = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("query", query), ("key", key), ("value", value)))
    return ShapeError(
        f"{shown}, attn_mask {None if mask is None else tuple(mask.shape)}",
        "[..., L, E], [..., S, E], [..., S, Ev] and a mask that broadcasts to [..., L, S]",
        "transpose heads and length; with fewer heads of key and value pass enable_gqa=True",
    )
