"""Tensors that are spread over ranks by themselves (``DTensor``), and modules that spread, or average, by hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt.errors import RanksError
from diffopt.tensors import autograd_graph
from diffopt.tensors.spread import gathered, is_spread


def on_all_ranks(tensor: Tensor, like: Any) -> Any:
    """A tensor that all ranks have, as one of the mesh of ``like``."""
    from torch.distributed.tensor import DTensor

    mesh = like.device_mesh
    return DTensor.from_local(tensor, mesh, [_replicated()] * mesh.ndim, run_check=False)


def spread_like(tensor: Tensor, like: Any) -> Tensor:
    """A tensor that all ranks have, spread as ``like`` is."""
    spread: Tensor = on_all_ranks(tensor, like).redistribute(like.device_mesh, like.placements)
    return spread


# ------------------------------------------------------------------------------------- what torch computes wrongly

_MEANS = frozenset({"MseLoss", "SmoothL1Loss", "HuberLoss", "BinaryCrossEntropy", "SoftMarginLoss"})
"""Losses of pairs of numbers, which torch's DTensor divides by a rank's own count when it takes their gradient."""


def refuse_wrong_means(losses: Tensor) -> None:
    """Refuse a mean over sharded numbers whose gradient torch multiplies by the number of ranks, if it still does.

    It must be asked before a gradient is taken, which frees what the graph holds.
    """
    for node in autograd_graph.nodes([losses.grad_fn]):
        name = type(node).__name__.partition("Backward")[0]
        if name in _MEANS and node._saved_reduction == 1 and _is_sharded(node._saved_self):
            if not _is_wrong(node._saved_self):
                return
            raise RanksError(
                f"the inner loss takes the mean of torch's {name} over a sharded DTensor, whose gradient comes out "
                "wrong in this version of torch, by as many times as there are shards",
                "a mean with the right gradient",
                'write reduction="none" there, and .mean() behind it',
            )


def _is_sharded(tensor: Any) -> bool:
    if not is_spread(tensor):
        return False
    sizes = tensor.device_mesh.shape
    return any(x.is_shard() and size > 1 for x, size in zip(tensor.placements, sizes, strict=True))


def _is_wrong(like: Any) -> bool:
    """Whether torch takes such a gradient wrongly, seen on two numbers of each rank."""
    from torch.distributed.tensor import DTensor

    with torch.enable_grad():
        placements = [x if x.is_shard() else _replicated() for x in like.placements]
        own = torch.ones([2] * like.ndim, dtype=like.dtype, device=like.to_local().device)
        x = DTensor.from_local(own, like.device_mesh, placements, run_check=False).requires_grad_()
        loss = torch.nn.functional.mse_loss(x, torch.zeros_like(x))
        (found,) = torch.autograd.grad(loss, x)
    return abs(float(gathered(found).flatten()[0]) * x.numel() - 2) > 1e-2


def _replicated() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()


# --------------------------------------------------------------------------------------------- modules with hooks


def wrapper_of(modules: Sequence[torch.nn.Module]) -> str:
    """The name of the first wrapper for several ranks among modules, as its caller would write it; empty: none is."""
    for module in modules:
        names = {kind.__name__ for kind in type(module).__mro__}
        for name, written in _WRAPPERS.items():
            if name in names:
                return written
    return ""


_WRAPPERS = {
    "FSDPModule": "fully_shard",
    "FullyShardedDataParallel": "FullyShardedDataParallel",
    "DistributedDataParallel": "DistributedDataParallel",
}


def shards(modules: Sequence[torch.nn.Module]) -> bool:
    """Whether hooks of some module put its own parameters in the place of those it is called with."""
    return wrapper_of(modules) not in ("", "DistributedDataParallel")


def refuse_wrapper(module: torch.nn.Module) -> None:
    """Refuse a module whose hooks know its own parameters only, where it is to be called with others."""
    name = wrapper_of(list(module.modules()))
    if name == "DistributedDataParallel":
        raise RanksError(
            "functional was given a module within DistributedDataParallel, which averages the gradients of its own "
            "parameters, and not of those that the function is called with",
            "the bare module",
            "write functional(wrapped.module); with inner data over ranks, summed(loss(copied(params), batch)) of "
            "diffopt.distributed",
        )
    if name:
        raise RanksError(
            f"functional was given a module within {name}, whose hooks put its own parameters in the place of those "
            "that the function is called with",
            "the bare module",
            BARE,
        )


BARE = (
    "write function, _ = functional(bare), where bare = copy.deepcopy(module) was made before it was sharded; params "
    "are dict(sharded.named_parameters()), and data DTensors of their mesh"
)
