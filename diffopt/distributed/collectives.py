"""``copied`` and ``summed``: the conjugate pair of collectives.

# NOTE [why these are a pair]
Copying one tensor to every rank and adding up one tensor of every rank are each other's transposes, if the ranks are
looked at as one: what depends on all copies has the sum of their cotangents, and every term of a sum has the sum's
own. So the backward pass of each is the other, to any order. torch's own differentiable ``all_reduce`` is its own
transpose, which is right for a function whose value is the sum of what the ranks return. An inner loss is one number
that all ranks return, and its gradient would be as many times too large as there are ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from diffopt.distributed.groups import Group, several
from diffopt.distributed.replicas import refuse_other_copies
from diffopt.errors import LeafError
from diffopt.tensors import transforms, tree
from diffopt.tensors.spread import is_spread


def copied(tree_of_tensors: Any, group: Group = None) -> Any:
    r"""What all ranks share, as each of them uses it: the same values, and the sum of all cotangents.

    .. math:: y_i = x, \qquad \bar x = \sum_i \bar y_i

    Put it around the params of an inner loss, and around every argument of it that all ranks share and that is to have
    a hypergradient; not around what a rank holds for itself, such as weights of its own examples, whose hypergradient
    is its own already. Its backward pass is :func:`summed`, so that it can be differentiated to any order, in
    forward mode too, and under ``torch.func``.

    Cost: nothing forward; one ``all_reduce`` of the leaves backward, together. All ranks of the group must call it, and
    go backward through it, in the same order.

    Args:
        tree_of_tensors: a tensor or a tree; floating and complex tensors are copied, anything else is returned as it
            is. They must be equal on all ranks, which ``solve(..., check=True)`` compares at its first step.
        group: the ranks; default: all. In a program of one process (no process group, ``WORLD_SIZE`` unset or 1)
            nothing happens.

    Returns:
        A tree like the one that was given.

    Raises:
        RanksError: there are several processes but no process group, or this rank is not of ``group``, or, at the
            first step of a solve, the ranks hold different tensors.
        LeafError: a tensor is sparse, or a ``DTensor`` (which communicates by itself).

    Example:
        In one process:

        >>> import torch, diffopt
        >>> diffopt.distributed.copied({"w": torch.tensor([1.0, 2.0])})
        {'w': tensor([1., 2.])}
    """
    if not several(group, "copied"):
        return tree_of_tensors
    leaves, structure = tree.flatten(tree_of_tensors)
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())]
    _refuse_unusual([leaves[i] for i in places], "copied")
    return tree.unflatten(structure, _replaced(_Copied, group, leaves, places))


def summed(tree_of_tensors: Any, group: Group = None) -> Any:
    r"""The sum over ranks of what each of them holds, on every rank; each term's cotangent is that of the sum.

    .. math:: y = \sum_i x_i, \qquad \bar x_i = \bar y

    Put it around the inner loss of a rank's own data. (For a mean over all examples divide by their number first.) Its
    backward pass is :func:`copied`, so that it can be differentiated to any order, in forward mode too, and under
    ``torch.func``. What is computed from the sum must be the same on all ranks.

    Cost: one ``all_reduce`` of the leaves forward, together; nothing backward.

    Args:
        tree_of_tensors: a tensor or a tree of tensors; integers are summed without a derivative.
        group: the ranks; default: all. In a program of one process (no process group, ``WORLD_SIZE`` unset or 1)
            nothing happens.

    Returns:
        A tree like the one that was given, the same on all ranks.

    Raises:
        RanksError: there are several processes but no process group, or this rank is not of ``group``.
        LeafError: a leaf is no tensor, or a sparse or boolean one, or a ``DTensor`` (which communicates by itself).

    Example:
        In one process:

        >>> import torch, diffopt
        >>> diffopt.distributed.summed(torch.tensor(3.0))
        tensor(3.)
    """
    leaves, structure = tree.flatten(tree_of_tensors)
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.dtype == torch.bool:
            raise LeafError(
                f"summed was given {tree.describe(leaf)}", "tensors of numbers", "make it one: torch.tensor(...)"
            )
    if not several(group, "summed"):
        return tree_of_tensors
    _refuse_unusual(leaves, "summed")
    return tree.unflatten(structure, _replaced(_Summed, group, leaves, range(len(leaves))))


def _replaced(function: type[Function], group: Group, leaves: Sequence[Any], places: Sequence[int]) -> list[Any]:
    """The leaves, with what ``function`` makes of those at ``places``, in one call."""
    results = list(leaves)
    if places:
        found = transforms.apply(function, group, *(leaves[i] for i in places))
        for i, x in zip(places, found, strict=True):
            results[i] = x
    return results


def _refuse_unusual(tensors: Sequence[Tensor], name: str) -> None:
    for x in tensors:
        if is_spread(x):
            raise LeafError(
                f"{name} was given a DTensor",
                "what a rank holds for itself",
                "leave it out: a DTensor adds up over its mesh by itself",
            )
        if x.layout != torch.strided:
            raise LeafError(f"{name} was given {tree.describe(x)} ({x.layout})", "dense tensors", "use to_dense()")


class _Copied(Function):
    """``(group, x, ...) -> (x, ...)``."""

    @staticmethod
    def forward(group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
        refuse_other_copies(tensors, group)
        return tuple([x.view_as(x) for x in tensors])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.group = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_where_needed(_Summed, ctx, cotangents)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tuple([x.view_as(x) for x in tangents[1:]])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], group: Group, *tensors: Tensor) -> Any:
        return transforms.apply(_Copied, group, *tensors), in_dims[1:]


class _Summed(Function):
    """``(group, x, ...) -> (sum over ranks of x, ...)``."""

    @staticmethod
    def forward(group: Group, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _total(tensors, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.group, ctx.sizes = inputs[0], [x.numel() for x in output]
        ctx.mark_non_differentiable(*[x for x in output if not (x.is_floating_point() or x.is_complex())])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_where_needed(_Copied, ctx, cotangents)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return transforms.apply(_Summed, ctx.group, *tangents[1:])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], group: Group, *tensors: Tensor) -> Any:
        return transforms.apply(_Summed, group, *tensors), in_dims[1:]


def _where_needed(function: type[Function], ctx: Any, cotangents: Sequence[Tensor]) -> list[Tensor | None]:
    """The cotangents that somebody asks for, taken through ``function`` together."""
    needed = ctx.needs_input_grad[1:]
    found = _replaced(function, ctx.group, cotangents, [i for i, asked in enumerate(needed) if asked])
    return [x if asked else None for x, asked in zip(found, needed, strict=True)]


def _total(tensors: Sequence[Tensor], group: Group) -> tuple[Tensor, ...]:
    """The sums over ranks; the tensors of one kind travel together."""
    kinds: dict[Any, list[int]] = {}
    for i, x in enumerate(tensors):
        kinds.setdefault((x.dtype, x.device), []).append(i)
    results = list(tensors)
    for places in kinds.values():
        flat = torch.cat([tensors[i].detach().reshape(-1) for i in places])
        torch.distributed.all_reduce(flat, group=group)
        parts = torch.split(flat, [tensors[i].numel() for i in places])
        for i, part in zip(places, parts, strict=True):
            results[i] = part.clone().view(tensors[i].shape) if len(places) > 1 else part.view(tensors[i].shape)
    return tuple(results)


def is_copied(node: Any) -> bool:
    """Whether a node of a graph is that of :func:`copied`; it then has its ``group``."""
    return type(node) is _Copied._backward_cls


def is_summed(node: Any) -> bool:
    """Whether a node of a graph is that of :func:`summed`; it then has its ``group``, and the ``sizes`` of the sums."""
    return type(node) is _Summed._backward_cls


COLLECTIVES: frozenset[Any] = frozenset({_Copied._backward_cls, _Summed._backward_cls})
"""The types of both nodes."""
