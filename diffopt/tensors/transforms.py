"""What is done with ``torch.func``'s transforms: batching a forward pass, and running below the caller's transforms.

The only caller of them. They are used for one thing: to batch a *forward* pass (see ``derivatives.py``, NOTE [the one
form of second derivative]); and, where the caller runs under a transform that records, to differentiate once under it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor

_forward_ad: Any = torch.autograd.forward_ad
_functorch: Any = torch._C._functorch  # type: ignore[attr-defined, unused-ignore]  # pyright: ignore


current_level: Callable[[], int | None] = _functorch.maybe_current_level
"""The number of the innermost running ``torch.func`` transform; ``None``: there is none."""


def transforms_active() -> bool:
    """Whether the caller runs inside a ``torch.func`` transform."""
    return current_level() is not None


def transform_level() -> int:
    """How many ``torch.func`` transforms are running around the caller."""
    return _functorch.maybe_current_level() or 0


def has_tangent(tensors: Sequence[Tensor]) -> bool:
    """Whether any tensor carries a tangent of plain forward-mode differentiation."""
    return in_dual_level() and any(_forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def in_dual_level() -> bool:
    """Whether the caller runs in plain forward-mode differentiation."""
    return bool(_forward_ad._current_level >= 0) and not transforms_active()


@contextmanager
def tangents_seen() -> Iterator[None]:
    """Let operations pass tangents on, which they do not inside a custom autograd function."""
    with _forward_ad._set_fwd_grad_enabled(True):
        yield


Function = TypeVar("Function", bound=Callable[..., Any])


def outside_compile(function: Function) -> Function:
    """``function``, which ``torch.compile`` breaks its graph at and runs as it is; nothing changes where none traces.

    (``torch.compiler.disable`` at once would import the compiler, which takes seconds.)
    """
    disabled: Any = None

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if disabled is None:
            disable: Any = torch.compiler.disable
            disabled = disable(function)
        return disabled(*args, **kwargs)

    called._torchdynamo_disable = True  # type: ignore[attr-defined]
    return cast("Function", called)


def register_branch(kind: type[Any], taken_apart: Callable[..., Any], made: Callable[..., Any]) -> None:
    """Make a class a branch of the trees that transforms take and return."""
    pytree.register_pytree_node(kind, taken_apart, made, serialized_type_name=f"{kind.__module__}.{kind.__name__}")


def flattened(values: Any) -> tuple[list[Any], Any]:
    """The leaves of what a module takes or returns, and its form; classes of other libraries that torch knows count."""
    return pytree.tree_flatten(values)


def rebuilt(leaves: Sequence[Any], form: Any) -> Any:
    """What has these leaves and this form."""
    return pytree.tree_unflatten(leaves, form)


def applying(function: type[torch.autograd.Function], first: Any, *tensors: Any) -> Callable[[], Any]:
    """What ``function.apply(first, *tensors)`` does, past the inspection of signatures where no transform runs."""
    if current_level() is not None:
        return functools.partial(function.apply, first, *tensors)
    plain: Any = super(torch.autograd.Function, function)
    alive = [_functorch.unwrap_if_dead(x) if isinstance(x, Tensor) else x for x in tensors]  # of what has ended
    return functools.partial(plain.apply, first, *alive)


def apply(function: type[torch.autograd.Function], first: Any, *tensors: Any) -> Any:
    """``function.apply(first, *tensors)``; see :func:`applying`."""
    return applying(function, first, *tensors)()


class Vmap(NamedTuple):
    """A running ``vmap``: its number of tasks, and what it says of random numbers."""

    batch_size: int
    randomness: str


def innermost_vmap() -> Vmap | None:
    """The innermost running transform if it is a ``vmap``, else ``None``."""
    if not transforms_active():
        return None
    interpreter = _functorch.peek_interpreter_stack()
    if interpreter.key() != _functorch.TransformType.Vmap:
        return None
    vmap = _functorch.CVmapInterpreterPtr(interpreter)
    return Vmap(int(vmap.batchSize()), str(vmap.randomness().name).lower())


def inside_vmap() -> bool:
    """Whether any of the transforms that are running is a vmap."""
    layers = _functorch.get_interpreter_stack() or []
    return any(layer.key() == _functorch.TransformType.Vmap for layer in layers)


def differentiating_levels() -> range:
    """The numbers of the transforms that are running, if any of them differentiates; else none."""
    layers = _functorch.get_interpreter_stack() or []
    vmaps = [layer.key() == _functorch.TransformType.Vmap for layer in layers]
    return range(0) if all(vmaps) else range(1, transform_level() + 1)


def vmap(
    function: Callable[..., Any], dims: Sequence[Sequence[int | None]], sizes: Sequence[int], modes: Sequence[str]
) -> Callable[..., Any]:
    """``function`` of tensors, vmapped once per entry of ``dims``, the last entry outermost.

    Args:
        function: returns a tensor or a tuple of tensors.
        dims: for each vmap and each argument, 0 or ``None``.
        sizes: for each vmap, its number of tasks.
        modes: for each vmap, what it says of random numbers.
    """
    for in_dims, size, mode in zip(dims, sizes, modes, strict=True):
        function = functools.partial(_vmapped, function, tuple(in_dims), size, mode)
    return function


def _vmapped(function: Callable[..., Any], dims: tuple[int | None, ...], size: int, mode: str, *tensors: Tensor) -> Any:
    """``torch.func.vmap`` without its pytrees, which cost as much as a small loss."""
    _load_decompositions()
    level = _functorch._vmap_increment_nesting(size, mode)
    try:
        pairs = zip(tensors, dims, strict=True)
        outputs = function(*[x if dim is None else _functorch._add_batch_dim(x, dim, level) for x, dim in pairs])
        if isinstance(outputs, Tensor):
            return _functorch._remove_batch_dim(outputs, level, size, 0)
        return tuple([_functorch._remove_batch_dim(output, level, size, 0) for output in outputs])
    finally:
        _functorch._vmap_decrement_nesting()


@functools.cache
def _load_decompositions() -> None:
    """Let torch register what it registers before its own first vmap."""
    torch.func.vmap(lambda x: x)(torch.zeros(1))


def functional_call(
    module: torch.nn.Module, tensors: dict[str, Tensor], inputs: tuple[Any, ...], named_inputs: dict[str, Any]
) -> Any:
    """A module called with these in place of its own parameters and buffers; tied ones are given by one name."""
    return torch.func.functional_call(module, tensors, inputs, named_inputs)


def functional_gradient(
    function: Callable[..., tuple[Tensor, ...]], params: tuple[Tensor, ...]
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...]]:
    """The gradient of the sum of a function's first values, and all its values; differentiable under any transform.

    All gradients are ``None`` if the values do not depend on ``params``, for which ``torch.func`` would give zeros.
    """
    depends = False

    def total(leaves: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        nonlocal depends
        values = function(*leaves)
        tracked = values[0].requires_grad and _functorch.is_gradtrackingtensor(values[0])
        depends = tracked and _functorch.maybe_get_level(values[0]) == transform_level()
        return values[0].sum(), tuple(values)

    gradients, values = torch.func.grad(total, has_aux=True)(params)
    return tuple(gradients) if depends else (None,) * len(params), values


def grads_batched() -> int:
    """How many of torch's old vmaps are running, of which ``autograd.grad(is_grads_batched=True)`` makes one."""
    level = int(torch._C._vmapmode_increment_nesting())  # type: ignore[attr-defined, unused-ignore]
    torch._C._vmapmode_decrement_nesting()  # type: ignore[attr-defined, unused-ignore]
    return level - 1


