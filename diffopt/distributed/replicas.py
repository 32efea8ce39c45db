"""Whether the ranks agree: where ``copied`` takes a tensor that all share, and after the first step of a solve."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, distributed

from diffopt.distributed.groups import Group
from diffopt.errors import RanksError
from diffopt.tensors import transforms

_watched: ContextVar[list[Group] | None] = ContextVar("watched", default=None)
"""The groups that something has been copied to, while that is looked at."""


@contextmanager
def watching(copied_to: list[Group]) -> Iterator[None]:
    """Compare what ``copied`` is given over its ranks, and take note of these."""
    token = _watched.set(copied_to)
    try:
        yield
    finally:
        _watched.reset(token)


def refuse_other_copies(tensors: Sequence[Tensor], group: Group) -> None:
    """Refuse tensors that differ between ranks, in the first evaluation of a loss."""
    copied_to = _watched.get()
    if copied_to is None:
        return
    known = distributed.group.WORLD if group is None else group
    if known not in copied_to:
        copied_to.append(known)
    apart = deviations(tensors, group)
    worst = max(apart)
    if worst <= tolerance(tensors):
        return
    if math.isinf(worst):
        raise RanksError(
            f"copied was given {describe_shapes(tensors)}, and other numbers, shapes or dtypes on others",
            "the same tensors on all ranks",
            "leave out what a rank holds for itself, such as the weights of its examples or its part of the params",
        )
    rank = apart.index(worst)
    raise RanksError(
        f"copied was given tensors that differ between ranks: those of rank {rank} of the group are {worst:.1e} from "
        "those of rank 0, of their norm",
        "the same tensors on all ranks",
        "start them equal: the same torch.manual_seed on all ranks before they are made, or "
        "torch.distributed.broadcast(tensor, 0). What a rank holds for itself is not to be copied",
    )


def deviations(tensors: Sequence[Tensor], group: Group) -> list[float]:
    """For each rank of a group, how far its tensors are from those of the first, at most, relative to their norm.

    Infinity for all, if ranks have other numbers of tensors, or tensors of other shapes or dtypes.
    """
    with torch.no_grad(), transforms.below_all():
        plain = [_real(transforms.plain(x)) for x in tensors]
        if not _alike(plain, group):
            return [math.inf] * distributed.get_world_size(group)
        first = 0 if group is None else distributed.get_global_rank(group, 0)
        device = plain[0].device
        wide = torch.float32 if device.type == "mps" else torch.float64
        worst = torch.zeros((), dtype=wide, device=device)
        for x in plain:
            reference = x.clone(memory_format=torch.contiguous_format)
            distributed.broadcast(reference, first, group=group)
            ours, theirs = x.nan_to_num().to(wide), reference.nan_to_num().to(wide)
            apart, size = (ours - theirs).norm(), torch.maximum(ours.norm(), theirs.norm())
            worst = torch.maximum(worst, apart / torch.where(size > 0, size, torch.ones_like(size)))
        row = worst.new_zeros(distributed.get_world_size(group))
        row[distributed.get_rank(group)] = worst
        distributed.all_reduce(row, group=group)
        return [float(x) for x in row.tolist()]


def _alike(tensors: Sequence[Tensor], group: Group) -> bool:
    """Whether all ranks have as many tensors, of the same shapes and dtypes: only such can be sent and compared."""
    form = zlib.crc32(repr([(tuple(x.shape), x.dtype) for x in tensors]).encode())
    ends = torch.tensor([form, -form], device=tensors[0].device)
    distributed.all_reduce(ends, distributed.ReduceOp.MAX, group=group)
    most, least = ends.tolist()
    return bool(most == -least)


def agree(tensors: Sequence[Tensor], group: Group) -> bool:
    """Whether tensors are the same on all ranks of a group, to half their digits."""
    return not tensors or max(deviations(tensors, group)) <= tolerance(tensors)


def tolerance(tensors: Sequence[Tensor]) -> float:
    """How far tensors that are the same may be apart: half their digits."""
    return float(max(torch.finfo(x.dtype).eps for x in tensors) ** 0.5)


def describe_shapes(tensors: Sequence[Tensor]) -> str:
    """Say in a few words how many tensors there are, and of which shapes."""
    shapes = ", ".join(str(tuple(x.shape)) for x in tensors[:3])
    return f"{len(tensors)} tensor(s) of shapes {shapes}{', ...' if len(tensors) > 3 else ''} on this rank"


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
