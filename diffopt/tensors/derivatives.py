"""Derivatives of one step, each in the one form that is right for every layer.

# NOTE [the one form of second derivative]
Second derivatives are taken by ``torch.autograd.grad`` twice, over a forward pass that is vmapped when tasks are
stacked. The other forms each fail somewhere: vmap over a vjp of a gradient raises for norm layers, a gradient of a
jvp is silently wrong for them, and vmap over ``torch.func.grad`` differentiated from outside is silently wrong for
affine batch norm. So functorch is used here for one thing only: to batch a *forward* pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from diffopt.errors import DiffoptError
from diffopt.tensors import autograd_graph, transforms
from diffopt.tensors.torch_errors import (
    changed_in_place,
    is_in_place,
    is_missing_derivative,
    missing_derivative,
    vmap_error,
)


class Autocast:
    """The state of autocast at one place, to be entered again at another."""

    def __init__(self, device: torch.device) -> None:
        """Take the present state."""
        self._device = device.type
        self._enabled = torch.is_autocast_enabled(self._device)
        self._dtype = torch.get_autocast_dtype(self._device)

    @property
    def eps(self) -> float:
        """The precision that it lowers a computation to; 0: it does not."""
        return torch.finfo(self._dtype).eps if self._enabled else 0.0

    def entered(self) -> torch.autocast:
        """A context in which autocast is as it was."""
        return torch.autocast(self._device, dtype=self._dtype, enabled=self._enabled, cache_enabled=False)


@contextmanager
def named_in_place_changes() -> Iterator[None]:
    """Say what is wrong where a loss or an update changes its inputs in place."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, DiffoptError) or not is_in_place(error):
            raise
        raise changed_in_place() from error


