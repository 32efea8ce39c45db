"""A vector field in the place of an inner loss: its value is the field's norm, its gradient is the field itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from diffopt.errors import DeviceError, DisconnectedError, DtypeError, LossError, ShapeError, StructureError
from diffopt.tensors import autograd_graph, transforms, tree
from diffopt.tensors.arguments import check_function
from diffopt.tensors.usable import refuse_unusable


@final
@dataclass(frozen=True)
class VectorField:
    r"""A vector field to descend along, in the place of a loss: ``v(params, *args)`` is used where the gradient is.

    .. math:: s_{t+1} = \Phi_t(s_t) = U(s_t, v(params_t, *args); \eta)

    For what no loss is behind: games, temporal differences, sharpness-aware steps, fixed points, roots. Taken by
    :func:`diffopt.solve`, :func:`diffopt.implicit`, :func:`diffopt.implicit_gradients` and :func:`diffopt.check`. The
    field's Jacobian :math:`V = \partial v/\partial params` need not be symmetric, and no estimator takes it to be:
    adjoints go through :math:`V^\top`, tangents through :math:`V`. Derivations, section 6.7.

    What is reported as the loss (``solution.losses``) is the field's norm, and has no derivative.

    .. note::
        A gradient in ``v`` has to be differentiable itself: write ``torch.func.grad(f)(params)``, which also runs under
        the vmap of a batch of tasks, or ``torch.autograd.grad(f(params), params, create_graph=True)``, which does not.
        Of batch norm under vmap the first has a wrong derivative (torch's); :func:`diffopt.game` has a right one.

    Args:
        v: ``v(params, *args)``, with ``batches`` ``v(params, *args, batch)``; returns a tree like ``params``.

    Raises:
        LossError: ``v`` is not a function; and, where it is evaluated:
        StructureError, ShapeError, DtypeError, DeviceError: it does not return a tree like ``params``.
        DisconnectedError: it does not depend on ``params``, or an entry of it is cut off from everything.

    Example:
        Two players of ``x * y``, who turn around the origin: the Jacobian is ``[[0, 1], [-1, 0]]``.

        >>> import torch, diffopt
        >>> turning = diffopt.VectorField(lambda players: (players[1], -players[0]))
        >>> x, y = torch.tensor(1.0, requires_grad=True), torch.tensor(0.0, requires_grad=True)
        >>> solution = diffopt.solve(turning, (x, y), optimizer=diffopt.SGD(0.1), steps=1)
        >>> solution.losses
        tensor([1.])
        >>> torch.autograd.grad(solution.params[1], (x, y))
        (tensor(0.1000), tensor(1.))
    """

    v: Callable[..., Any]

    def __post_init__(self) -> None:
        """Check that there is a function."""
        check_function("v", self.v, "a function v(params, *args)", LossError)

    def __call__(self, params: Any, *args: Any) -> Tensor:
        """The field's norm, whose gradient in ``params`` is the field."""
        value = self.v(params, *args)
        leaves, structure = tree.flatten(params)
        return norm(leaves, leaves_like_params(value, leaves, structure))


def as_written(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The function that the caller wrote: a field's ``v``, or the loss itself."""
    return loss.v if isinstance(loss, VectorField) else loss


def norm(params: Sequence[Tensor], field: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of ``field``, as a function whose gradient in ``params`` is ``field``."""
    value: Tensor = transforms.apply(_Norm, _Shape(0, len(params)), *params, *field)
    return value


class _Shape(NamedTuple):
    """How many leading axes are independent problems, and how many tensors are params."""

    axes: int
    params: int


class _Norm(torch.autograd.Function):
    """``(params, field) -> |field|``, as if ``field`` were the gradient in ``params``.

    # NOTE [a field as a gradient]
    An estimator takes the gradient of a loss, ``g``, with its graph, and pulls vectors back through it. So nothing else
    has to know of fields: this function's backward pass returns ``field`` as it was given, graph and all, and the
    second derivative goes through that graph, to params and to whatever else the field reads. To ``field`` itself the
    first derivative hands nothing: the norm is reported, not minimised.
    """

    @staticmethod
    def forward(shape: _Shape, *tensors: Tensor) -> Tensor:
        parts = [_norm(x, shape.axes) for x in tensors[shape.params :]]
        return parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts), dim=0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.shape, ctx.like = inputs[0], (output.shape, output.dtype, output.device)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1 + ctx.shape.params :])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        (cotangent,) = cotangents
        field, axes = ctx.saved_tensors, ctx.shape.axes
        if cotangent is None:
            return (None,) * (1 + 2 * len(field))
        weights = [cotangent.reshape((*cotangent.shape, *(1,) * (x.ndim - axes))).to(x.dtype) for x in field]
        return (None, *(w * x for w, x in zip(weights, field, strict=True)), *(None,) * len(field))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        shape, dtype, device = ctx.like
        return torch.zeros(shape, dtype=dtype, device=device)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        shape, *tensors = args
        stacked, _ = transforms.stacked(tensors, in_dims[1:], info.batch_size, set(range(len(tensors))))
        return transforms.apply(_Norm, shape._replace(axes=shape.axes + 1), *stacked), 0


def _norm(x: Tensor, axes: int) -> Tensor:
    """The norm of each problem's entries, in single precision at least, whose squares do not overflow."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    squares = dtype if x.device.type == "mps" else torch.float64  # (which has no double precision)
    found: Tensor = torch.linalg.vector_norm(x.detach().reshape(*x.shape[:axes], -1), dim=-1, dtype=squares)
    return found.to(dtype)


# --------------------------------------------------------------------------------------- what is not a field


def leaves_like_params(
    value: Any, params: Sequence[Tensor], structure: tree.Structure, what: str = "the vector field", name: str = "v"
) -> list[Tensor]:
    """The leaves of a field's value (or a map's), which has to be a tree like ``params``."""
    leaves, found = tree.flatten(value)
    if found != structure:
        odd = tree.differences(name, value, structure)
        raise StructureError(
            f"{what} returned {tree.describe(value)}",
            f"a tree with the structure of params: {', '.join(odd[:2]) or 'other kinds of branches'}",
            "take [0] of what torch.autograd.grad returns for one tensor"
            if isinstance(value, tuple) and len(value) == len(params) == 1
            else "return one entry for each of params, in the same dicts, tuples and lists",
        )
    paths = tree.paths(structure)
    return [_like(x, p, f"{what}'s entry {name}{at}", at) for at, x, p in zip(paths, leaves, params, strict=True)]


def _like(x: Any, param: Tensor, where: str, path: str) -> Tensor:
    """One leaf of a field, which has to look like the param that it moves."""
    if not isinstance(x, Tensor):
        raise StructureError(f"{where} is {tree.describe(x)}", f"a tensor like params{path}", "return torch tensors")
    refuse_unusable(x, lambda: where)
    if x.shape != param.shape:
        raise ShapeError(
            f"{where} has shape {tuple(x.shape)}",
            f"{tuple(param.shape)} as params{path}",
            "check for a missing sum or mean; what is the same for all entries: .expand_as(...)",
        )
    if x.device != param.device:
        raise DeviceError(f"{where} is on {x.device}", f"{param.device} as params{path}", "move it with .to()")
    if x.dtype == param.dtype:
        return x
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
        return x.to(param.dtype)  # as a gradient comes back
    raise DtypeError(
        f"{where} is {x.dtype}", f"{param.dtype} as params{path}", f"convert it with .to(params{path}.dtype)"
    )


def refuse_constant(
    losses: Tensor, params: Sequence[Tensor], grads: Sequence[Tensor | None], names: Sequence[str]
) -> None:
    """Refuse a field, by the graph of its norm, that does not depend on ``params``, or of which an entry is cut off.

    # NOTE [an entry that nothing leads to]
    Most often it is a gradient that was taken without ``create_graph=True``, and its derivative would be zero without a
    word. One that is zero (of a param that stays where it is) is let through.
    """
    node = next(_field_nodes(losses), None)
    if node is None:  # under a transform, where there is no graph of autograd's to look at
        return
    entries = [parent for parent, _ in node.next_functions][node.shape.params :]
    cut = [i for i, entry in enumerate(entries) if entry is None]
    nonzero = [i for i in cut if grads[i] is not None and bool(transforms.plain(grads[i]).any())]  # type: ignore[arg-type]
    given, leaves = {x.grad_fn for x in params} - {None}, {id(x) for x in params if x.grad_fn is None}
    depends = any(
        behind in given or id(getattr(behind, "variable", None)) in leaves for behind in autograd_graph.nodes(entries)
    )
    if not depends or nonzero:
        what = f"entry {names[nonzero[0]].replace('params', 'v', 1)}" if depends else "value"
        raise DisconnectedError(
            f"the vector field's {what} does not depend on {'anything' if depends else 'params'}",
            "a graph to differentiate",
            "take gradients in it by torch.func.grad or with create_graph=True, and detach nothing; what is meant to "
            "be a constant: add 0 * params to it",
        )


def entries_behind(losses: Tensor) -> list[Tensor]:
    """The entries, with their graph, of the field whose norm was taken last; none if there is no field."""
    node = next(_field_nodes(losses), None)
    return [] if node is None else list(node.saved_tensors)


def stands_behind(losses: Tensor) -> bool:
    """Whether the gradient of these losses is, in part, a vector field, whose Jacobian need not be symmetric."""
    return next(_field_nodes(losses), None) is not None


def _field_nodes(losses: Tensor) -> Iterator[Any]:
    """The nodes of a graph that a field's norm has made, the last first."""
    backward = _Norm._backward_cls  # type: ignore[attr-defined, unused-ignore]
    return (node for node in autograd_graph.nodes([losses.grad_fn]) if type(node) is backward)
