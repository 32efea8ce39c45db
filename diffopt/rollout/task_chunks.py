"""One chunk of tasks after the other: what :func:`diffopt.mean_over_tasks` computes.

# NOTE [sums in single precision]
Half precision holds no sum of more than some hundred terms of one size: the next one is rounded off. So means and
gradients are added up in single precision at least, and come back in the dtypes of the losses and the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast, final

import torch
from torch import Tensor

from diffopt.errors import DiffoptError, InPlaceError, LossError, SecondDerivativeError
from diffopt.rollout.along import Form
from diffopt.rollout.refusals import refuse_captures
from diffopt.tensors import autograd_graph, derivatives, hints, random_state, torch_errors, transforms, tree
from diffopt.tensors.captures import Given


@final
@dataclass(frozen=True)
class Aux:
    """What the loss of each task returns besides: its form, and the leaves of all tasks, chunk by chunk."""

    form: Form = field(default_factory=lambda: Form("what task_loss returned as aux"))
    chunks: list[Sequence[Tensor]] = field(default_factory=list)

    def of_all_tasks(self) -> Any:
        """The tree, stacked over tasks."""
        return self.form.tree([torch.cat(column) for column in zip(*self.chunks, strict=True)])


@final
@dataclass(frozen=True)
class Call:
    """One call of :func:`diffopt.mean_over_tasks`, with its trees taken apart."""

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
    check: bool
    aux: Aux | None = None

    @property
    def tensor_dims(self) -> list[int | None]:
        """The axis of each tensor that runs over tasks."""
        return [dim for leaf, dim in zip(self.leaves, self.dims, strict=True) if isinstance(leaf, Tensor)]

    def losses(self, tensors: Sequence[Tensor], count: int) -> Tensor:
        """The losses of ``count`` tasks, in their own precision."""
        if count > 1:
            vmapped = transforms.vmap(self._of_one, [self.tensor_dims], [count], [self.randomness])
            try:
                return self._without_aux(vmapped(*tensors))
            except RuntimeError as error:
                named = None if isinstance(error, DiffoptError) else torch_errors.vmap_error(error, "task_loss")
                if named is None or torch_errors.is_in_place(error):
                    raise
                raise named from error
        pairs = zip(tensors, self.tensor_dims, strict=True)
        found = self._of_one(*(x if dim is None else x.squeeze(dim) for x, dim in pairs))
        if self.aux is None:
            return cast("Tensor", found.unsqueeze(0))
        return self._without_aux([x.unsqueeze(0) for x in found])

    def _without_aux(self, found: Any) -> Tensor:
        """The losses out of what a chunk returned; the rest of it is put by."""
        if self.aux is None:
            return cast("Tensor", found)
        self.aux.chunks.append([x.detach() for x in found[1:]])
        return cast("Tensor", found[0])

    def _named(self, error: Exception, count: int) -> DiffoptError | None:
        """What was wrong with a call of the loss that raised ``error``; ``None`` if only the loss can know."""
        tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        given = dict(zip(self.names(), tensors, strict=True))
        return (
            torch_errors.signature_error(error, "task_loss", self.task_loss, count, "one for each of *args")
            or torch_errors.device_error(error, tensors[0].device, given, "the first tensor")
            or torch_errors.inference_error(error, given, "task_loss")
        )

    def names(self) -> list[str]:
        """What a caller would call the tensors."""
        paths = tree.paths(self.structure)
        return [f"args{path}" for path, leaf in zip(paths, self.leaves, strict=True) if isinstance(leaf, Tensor)]

    def others(self) -> Given:
        """What the function is given besides the tensors."""
        pairs = zip(tree.paths(self.structure), self.leaves, strict=True)
        return Given({f"args{path}": leaf for path, leaf in pairs if not isinstance(leaf, Tensor)})

    def _of_one(self, *tensors: Tensor) -> Any:
        now = iter(tensors)
        leaves = [next(now) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args = tree.unflatten(self.structure, leaves)
        try:
            loss = self.task_loss(*args)
        except (RuntimeError, TypeError) as error:
            named = self._named(error, len(args))
            if named is None or isinstance(error, DiffoptError):
                raise
            raise named from error
        besides: Sequence[Tensor] = ()
        if self.aux is not None:
            if not isinstance(loss, tuple) or len(loss) != 2:
                raise LossError(f"has_aux=True: task_loss returned {tree.describe(loss)}", "a pair (loss, aux)", "")
            loss, besides = loss[0], self.aux.form.leaves(loss[1], tensors[0])
        if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.is_floating_point():
            raise LossError(
                f"task_loss returned {tree.describe(loss)}", "one floating scalar tensor", hints.for_loss(loss)
            )
        return loss if self.aux is None else (loss, *besides)


def mean(call: Call) -> Tensor:
    """The mean of the losses of all tasks."""
    try:
        result: Tensor = transforms.apply(_Mean, call, *(x for x in call.leaves if isinstance(x, Tensor)))
    except RuntimeError as error:
        if isinstance(error, DiffoptError) or not torch_errors.is_in_place(error):
            raise
        raise InPlaceError("task_loss changes what it was given in place", *_AS_IT_WAS) from error
    return result


class _Mean(torch.autograd.Function):
    """The mean, of which each chunk is differentiated as soon as it has been evaluated."""

    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Tensor) -> Tensor:
        wanted = [i for i, need in enumerate(call.wanted) if need]
        # see NOTE [sums in single precision]
        grads = [torch.zeros_like(tensors[i], dtype=_wide(tensors[i].dtype)) for i in wanted]
        versions = [transforms.version(x) for x in tensors] if call.check else []
        device, dtype, mean = tensors[0].device, tensors[0].dtype, None
        before = random_state.snapshot(device) if call.randomness == "same" else None
        for start in range(0, call.size, call.chunk):
            count = min(call.chunk, call.size - start)
            with random_state.replayed(before if start else None, device):
                share, found, dtype, scale = _of_chunk(call, tensors, wanted, start, count)
            if versions:
                _refuse_changes(call, tensors, versions)
            for i, held, term in zip(wanted, grads, found, strict=True):
                dim = call.tensor_dims[i]
                if term is not None:
                    (held if dim is None else held.narrow(dim, start, count)).add_(term, alpha=scale)
            mean = share if mean is None else mean + share
        ctx.wanted = wanted
        ctx.save_for_backward(*grads, *(tensors[i] for i in wanted))
        assert mean is not None
        return mean.to(dtype)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        terms: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if ctx.wanted:
            products = transforms.apply(_Products, cotangents[0], *ctx.saved_tensors)
            for i, term in zip(ctx.wanted, products, strict=True):
                terms[i + 1] = term
        return tuple(terms)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise torch_errors.forward_mode_error("an argument of mean_over_tasks")


def _of_chunk(
    call: Call, tensors: Sequence[Tensor], wanted: Sequence[int], start: int, count: int
) -> tuple[Tensor, Sequence[Tensor | None], torch.dtype, float]:
    """One chunk's share of the mean, its gradients by the wanted tensors, the losses' dtype, and a factor to come.

    # NOTE [the share is differentiated, not the mean of a chunk]
    An estimator that does not look at the outer loss (Reptile) takes no factor that comes later. Only float16 gets it
    later: there the gradients are those of a chunk's mean, of the size of one task's, which it can hold.
    """
    parts = [
        x.detach() if dim is None else x.detach().narrow(dim, start, count)
        for x, dim in zip(tensors, call.tensor_dims, strict=True)
    ]
    with torch.set_grad_enabled(bool(wanted) or call.watched):
        # one root more than is wanted: what is captured is older than a root
        roots = derivatives.make_roots([*(parts[i] for i in wanted), torch.empty(0, device=tensors[0].device)])
        for i, root in zip(wanted, roots, strict=False):
            parts[i] = root
        with transforms.tangents_seen() if call.check and transforms.in_dual_level() else nullcontext():
            losses = call.losses(parts, count)
            if transforms.has_tangent([losses]):
                raise torch_errors.forward_mode_error("task_loss reads a tensor that")
        weight, wide = count / call.size, _wide(losses.dtype)
        scale = weight if losses.dtype is torch.float16 else 1.0
        share = losses.to(wide).mean() * (weight / scale)
        if call.watched and share.requires_grad:
            nodes = autograd_graph.captured_nodes([autograd_graph.GraphPart.of(share, roots)])
            refuse_captures("task_loss", [call.task_loss, call.others()], nodes)
        found = derivatives.gradient(share, roots[:-1], differentiable=False) if wanted else ()
    return scale * share.detach(), found, losses.dtype, scale


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


_AS_IT_WAS = ("it to stay as it was", "write x = x + y for x += y, x.add(y) for x.add_(y); no out=")


def _refuse_changes(call: Call, tensors: Sequence[Tensor], versions: Sequence[int]) -> None:
    for name, x, version in zip(call.names(), tensors, versions, strict=True):
        if transforms.version(x) != version:
            raise InPlaceError(f"task_loss has changed {name} in place", *_AS_IT_WAS)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cotangent: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        # the second half, what the gradients are of, is there so that a second derivative comes by here
        half = len(tensors) // 2
        return tuple((g * cotangent).to(x.dtype) for g, x in zip(tensors[:half], tensors[half:], strict=True))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        raise SecondDerivativeError(
            "the gradient of mean_over_tasks is being differentiated again",
            "once",
            "it has been summed up; for second derivatives use torch.func.vmap(task_loss)(...).mean() and "
            "estimator=Unrolled()",
        )
