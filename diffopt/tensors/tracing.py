"""Tracing a whole computation into one graph; its loops: ``traced_loops.py``."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffopt.tensors.expected import Expected


class NotTraceableError(Exception):
    """Something cannot be part of one graph; the message says what."""


@final
class Trace:
    """What is noted while a computation is traced.

    Attributes:
        numbers: one for each group of tensors that must be finite: 0 if they are, else NaN.
        expected: what is expected of measures of estimates.
        excesses: by how much they are more, each one number.
        captured: tensors that the computation reads without being given them.
        inside: whether a step of a scan is being traced.
    """

    def __init__(self) -> None:
        """Nothing has been noted yet."""
        self.numbers: list[Tensor] = []
        self.captured: list[Tensor] = []
        self.expected: list[Expected] = []
        self.excesses: list[Tensor] = []
        self.inside = False
        self._standing_in: dict[int, Tensor] = {}
        self._rows: set[Any] = set()
        self._copies: dict[Any, Tensor] = {}

    def expect_finite(self, tensors: Sequence[Tensor]) -> None:
        """Note that all of these must be finite."""
        if self.inside:
            raise NotTraceableError("a solve within the loss of another")
        self.numbers += [(x - x).sum().double() for x in tensors if x.is_floating_point() and x.numel()]

    def expect(self, expected: Expected, measured: Tensor) -> None:
        """Note what is expected of some measures."""
        self.expected.append(expected)
        self.excesses.append(expected.excess(measured))

    def expect_true(self, condition: Tensor) -> None:
        """Note that a condition must hold, everywhere."""
        if self.inside:
            raise NotTraceableError("an implicit gradient within the loss of a solve")
        self.numbers.append(torch.where(condition.all(), 0.0, torch.nan).double())

    def unsound(self, like: Tensor) -> Tensor:
        """0 if all that had to be finite is, else NaN."""
        total = torch.zeros((), dtype=torch.float64, device=like.device)
        for number in self.numbers:
            total = total + number.to(like.device)
        return total

    def given(self, constant: Tensor) -> Tensor:
        """What stands, in the graph, for a tensor that has been captured."""
        if self.inside:  # of a step: it goes on as its own, until it comes out of all loops
            return constant
        tools = Tools()
        tracer = tools.proxies.get_proxy_mode().tracer
        if isinstance(constant, FakeTensor):
            if constant not in tracer.tensor_tracker:
                raise NotTraceableError("a step reads a tensor of which nothing is known")
            return constant
        if id(constant) not in self._standing_in:
            self._standing_in[id(constant)] = self._placed(constant, tools, tracer)
        return self._standing_in[id(constant)]

    def _placed(self, constant: Tensor, tools: Tools, tracer: Any) -> Tensor:
        mode = tools.fake_mode()
        with tools.proxies.disable_proxy_modes_tracing():
            found: Tensor = mode.from_tensor(in_order(constant), static_shapes=True)
        inputs = [node for node in tracer.graph.nodes if node.op == "placeholder"]
        with tracer.graph.inserting_after(inputs[-1]):
            proxy = tracer.create_proxy("placeholder", f"captured_{len(self.captured)}", (), {})
        tools.proxies.track_tensor_tree(found, proxy, constant=None, tracer=tracer)
        self.captured.append(constant)
        return found

    def mark_rows(self, rows: Sequence[Tensor]) -> None:
        """Note that these arguments of the body that is being traced are rows of something."""
        tracker = Tools().proxies.get_proxy_mode().tracer.tensor_tracker
        self._rows.update([tracker[x].proxy.node for x in rows])

    def readable(self, x: Tensor) -> Tensor:
        """A tensor as a loop may read it: itself if it is no view, else a copy, which is the same for all loops.

        (Of a view, however small, torch's C++ would free the handle at every step.)
        """
        tools = Tools()
        tracker = tools.proxies.get_proxy_mode().tracer.tensor_tracker
        if x not in tracker:  # captured within a step
            return copy_of(x)
        node = _source(tracker[x].proxy.node)
        given = node.op == "placeholder" and node not in self._rows
        stacked = node.target is operator.getitem and node.args[0].target is tools.scan
        if x.is_contiguous() and (given or stacked or node.target is torch.ops.aten.cat.default):
            return x
        if node not in self._copies:
            self._copies[node] = copy_of(x)
        return self._copies[node]

    @contextmanager
    def within_step(self, *, nested: bool) -> Iterator[None]:
        """While a step of a scan is traced, which may itself be part of a step if it is ``nested``."""
        if self.inside and not nested:
            raise NotTraceableError("a solve within the loss of another")
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before


_now: ContextVar[Trace | None] = ContextVar("trace", default=None)


def current() -> Trace | None:
    """The trace that is being made; ``None``: code runs as usual."""
    return _now.get()


def refuse(what: str) -> None:
    """Say, if a trace is being made, that something cannot be part of it."""
    if _now.get() is not None:
        raise NotTraceableError(what)


def holds(condition: Tensor) -> bool:
    """Whether a condition holds everywhere.

    In a trace it is taken to hold, and the program says whether it did: where not, the plain way is taken, and its
    errors and warnings are those that are given.
    """
    trace = _now.get()
    if trace is None:
        return bool(condition.all())
    trace.expect_true(condition)
    return True


@final
class Tools:
    """The modules of torch's that trace: they take a second to import."""

    def __init__(self) -> None:
        self.proxies: Any = importlib.import_module("torch.fx.experimental.proxy_tensor")
        self.scan: Any = importlib.import_module("torch._higher_order_ops.scan").scan_op
        self.while_loop: Any = importlib.import_module("torch._higher_order_ops.while_loop").while_loop_op

    def new_fake_mode(self) -> Any:
        """One whose tensors have shapes only, all of them fixed; a loop's counter, of which nothing is known, too."""
        shapes = importlib.import_module("torch.fx.experimental.symbolic_shapes").ShapeEnv(allow_scalar_outputs=True)
        return FakeTensorMode(shape_env=shapes, static_shapes=True, allow_non_fake_inputs=True)

    def fake_mode(self) -> Any:
        """The one that traces."""
        return importlib.import_module("torch._guards").detect_fake_mode()


def trace(
    function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor], noted: Trace | None = None
) -> tuple[Any, list[Tensor]]:
    """The graph of ``function(*tensors)``, and the tensors that it takes behind these: what the function captures.

    Behind what the function returns, the graph returns the excesses that have been ``noted``, if that is given.

    Raises:
        NotTraceableError: it draws random numbers, or does what a trace does not do.
    """
    tools, told, noted = Tools(), noted is not None, noted or Trace()
    mode = tools.new_fake_mode()
    token = _now.set(noted)
    try:
        # each an object of its own, for tracing tells arguments apart by object
        arguments = [mode.from_tensor(in_order(x), static_shapes=True) for x in tensors]
        with mode, _refusing_numbers():
            finishing = _finishing(function, noted, told=told)
            graph = tools.proxies.make_fx(finishing, PRODUCTS, _allow_non_fake_inputs=True)(*arguments)
    finally:
        _now.reset(token)
    refuse_frozen(graph)
    return graph, noted.captured