class Graph:
    """A recorded graph between some inputs and outputs, held by its edges only.

    No tensor is kept alive except what the graph saved for itself.
    """

    __slots__ = ("_inputs", "_outputs")

    def __init__(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Hold the edges of the inputs, roots or leaves, and of each output that depends on one of them.

        A leaf, which its edge keeps alive, is held itself, for its edge takes long to find.
        """
        pairs = [(x, x.grad_fn) for x in inputs]
        self._inputs = [x if node is None else GradientEdge(node, x.output_nr) for x, node in pairs]
        self._outputs = _edges(outputs)

    @staticmethod
    def record(
        function: Callable[[tuple[Tensor, ...]], Sequence[Tensor]], inputs: Sequence[Tensor], *, check: bool = False
    ) -> Graph:
        """The graph of ``function``, evaluated on fresh aliases of ``inputs``.

        ``check`` looks for operations whose derivative was declared missing, which autograd would pass over silently.
        """
        with torch.enable_grad():
            roots = make_roots(inputs)
            outputs = function(roots)
            if check:
                autograd_graph.refuse_broken_graph([out.grad_fn for out in outputs])
            return Graph(roots, outputs)

    def nodes(self) -> list[Any]:
        """The graph's last nodes."""
        return [edge.node for edge in self._outputs if edge is not None]

    def pullback(
        self, cotangents: Sequence[Tensor | None], wanted: Sequence[int], *, retain: bool = False
    ) -> list[Tensor | None]:
        """The vector-Jacobian product for the inputs numbered ``wanted``; ``None`` where nothing depends on one.

        A cotangent that is ``None`` is zero.
        """
        pairs = [
            (edge, c) for edge, c in zip(self._outputs, cotangents, strict=True) if edge is not None and c is not None
        ]
        if not pairs or not wanted:
            return [None] * len(wanted)
        edges, weights = zip(*pairs, strict=True)
        inputs = [self._inputs[i] for i in wanted]
        try:
            return list(_run(edges, inputs, weights, retain=retain))
        except RuntimeError as error:
            raise _named(error) from error

    def product(
        self, outputs: Sequence[int], wanted: Sequence[int]
    ) -> Callable[[Sequence[Tensor]], Sequence[Tensor | None]]:
        """:meth:`pullback` of the cotangents of some outputs, the others' being zero, to be called many times."""
        found = [(place, self._outputs[number]) for place, number in enumerate(outputs)]
        places, edges = [place for place, edge in found if edge is not None], [edge for _, edge in found if edge]
        inputs = tuple([self._inputs[i] for i in wanted])

        def pull(cotangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
            if not edges or not inputs:
                return [None] * len(inputs)
            try:
                return _run(edges, inputs, [cotangents[i] for i in places], retain=True)
            except RuntimeError as error:
                raise _named(error) from error

        return pull


def _edges(tensors: Sequence[Tensor]) -> list[GradientEdge | None]:
    """The edge that leads to each tensor, ``None`` where no gradient does.

    (``get_gradient_edge`` looks at more than is needed where a tensor is no leaf.)
    """
    pairs = [(x, x.grad_fn) for x in tensors]
    return [
        GradientEdge(node, x.output_nr) if node is not None else get_gradient_edge(x) if x.requires_grad else None
        for x, node in pairs
    ]


class _Roots(torch.autograd.Function):
    """The identity, as a graph node that saves nothing: unlike a leaf, it does not keep its tensor alive."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple([tensor.view_as(tensor) for tensor in tensors])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *cotangents)


def make_roots(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Detached aliases of the tensors from which a new graph grows."""
    if not tensors:
        return ()
    anchor = torch.empty(0, requires_grad=True, device=tensors[0].device)
    return tuple(transforms.apply(_Roots, anchor, *[tensor.detach() for tensor in tensors]))


def make_leaves(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The same at a third of the cost, for tensors that may be kept alive."""
    return tuple([tensor.detach().requires_grad_() for tensor in tensors])


def is_root(node: Any) -> bool:
    """Whether a node of a graph was made by :func:`make_roots`."""
    return bool(node.name() == "_RootsBackward")


def join(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Aliases of the tensors that all stem from one node of the graph."""
    return tuple(transforms.apply(_Roots, torch.empty(0, device=tensors[0].device), *tensors))


def gradient(output: Tensor, inputs: Sequence[Tensor], *, differentiable: bool) -> tuple[Tensor | None, ...]:
    """The gradient of the sum of ``output``; ``None`` for inputs it does not depend on."""
    if not output.requires_grad:
        return (None,) * len(inputs)
    if differentiable and _COMPILED in sys.modules and _anything_compiled():
        _refuse_compiled(output, inputs)
    try:
        ones = torch.ones_like(output, memory_format=torch.preserve_format)
        return _run((output,), inputs, (ones,), retain=differentiable, differentiable=differentiable)
    except RuntimeError as error:
        raise _named(error) from error


def _run(
    outputs: Sequence[Any],
    inputs: Sequence[Any],
    weights: Sequence[Tensor],
    *,
    retain: bool,
    differentiable: bool = False,
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad``, past the checks of its arguments, which cost as much as the gradient of a small loss."""
    engine: Any = torch.autograd.Variable._execution_engine
    found: tuple[Tensor | None, ...] = engine.run_backward(
        tuple(outputs), tuple(weights), retain, differentiable, tuple(inputs), True, accumulate_grad=False
    )
    return found


_COMPILED = "torch._functorch._aot_autograd.runtime_wrappers"
_counter: Any = getattr(torch.autograd.function, "AUTOGRAD_FUNCTION_COUNTER", None)
_seen = ("", False)
"""How many classes of autograd functions there had been when they were last looked at; was any of the compiler's?"""


def _anything_compiled() -> bool:
    """Whether ``torch.compile`` has made something with a gradient, which is a class of autograd functions each time.

    (Its modules are loaded by ``torch.func.grad`` too: to walk over every graph from then on is a twentieth of a step.)
    """
    global _seen
    count = repr(_counter)  # the one way to read a counter that does not move it
    if count != _seen[0] or _counter is None:
        made = any([kind.__name__ == "CompiledFunction" for kind in torch.autograd.Function.__subclasses__()])
        _seen = count, made
    return _seen[1]


def _refuse_compiled(output: Tensor, inputs: Sequence[Tensor]) -> None:
    """Refuse an output that depends on an input through what ``torch.compile`` has made.

    The gradient of that has no second derivative. Torch says so only if something that its backward pass is given
    requires grad; else it is a constant, and a silent wrong number.
    """
    graph = autograd_graph.nodes([output.grad_fn], {x.grad_fn for x in inputs})
    compiled = [node for node in graph if type(node).__name__ == "CompiledFunctionBackward"]
    edges = {(edge.node, edge.output_nr) for edge in map(get_gradient_edge, inputs)} if compiled else set()
    if any(_leads_to(node, edges) for node in compiled):
        raise missing_derivative("torch.compile with aot_autograd does not support double backward")


def _leads_to(node: Any, edges: set[tuple[Any, int]]) -> bool:
    """Whether a node passes a gradient on to any of these edges."""
    seen, pending = {None}, [node]
    while pending:
        for edge in pending.pop().next_functions:
            if edge in edges:
                return True
            if edge[0] not in seen:
                seen.add(edge[0])
                pending.append(edge[0])
    return False


@contextmanager
def named_missing_derivatives() -> Iterator[None]:
    """Say what to do about an operation of which torch has no second derivative."""
    try:
        yield
    except RuntimeError as error:
        named = _named(error)
        if named is error:
            raise
        raise named from error


def _named(error: RuntimeError) -> Exception:
    """The error to be raised in place of one of autograd's; itself, if there is none."""
    if isinstance(error, DiffoptError):
        return error
    if "escaped from inside a function being vmapped" in str(error):
        return cast("DiffoptError", vmap_error(error))
    return missing_derivative(str(error).partition("\n")[0]) if is_missing_derivative(error) else error


def filled(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors as they are, with zeros in place of ``None``; the same object if there is none."""
    if all([t is not None for t in tensors]):
        return cast("tuple[Tensor, ...]", tensors)
    return tuple([torch.zeros_like(x) if t is None else t for t, x in zip(tensors, like, strict=True)])


def or_zeros(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors, detached, with zeros in place of ``None``."""
    return tuple([torch.zeros_like(x) if t is None else t.detach() for t, x in zip(tensors, like, strict=True)])


def pullback(
    outputs: Sequence[Tensor | None], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], *, retain: bool = False
) -> tuple[Tensor, ...]:
    """The vector-Jacobian product of recorded outputs; ``None`` among them is a constant zero."""
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o is not None and o.requires_grad]
    if not pairs:
        return or_zeros([None] * len(inputs), inputs)
    with named_missing_derivatives():
        values, weights = zip(*pairs, strict=True)
        found = torch.autograd.grad(values, inputs, weights, allow_unused=True, retain_graph=retain)
    return or_zeros(found, inputs)


def pushforward(
    outputs: Sequence[Tensor | None], inputs: Sequence[Tensor], tangents: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The Jacobian-vector product of recorded outputs, by differentiating the (linear) vector-Jacobian product.

    ``None`` of an output that does not depend on the inputs.
    """
    moving = [out for out in outputs if out is not None and out.requires_grad]
    if not moving:
        return (None,) * len(outputs)
    weights = [torch.zeros_like(out, requires_grad=True) for out in moving]
    with named_missing_derivatives():
        products = torch.autograd.grad(moving, inputs, weights, create_graph=True, allow_unused=True)
        pairs = [(p, t) for p, t in zip(products, tangents, strict=True) if p is not None and p.requires_grad]
        if not pairs:
            return (None,) * len(outputs)
        found = torch.autograd.grad([p for p, _ in pairs], weights, [t for _, t in pairs], allow_unused=True)
    rates = dict(zip(map(id, moving), or_zeros(found, moving), strict=True))
    return tuple([rates.get(id(out)) for out in outputs])


def jvp(
    function: Callable[[tuple[Tensor, ...]], Sequence[Tensor]],
    inputs: Sequence[Tensor],
    tangents: Sequence[Tensor],
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Value and Jacobian-vector product of a function."""
    with torch.enable_grad():
        roots = make_roots(inputs)
        outputs = tuple(function(roots))
        rates = pushforward(outputs, roots, tangents)
    return tuple(o.detach() for o in outputs), filled(rates, outputs)
