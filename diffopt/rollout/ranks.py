"""A solve that ranks share: what must be alike on all of them in its backward pass, and how much they keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffopt.distributed import groups, replicas
from diffopt.distributed.collectives import COLLECTIVES, is_copied, is_summed
from diffopt.errors import EstimatorError, RanksError
from diffopt.tensors import autograd_graph, transforms
from diffopt.tensors.spread import is_spread


def refuse_other_cotangents(copied_to: Sequence[groups.Group], cotangents: Sequence[Tensor]) -> None:
    """Refuse to pull back cotangents that differ between the ranks that share a solve."""
    for group in copied_to if cotangents else ():
        apart = max(replicas.deviations(cotangents, group))
        if math.isinf(apart):
            raise RanksError(
                "the ranks share a solve, and the gradients of their outer losses are of other parts or shapes",
                "the same outer loss on all ranks, of the same observations",
                "of each rank's own data, observe a sum: summed(f(copied(params), data)), of diffopt.distributed",
            )
        if apart > replicas.tolerance(cotangents):
            raise RanksError(
                f"the ranks share a solve, and the gradients of their outer losses at its solution differ by "
                f"{apart:.1e} of their norm",
                "the same outer loss on all ranks",
                "of each rank's own data: summed(outer_loss(copied(solution.params), data)), of diffopt.distributed",
            )


def refuse_other_directions(copied_to: Sequence[groups.Group], directions: Tensor) -> None:
    """Refuse random directions that differ between the ranks that share a solve."""
    for group in copied_to:
        if not replicas.agree([directions], group):
            raise RanksError(
                "the ranks share a solve, and ESJacobian draws other directions on each",
                "the same on all ranks",
                "give it generator=torch.Generator().manual_seed(0), a new one for every solve, on all ranks",
            )


def refuse_shards(shards: bool, estimator: str) -> None:
    """Refuse params of which each rank holds its own part, for an estimator that takes inner products of them."""
    if shards:
        raise EstimatorError(
            f"{estimator} with params that each rank holds for itself: they enter what is summed over ranks, and are "
            "not copied to them, and the estimator takes inner products of them",
            "params that all ranks share, or DTensors",
            "use Reverse(); if they share them, put copied() of diffopt.distributed around them in the loss",
        )


def refuse_held_apart(losses: Tensor, given: Tensor, name: str, estimator: str) -> None:
    """Refuse an argument that each rank holds for itself, for an estimator that moves it on all ranks at once.

    It is one that reaches what is summed over ranks, and has not been copied to them. (Their directions would add up.)
    """
    if groups.is_running() and reaches_a_sum(losses, [given]):
        raise EstimatorError(
            f"{estimator} with {name}, which each rank holds for itself: it enters what is summed over ranks, and is "
            "not copied to them",
            "arguments that all ranks share",
            "use Reverse(); if they share it, put copied() of diffopt.distributed around it in the loss",
        )


def reaches_a_sum(losses: Tensor, given: Sequence[Tensor]) -> bool:
    """Whether one of these reaches what is summed over ranks, and has not been copied to them."""
    graph = autograd_graph.nodes([losses.grad_fn])
    behind = autograd_graph.nodes(filter(is_summed, graph), set(filter(is_copied, graph)))
    starts, leaves = {x.grad_fn for x in given} - {None}, {id(x) for x in given}
    return any([node in starts or id(getattr(node, "variable", None)) in leaves for node in behind])


def largest(size: int, graph: Sequence[Any], params: Sequence[Tensor]) -> int:
    """A number of bytes on the rank where it is largest, if ranks share a step, given by its graph and its params.

    What is stored, and how many steps are taken again, is decided by it, and all ranks must decide the same.
    """
    if not groups.is_running():
        return size
    sharing = {node.group: None for node in graph if type(node) in COLLECTIVES}
    spread: list[Any] = [x for x in map(transforms.unwrapped, params) if is_spread(x)]
    for mesh in [x.device_mesh for x in spread]:
        sharing |= dict.fromkeys(mesh.get_all_groups())
    for group in sharing:
        size = int(groups.largest(size, group, params[0].device))
    return size
