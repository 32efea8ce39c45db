"""The mean of a loss over many tasks, and its gradient, a chunk of tasks at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from diffopt.errors import (
    GradModeError,
    HyperparameterError,
    LossError,
    ShapeError,
)
from diffopt.rollout.task_chunks import Aux, Call, mean
from diffopt.tensors import transforms, tree
from diffopt.tensors.arguments import check_choice, check_flag, check_function, check_integer
from diffopt.tensors.plain_numbers import is_integer, plain
from diffopt.tensors.usable import usable_leaves


@overload
def mean_over_tasks(
    task_loss: Callable[..., Tensor],
    *args: Any,
    in_dims: int | Sequence[int | None] | None = 0,
    task_chunk: int | None = None,
    randomness: str = "error",
    check: bool = True,
    has_aux: Literal[False] = False,
) -> Tensor: ...


@overload
def mean_over_tasks(
    task_loss: Callable[..., tuple[Tensor, Any]],
    *args: Any,
    in_dims: int | Sequence[int | None] | None = 0,
    task_chunk: int | None = None,
    randomness: str = "error",
    check: bool = True,
    has_aux: Literal[True],
) -> tuple[Tensor, Any]: ...


def mean_over_tasks(
    task_loss: Callable[..., Any],
    *args: Any,
    in_dims: int | Sequence[int | None] | None = 0,
    task_chunk: int | None = None,
    randomness: str = "error",
    check: bool = True,
    has_aux: bool = False,
) -> Any:
    r"""``torch.func.vmap(task_loss, in_dims)(*args).mean()``, in the memory of one chunk of tasks.

    .. math:: F = \frac1B \sum_{b=1}^B f(\theta, x_b),\qquad
              \nabla F = \frac1B \sum_{chunks} \nabla \sum_{b \in chunk} f(\theta, x_b)

    Each chunk is differentiated as soon as it has been evaluated, and only the sum of the gradients is kept: of all
    that inner loops store, one chunk's is alive at any time. ``backward()`` then has nothing left to compute. The chunk
    runs under ``vmap``; a chunk of one runs without it, which is faster where one task keeps the machine busy (large
    images, long loops). Chunks are added up in single precision at least, whatever the precision of the tensors.

    Args:
        task_loss: ``task_loss(*args of one task)``, a floating scalar; usually a ``solve`` and an outer loss of its
            end. It must get every tensor that is to have a gradient through its arguments, not by closure.
        args: trees of tensors (and other values, which all tasks share).
        in_dims: for all arguments or each: the axis of its tensors that runs over tasks; ``None``: shared by all.
        task_chunk: how many tasks at a time; ``None``: all at once.
        randomness: what ``vmap`` says of random numbers: ``"error"``, ``"same"`` (for all tasks, whatever their chunk)
            or ``"different"``.
        check: refuse tensors that require grad and are captured by closure, and arguments changed in place.
        has_aux: ``task_loss`` returns a pair ``(loss, aux)`` with a tree of tensors and numbers.

    Returns:
        The mean, a scalar that can be differentiated once; with ``has_aux`` a pair of it and the trees of all tasks,
        their tensors stacked over tasks and detached.

    Raises:
        HyperparameterError: ``task_chunk``, ``in_dims`` or ``randomness`` is not what was expected.
        ShapeError: the tasks' axes have different lengths, or there is none.
        LossError: ``task_loss`` is no function of that many arguments, or did not return one floating scalar.
        CapturedTensorError: it reads a tensor that requires grad and that it was not given.
        InPlaceError: it writes into its arguments.
        GradModeError: called under a ``torch.func`` transform, which has a ``vmap(..., chunk_size=)`` of its own.

    Example:
        >>> import torch, diffopt
        >>> w = torch.tensor(1.0, requires_grad=True)
        >>> diffopt.mean_over_tasks(lambda w, x: (w * x) ** 2, w, torch.arange(4.0), in_dims=(None, 0), task_chunk=2)
        tensor(3.5000, grad_fn=<_MeanBackward>)
    """
    if transforms.transforms_active():
        raise GradModeError(
            "mean_over_tasks was called under a torch.func transform",
            "plain code",
            "it differentiates by itself; call it outside, or use torch.func.vmap(task_loss, in_dims, chunk_size=...)",
        )
    check_function("task_loss", task_loss, "a function task_loss(*args of one task)", LossError)
    task_chunk = check_integer("task_chunk", task_chunk, 1, also=(None,))
    randomness = check_choice("randomness", randomness, "error", "same", "different")
    check_flag("mean_over_tasks: check", check)
    check_flag("mean_over_tasks: has_aux", has_aux)
    leaves, structure = tree.flatten(args)
    leaves = usable_leaves(leaves, lambda: [f"args{path}" for path in tree.paths(structure)])
    dims = _dims_of_leaves(args, leaves, in_dims)
    size = _tasks(leaves, structure, dims)
    # counted from the front, as what is below torch.func.vmap takes them
    dims = [None if dim is None else dim % leaf.ndim for dim, leaf in zip(dims, leaves, strict=True)]
    # without grad nothing is differentiated, whatever the tensors require
    wanted = tuple(torch.is_grad_enabled() and x.requires_grad for x in leaves if isinstance(x, Tensor))
    chunk, watched = task_chunk or size, check and torch.is_grad_enabled()
    aux = Aux() if has_aux else None
    parts = structure, tuple(leaves), tuple(dims)
    result = mean(Call(task_loss, *parts, size, chunk, randomness, wanted, watched, bool(check), aux))
    return result if aux is None else (result, aux.of_all_tasks())


def _dims_of_leaves(args: Sequence[Any], leaves: Sequence[Any], in_dims: Any) -> list[int | None]:
    given = plain(in_dims)
    listed = isinstance(given, Sequence) and not isinstance(given, str)
    per_argument = [plain(dim) for dim in given] if listed else [given] * len(args)
    right = all(dim is None or is_integer(dim) for dim in per_argument)
    if len(per_argument) != len(args) or not right:
        raise HyperparameterError(
            f"in_dims is {tree.describe(in_dims)}",
            f"an integer or None, or one of these for each of {len(args)} arguments",
        )
    dims = [dim for arg, dim in zip(args, per_argument, strict=True) for _ in tree.flatten(arg)[0]]
    return [dim if isinstance(leaf, Tensor) else None for dim, leaf in zip(dims, leaves, strict=True)]


def _tasks(leaves: Sequence[Any], structure: tree.Structure, dims: Sequence[int | None]) -> int:
    sizes: dict[str, int] = {}
    for path, leaf, dim in zip(tree.paths(structure), leaves, dims, strict=True):
        if dim is not None:
            if leaf.layout != torch.strided or leaf.is_nested:
                raise ShapeError(
                    f"args{path} is {tree.describe(leaf)}, sparse or nested",
                    "a dense one that can be divided among tasks",
                    "convert it, or loop over the tasks",
                )
            if not -leaf.ndim <= dim < leaf.ndim:
                raise ShapeError(
                    f"args{path} is {tree.describe(leaf)}",
                    f"an axis {tree.brief(dim)} that runs over tasks",
                    "check in_dims",
                )
            sizes[f"args{path}"] = leaf.shape[dim]
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        shown = dict(list(sizes.items())[:4])
        raise ShapeError(f"the axes that run over tasks have lengths {shown}", "one common length >= 1")
    return next(iter(sizes.values()))
