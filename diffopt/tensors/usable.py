"""Tensors that a call is given, whatever for: those that nothing can be calculated with are refused by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from diffopt.errors import DeviceError, LeafError, VmapError
from diffopt.tensors import hints, tracing, transforms
from diffopt.tensors.tree import describe

_ORDINARY = (Tensor, torch.nn.Parameter)


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""There is no arithmetic in the other floating ones."""


def is_calculable(tensor: Tensor) -> bool:
    """Whether a tensor is dense, holds numbers, and is of a dtype that can be calculated with."""
    dense = tensor.layout == torch.strided and not tensor.is_nested
    return dense and tensor.dtype in DTYPES and tensor.device.type != "meta"


def usable(tensor: Tensor, name: Callable[[], str]) -> Tensor:
    """The tensor; a copy if it was made in ``torch.inference_mode``, which autograd cannot save.

    Raises:
        LeafError: it is a lazy module's, of a layout without arithmetic, or sparse and to be differentiated.
        VmapError: it belongs to a vmap that has ended.
        DeviceError: it holds no numbers.
    """
    plain = type(tensor) in _ORDINARY and tensor.layout == torch.strided and not tensor.is_nested
    if not plain or transforms.is_wrapped(tensor):
        refuse_unusable(tensor, name)
    made_there = transforms.is_inference(tensor) and not torch.is_inference_mode_enabled()
    return tensor.clone() if made_there else tensor


def usable_leaves(leaves: Sequence[Any], names: Callable[[], Sequence[str]]) -> list[Any]:
    """The same for the tensors among the leaves of a tree."""
    return [usable(x, lambda i=i: names()[i]) if isinstance(x, Tensor) else x for i, x in enumerate(leaves)]  # type: ignore[misc]


def refuse_unusable(tensor: Tensor, name: Callable[[], str]) -> None:
    """Refuse what :func:`usable` refuses."""
    if torch.nn.parameter.is_lazy(tensor):
        fix = hints.for_params(tensor)
        raise LeafError(f"{name()} is {describe(tensor)}", "a tensor with a shape", fix)
    if transforms.has_escaped(tensor):
        raise VmapError(
            f"{name()} belongs to a torch.func.vmap that has ended",
            "a tensor of code that still runs",
            "return it from the function under vmap, and use what vmap returns",
        )
    if isinstance(tensor, FakeTensor) and tracing.current() is None:
        raise DeviceError(
            f"{name()} is a FakeTensor, which holds no numbers", "one that does", "make it outside FakeTensorMode"
        )
    if tensor.is_nested and tensor.layout == torch.strided:
        raise LeafError(
            f"{name()} is nested in the strided layout",
            "one that autograd can save",
            "make it with layout=torch.jagged, or take torch.nested.to_padded_tensor of it",
        )
    if tensor.requires_grad and transforms.is_sparse(tensor):
        raise LeafError(
            f"{name()} is {describe(tensor)} that requires grad, in the layout {tensor.layout}",
            "a dense one where a derivative is wanted",
            "pass its values(), and make torch.sparse_coo_tensor(indices, values, shape) of them in the loss; a "
            "constant: .detach() it",
        )
    if tensor.layout == torch._mkldnn:  # type: ignore[attr-defined]
        raise LeafError(f"{name()} is laid out for mkldnn", "a dense tensor", "convert it with .to_dense()")