def over_batched_grads(
    function: Callable[..., tuple[Tensor, ...]], cotangents: Sequence[Tensor], level: int
) -> tuple[Tensor, ...]:
    """``function(*cotangents)`` of cotangents that the old vmap number ``level`` has batched, by the new one."""
    old: Any = torch
    rows = [old._remove_batch_dim(c, level, 1, 0) for c in cotangents]
    size = max(len(row) for row in rows)
    stacked = [row if len(row) == size else row.expand(size, *row.shape[1:]) for row in rows]
    for _ in range(level):  # the old vmap, which allows no random numbers, has no part in what follows
        torch._C._vmapmode_decrement_nesting()  # type: ignore[attr-defined, unused-ignore]
    try:
        results = torch.func.vmap(function, randomness="different")(*stacked)
    finally:
        for _ in range(level):
            torch._C._vmapmode_increment_nesting()  # type: ignore[attr-defined, unused-ignore]
    return tuple(old._add_batch_dim(result, 0, level) for result in results)


def are_batched(tensors: Sequence[Tensor]) -> bool:
    """Whether the innermost transform, which is a ``vmap``, has batched any of these tensors."""
    level = transform_level()
    return any(_functorch._unwrap_batched(_functorch.unwrap_if_dead(x), level)[1] is not None for x in tensors)