def in_order(x: Tensor) -> Tensor:
    """A copy whose entries lie in order, as a program is given them."""
    return x.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def _product(matrix: Tensor, vector: Tensor) -> Any:
    """A large matrix times a vector, as a product of matrices: that one the compiler leaves to a library.

    Of the other it makes a loop of its own, which goes through a transposed matrix across the order of its memory.
    """
    if matrix.numel() < _LARGE:
        return NotImplemented
    return torch.mm(matrix, vector.unsqueeze(1)).squeeze(1)


PRODUCTS = {torch.ops.aten.mv.default: _product}
_LARGE = 1 << 14
"""Entries of a matrix from which a call of a library costs less than the compiler's loop takes longer."""


@contextmanager
def _refusing_numbers() -> Iterator[None]:
    """Refuse numbers read out of tensors that are captured: they would be frozen.

    # NOTE [three ways to read a number]
    A method such as ``item`` is a function of torch's. Where a number is expected and a tensor is given
    (``torch.full((2,), x)``, ``w[i]``), torch reads it by an operation. What makes a tensor of a list that has tensors
    reads these past all modes: so its arguments are looked at.
    """

    class Functions(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in _READING and _is_captured(args[0]):
                raise NotTraceableError(f"a number is read out of a captured tensor ({func.__name__})")
            if func in _GATHERING and any(map(_is_captured, _within([*args, *(kwargs or {}).values()]))):
                raise NotTraceableError(f"numbers of captured tensors are gathered ({func.__name__}; take torch.stack)")
            return func(*args, **(kwargs or {}))

    class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
        supports_higher_order_operators = True

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default and _is_captured(args[0]):
                raise NotTraceableError("a number is read out of a captured tensor that is given for a number")
            return func(*args, **(kwargs or {}))

    operations: Any = Operations
    with Functions(), operations():
        yield


_READING = frozenset(
    getattr(Tensor, name)
    for name in ("item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__index__", "__complex__", "__array__")
)
_GATHERING = frozenset({torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor, Tensor.new})


def _is_captured(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor)


def _within(values: Any) -> Iterator[Any]:
    """What lists and tuples hold that are among some values."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from value
            yield from _within(value)


def _finishing(function: Callable[..., Sequence[Tensor]], noted: Trace, *, told: bool) -> Callable[..., list[Tensor]]:
    """The function, with the tensors that it has captured at the top level made inputs, too."""

    def finished(*tensors: Tensor) -> list[Tensor]:
        tracer = Tools().proxies.get_proxy_mode().tracer
        found = list(function(*tensors))
        found += noted.excesses if told else ()
        for node in list(tracer.graph.nodes):
            constant = own_tensor(tracer.root, node)
            if constant is not None:
                _replace(tracer, node, noted.given(constant))
        return found

    return finished


def copy_of(x: Tensor) -> Tensor:
    """The same numbers in a tensor of its own, in order."""
    return torch.where(x == x, x, x).contiguous()  # (a plain clone is removed by the compiler)


def _source(node: Any) -> Any:
    """The node whose value a node gives as it is."""
    while node.target in _VIEWS and _geometry(node) == _geometry(node.args[0]):
        node = node.args[0]
    return node


_VIEWS = frozenset((torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.slice.Tensor))


def _geometry(node: Any) -> tuple[object, ...]:
    value: Tensor = node.meta["val"]
    return value.shape, value.stride(), value.storage_offset()


def _replace(tracer: Any, node: Any, value: Tensor) -> None:
    other = tracer.tensor_tracker[value].proxy.node
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)


def own_tensor(root: Any, node: Any) -> Tensor | None:
    """The tensor that a node of a graph has as its own."""
    found = getattr(root, node.target, None) if node.op == "get_attr" else None
    return found if isinstance(found, Tensor) else None


def refuse_frozen(graph: Any) -> None:
    """Refuse what would give the numbers of this trace at every call: random ones, and what was calculated at once."""
    for module in graph.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                raise NotTraceableError(f"random numbers are drawn ({node.target})")
            read = node.target is torch.ops.aten._local_scalar_dense.default
            if read and not isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool):
                raise NotTraceableError("a number is read out of what is calculated from captured tensors")
