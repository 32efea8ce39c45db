"""The mean of a loss over many tasks, and its gradient, a chunk of tasks at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from diffopt import autodiff, graph, randomness, transforms, tree
from diffopt.arguments import check_flag
from diffopt.checks import refuse_captures
from diffopt.errors import GradModeError, HyperparameterError, LossError, SecondDerivativeError, ShapeError


def mean_over_tasks(
    task_loss: Callable[..., Tensor],
    *args: Any,
    in_dims: int | Sequence[int | None] | None = 0,
    task_chunk: int | None = None,
    randomness: str = "error",
    check: bool = True,
) -> Tensor:
    r"""``torch.func.vmap(task_loss, in_dims)(*args).mean()``, in the memory of one chunk of tasks.

    .. math:: F = \frac1B \sum_{b=1}^B f(\theta, x_b),\qquad
              \nabla F = \frac1B \sum_{chunks} \nabla \sum_{b \in chunk} f(\theta, x_b)

    Each chunk is differentiated as soon as it has been evaluated, and only the sum of the gradients is kept: of all
    that inner loops store, one chunk's is alive at any time. ``backward()`` then has nothing left to compute. The chunk
    runs under ``vmap``; a chunk of one runs without it, which is faster where one task keeps the machine busy (large
    images, long loops).

    Args:
        task_loss: ``task_loss(*args of one task)``, a floating scalar; usually a ``solve`` and an outer loss of its
            end. It must get every tensor that is to have a gradient through its arguments, not by closure.
        args: trees of tensors (and other values, which all tasks share).
        in_dims: for all arguments or each: the axis of its tensors that runs over tasks; ``None``: shared by all.
        task_chunk: how many tasks at a time; ``None``: all at once.
        randomness: what ``vmap`` says of random numbers: ``"error"``, ``"same"`` (for all tasks, whatever their chunk)
            or ``"different"``.
        check: refuse tensors that require grad and are captured by closure.

    Returns:
        The mean, a scalar that can be differentiated once.

    Raises:
        HyperparameterError: ``task_chunk``, ``in_dims`` or ``randomness`` is not what was expected.
        ShapeError: the tasks' axes have different lengths, or there is none.
        LossError: ``task_loss`` did not return one floating scalar.
        CapturedTensorError: it reads a tensor that requires grad and that it was not given.
        GradModeError: called under a ``torch.func`` transform, which has a ``vmap(..., chunk_size=)`` of its own.

    Example:
        >>> import torch, diffopt
        >>> w = torch.tensor(1.0, requires_grad=True)
        >>> diffopt.mean_over_tasks(lambda w, x: (w * x) ** 2, w, torch.arange(4.0), in_dims=(None, 0), task_chunk=2)
        tensor(3.5000, grad_fn=<_MeanBackward>)
    """
    if transforms.transforms_active():
        raise GradModeError(
            "mean_over_tasks was called under a torch.func transform, expected plain code: it differentiates by "
            "itself; call it outside, or use torch.func.vmap(task_loss, in_dims, chunk_size=...)"
        )
    if task_chunk is not None and (isinstance(task_chunk, bool) or not isinstance(task_chunk, int) or task_chunk < 1):
        raise HyperparameterError(f"task_chunk is {task_chunk!r}, expected None or an integer >= 1")
    if randomness not in ("error", "same", "different"):
        raise HyperparameterError(f"randomness is {randomness!r}, expected 'error', 'same' or 'different'")
    check_flag("mean_over_tasks: check", check)
    leaves, structure = tree.flatten(args)
    dims = _dims_of_leaves(args, leaves, in_dims)
    size = _tasks(leaves, structure, dims)
    # without grad nothing is differentiated, whatever the tensors require
    wanted = tuple(torch.is_grad_enabled() and x.requires_grad for x in leaves if isinstance(x, Tensor))
    chunk, watched = task_chunk or size, check and torch.is_grad_enabled()
    call = _Call(task_loss, structure, tuple(leaves), tuple(dims), size, chunk, randomness, wanted, watched)
    mean: Tensor = transforms.apply(_Mean, call, *(leaf for leaf in leaves if isinstance(leaf, Tensor)))
    return mean


@final
@dataclass(frozen=True)
class _Call:
    task_loss: Callable[..., Tensor]
    structure: tree.Structure
    leaves: tuple[Any, ...]
    dims: tuple[int | None, ...]
    size: int
    chunk: int
    randomness: str
    wanted: tuple[bool, ...]
    watched: bool
    """Whether to look for captured tensors: also where nothing given is wanted, since what is captured may be."""

    @property
    def tensor_dims(self) -> list[int | None]:
        return [dim for leaf, dim in zip(self.leaves, self.dims, strict=True) if isinstance(leaf, Tensor)]

    def total(self, tensors: Sequence[Tensor], count: int) -> Tensor:
        """The sum of the losses of ``count`` tasks."""
        if count > 1:
            losses: Tensor = transforms.vmap(self._of_one, [self.tensor_dims], [count], [self.randomness])(*tensors)
            return losses.sum()
        pairs = zip(tensors, self.tensor_dims, strict=True)
        return self._of_one(*(x if dim is None else x.squeeze(dim) for x, dim in pairs))

    def _of_one(self, *tensors: Tensor) -> Tensor:
        now = iter(tensors)
        leaves = [next(now) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        loss = self.task_loss(*tree.unflatten(self.structure, leaves))
        if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
            raise LossError(f"task_loss returned {tree.describe(loss)}, expected one floating scalar tensor")
        return loss


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> Tensor:
        wanted = [i for i, need in enumerate(call.wanted) if need]
        grads = [torch.zeros_like(tensors[i]) for i in wanted]
        device = tensors[0].device
        mean: Tensor | None = None
        before = randomness.snapshot(device) if call.randomness == "same" else None
        for start in range(0, call.size, call.chunk):
            count = min(call.chunk, call.size - start)
            parts = [
                x.detach() if dim is None else x.detach().narrow(dim, start, count)
                for x, dim in zip(tensors, call.tensor_dims, strict=True)
            ]
            watched = call.watched and start == 0
            numbers = randomness.replayed(before if start else None, device)
            with numbers, torch.set_grad_enabled(bool(wanted) or watched):
                # one root more than is wanted: what is captured is older than a root
                roots = autodiff.make_roots([*(parts[i] for i in wanted), torch.empty(0, device=device)])
                for i, root in zip(wanted, roots, strict=False):
                    parts[i] = root
                total = call.total(parts, count) / call.size
                if watched and total.requires_grad:
                    _refuse_captures(call, total, roots)
                found = autodiff.gradient(total, roots[:-1], differentiable=False) if wanted else ()
            for i, held, term in zip(wanted, grads, found, strict=True):
                dim = call.tensor_dims[i]
                if term is not None:
                    (held if dim is None else held.narrow(dim, start, count)).add_(term)
            mean = total.detach() if mean is None else mean + total.detach()
        ctx.wanted = wanted
        ctx.save_for_backward(*grads, *(tensors[i] for i in wanted))
        assert mean is not None
        return mean

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        terms: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if ctx.wanted:
            products = transforms.apply(_Products, cotangents[0], *ctx.saved_tensors)
            for i, term in zip(ctx.wanted, products, strict=True):
                terms[i + 1] = term
        return tuple(terms)


def _refuse_captures(call: _Call, total: Tensor, roots: Sequence[Tensor]) -> None:
    nodes = graph.captured_nodes([total.grad_fn], roots)
    refuse_captures("task_loss", [call.task_loss], nodes)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cotangent: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        # the second half, what the gradients are of, is there so that a second derivative comes by here
        return tuple(grad * cotangent for grad in tensors[: len(tensors) // 2])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        raise SecondDerivativeError(
            "the gradient of mean_over_tasks is being differentiated again, expected once: it has been summed up; for "
            "second derivatives use torch.func.vmap(task_loss)(...).mean() and estimator=Unrolled()"
        )


def _dims_of_leaves(args: Sequence[Any], leaves: Sequence[Any], in_dims: Any) -> list[int | None]:
    per_argument = [in_dims] * len(args) if in_dims is None or isinstance(in_dims, int) else list(in_dims)
    right = all(dim is None or (isinstance(dim, int) and not isinstance(dim, bool)) for dim in per_argument)
    if len(per_argument) != len(args) or not right:
        raise HyperparameterError(
            f"in_dims is {in_dims!r}, expected an integer or None, or one of these for each of {len(args)} arguments"
        )
    dims = [dim for arg, dim in zip(args, per_argument, strict=True) for _ in tree.flatten(arg)[0]]
    return [dim if isinstance(leaf, Tensor) else None for dim, leaf in zip(dims, leaves, strict=True)]


def _tasks(leaves: Sequence[Any], structure: tree.Structure, dims: Sequence[int | None]) -> int:
    sizes: dict[str, int] = {}
    for path, leaf, dim in zip(tree.paths(structure), leaves, dims, strict=True):
        if dim is not None:
            if not -leaf.ndim <= dim < leaf.ndim:
                raise ShapeError(
                    f"args{path} is {tree.describe(leaf)}, expected an axis {dim} that runs over tasks; check in_dims"
                )
            sizes[f"args{path}"] = leaf.shape[dim]
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        shown = dict(list(sizes.items())[:4])
        raise ShapeError(f"the axes that run over tasks have lengths {shown}, expected one common length >= 1")
    return next(iter(sizes.values()))