def below_vmap(
    function: Callable[[Vmap, tuple[int | None, ...], list[Tensor]], tuple[Tensor, ...]],
    vmap: Vmap,
    tensors: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Call ``function(vmap, in_dims, tensors)`` outside the innermost transform, which is that ``vmap``.

    Its outputs are batched along axis 0 if any tensor is, else shared. They are recorded by whatever records there.
    (torch's own way, the vmap rule of an autograd function, costs as much as a step of a small problem.)
    """
    level = transform_level()
    pairs = [_functorch._unwrap_batched(_functorch.unwrap_if_dead(x), level) for x in tensors]
    dims = tuple([dim for _, dim in pairs])
    layer = _functorch.pop_dynamic_layer_stack()
    try:
        outputs = function(vmap, dims, [x for x, _ in pairs])
    finally:
        _functorch.push_dynamic_layer_stack(layer)
    if all([dim is None for dim in dims]):
        return outputs
    return tuple([_functorch._add_batch_dim(x, 0, level) for x in outputs])


@contextmanager
def below_all() -> Iterator[None]:
    """Run outside all transforms that are running."""
    layers: list[Any] = []
    try:
        while transforms_active():
            layers.append(_functorch.pop_dynamic_layer_stack())
        yield
    finally:
        for popped in reversed(layers):
            _functorch.push_dynamic_layer_stack(popped)


def stacked(
    tensors: Sequence[Tensor], dims: Sequence[int | None], size: int, own: frozenset[int] | set[int]
) -> tuple[list[Tensor], tuple[int | None, ...]]:
    """Batch axes to the front; the tensors numbered in ``own`` get one even if the tasks share them."""
    stacked, new_dims = list(tensors), [None if dim is None else 0 for dim in dims]
    for i, (tensor, dim) in enumerate(zip(tensors, dims, strict=True)):
        if dim is not None:
            stacked[i] = tensor.movedim(dim, 0) if dim else tensor
        elif i in own:
            stacked[i], new_dims[i] = tensor.expand(size, *tensor.shape), 0
    return stacked, tuple(new_dims)


def rows(tensors: Sequence[Tensor], dims: Sequence[int | None], size: int) -> list[list[Tensor]]:
    """What each task of a batch has of the tensors; those that the tasks share go to all."""
    columns = [[x] * size if dim is None else list(x.unbind(dim)) for x, dim in zip(tensors, dims, strict=True)]
    return [list(row) for row in zip(*columns, strict=True)]


def plain(tensor: Tensor) -> Tensor:
    """The tensor under all wrappers of ``torch.func``, to look at its values."""
    return unwrapped(tensor).detach()


is_wrapped: Callable[[Tensor], bool] = _functorch.is_functorch_wrapped_tensor
"""Whether a tensor is one of a ``torch.func`` transform."""


def has_escaped(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a vmap that has ended, unless another one runs now at the same depth."""
    while is_wrapped(tensor):
        if _functorch.is_batchedtensor(tensor) and _functorch.maybe_get_level(tensor) > transform_level():
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False


def is_inference(tensor: Tensor) -> bool:
    """Whether a tensor, or the one under all its wrappers, was made in ``torch.inference_mode``."""
    return bool(unwrapped(tensor).is_inference())


def storage(tensor: Tensor) -> int:
    """The address of the numbers of a tensor, under all wrappers of ``torch.func``; 0 if there are none."""
    try:
        return unwrapped(tensor).untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a sparse tensor, a zero of forward mode, a subclass that holds others
        return 0


def is_sparse(tensor: Tensor) -> bool:
    """Whether a tensor is of one of the sparse layouts, which have no views, and no rule of this library's."""
    return tensor.layout in _SPARSE


_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def version(tensor: Tensor) -> int:
    """How often a tensor has been written to, under all wrappers of ``torch.func``; -1 if nobody counts."""
    inner = unwrapped(tensor)
    if type(inner) is Tensor and not inner.is_inference():
        return inner._version
    return -1 if torch.nn.parameter.is_lazy(inner) or inner.is_inference() else inner._version


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor under all wrappers of ``torch.func``, itself if there are none."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


class WrappedTensorError(Exception):
    """A function has read a tensor that a transform it was taken out of had wrapped."""


def apart_from(levels: range, function: Callable[..., Any], *arguments: Any, marking: bool = False) -> Any:
    """Call ``function``, which returns tensors, and look whether a tensor wrapped at one of ``levels`` enters them.

    ``marking``: it runs under no vmap of its own, so that it may call ``requires_grad_()``.

    # NOTE [captured tensors under transforms]
    A loss runs below the transforms that its caller runs in: what it is given as an argument has been unwrapped, what
    it captured by closure has not. Such a tensor would get no hypergradient, or be matched with the wrong batch axis,
    without any error. So the function runs under as many empty vmaps as there are transforms to watch. No tensor of
    its own can then carry their level numbers, but whatever is computed from a captured batched tensor does, and one
    wrapped for differentiation is an internal error of torch's under a vmap.

    Raises:
        WrappedTensorError: one does.
    """
    if not levels:
        return function(*arguments)
    depth, allowed = 0, _functorch.get_inplace_requires_grad_allowed()
    try:
        _functorch.set_inplace_requires_grad_allowed(allowed or marking)
        for _ in levels:
            _functorch._vmap_increment_nesting(1, "same")
            depth += 1
        outputs = function(*arguments)
    except RuntimeError as error:
        if "INTERNAL ASSERT" not in str(error):
            raise
        raise WrappedTensorError from error
    finally:
        for _ in range(depth):
            _functorch._vmap_decrement_nesting()
        _functorch.set_inplace_requires_grad_allowed(allowed)
    if any(_functorch.maybe_get_level(tensor) in levels for tensor in _tensors(outputs)):
        raise WrappedTensorError
    return outputs


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif outputs is not None:
        for output in outputs:
            yield from _tensors(output)
