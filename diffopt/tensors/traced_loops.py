"""Many equal steps as one node of a trace: loops over rows, and loops that end by a condition.

# NOTE [scan without its autograd]
torch's own derivative of ``scan`` is never taken: a scan is traced below autograd, on plain tensors, and what goes back
over its steps is another scan, written out by whoever asked for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from diffopt.tensors.tracing import PRODUCTS, Tools, copy_of, current, in_order, own_tensor, refuse_frozen

Body: TypeAlias = Callable[
    [Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], tuple[Sequence[Tensor], Sequence[Tensor]]
]
"""``(carry, row, shared) -> (carry, row)``: one step of a scan."""


def scan(
    body: Body, carry: Sequence[Tensor], rows: Sequence[Tensor], shared: Sequence[Tensor], *, nested: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """A body applied to one row after the other, as one node of the trace that is being made.

    Args:
        body: given the carry, a row, and what all steps share, it returns the next carry and a row of its own.
        carry: what goes from step to step.
        rows: tensors with a leading axis that runs over steps.
        shared: what every step reads.
        nested: whether it may be part of a body itself; else it is taken for a solve within a loss.

    Returns:
        The last carry, and the rows of all steps, stacked.
    """
    noted = current()
    assert noted is not None
    carry = [x.contiguous() for x in carry]
    if len(rows[0]) == 1:
        last, row = body(carry, [x[0] for x in rows], shared)
        return [x.clone() for x in last], [x.unsqueeze(0) for x in row]
    count, first, width = len(carry), len(carry) + len(rows), 0

    def flat(*tensors: Tensor) -> list[Tensor]:
        nonlocal width
        noted.mark_rows(tensors[count:first])
        after, row = body(tensors[:count], tensors[count:first], tensors[first:])
        width = len(row)
        if count + width == 1:  # a loop of one result only is more than the compiler can do
            row = [after[0].new_zeros(())]
        # (what a step of a scan returns may not be what it was given)
        return [in_order(x) for x in (*after, *row)]

    tools = Tools()
    with tools.proxies.disable_proxy_modes_tracing(), noted.within_step(nested=nested):
        samples = [x.detach().clone() for x in (*carry, *[x[0] for x in rows], *shared)]
        graph = tools.proxies.make_fx(flat, PRODUCTS)(*samples)
    refuse_frozen(graph)
    constants = [noted.given(x) for x in _opened(graph)]
    with torch.no_grad():
        read = [noted.readable(x) for x in (*rows, *shared, *constants)]
        found = tools.scan(graph, carry, read[: len(rows)], tuple(read[len(rows) :]))
    return list(found[:count]), list(found[count : count + width])


def scan_back(
    body: Body, carry: Sequence[Tensor], rows: Sequence[Tensor], shared: Sequence[Tensor], *, nested: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """As :func:`scan`, from the last row to the first; the rows that it returns are in the order of those given.

    Each step looks up its rows, which stay as they lie in memory: to turn them around is to copy all of them.
    """
    count, length = len(rows), len(rows[0])
    if length == 1:
        return scan(body, carry, rows, shared, nested=nested)

    def looking_up(find: Callable[[Tensor, Any], Tensor], place: Any, carry: Sequence[Tensor], shared: Any) -> Any:
        return body(carry, [find(x, place) for x in shared[:count]], shared[count:])

    def as_views(carry: Sequence[Tensor], row: Sequence[Tensor], shared: Sequence[Tensor]) -> Any:
        place: Any = row[0].item()
        check: Any = torch._check
        check(place >= 0)
        check(place < length)
        return looking_up(lambda x, place: torch.select(x, 0, place), place, carry, shared)

    def as_copies(carry: Sequence[Tensor], row: Sequence[Tensor], shared: Sequence[Tensor]) -> Any:
        return looking_up(lambda x, place: x.index_select(0, place).squeeze(0), row[0].reshape(1), carry, shared)

    given = [torch.arange(length - 1, -1, -1, device=carry[0].device)], [*rows, *shared]
    try:
        # (elsewhere than on the CPU a number that is read is waited for)
        carry, made = scan(as_views if carry[0].is_cpu else as_copies, carry, *given, nested=nested)
    except RuntimeError as error:  # some of torch's vmaps ask where a tensor lies, as that of group norms does
        if "symbolic sizes/strides" not in str(error):
            raise
        carry, made = scan(as_copies, carry, *given, nested=nested)
    return carry, [x.flip(0) for x in made]


def while_loop(
    goes_on: Callable[..., Tensor], body: Callable[..., Sequence[Tensor]], carry: Sequence[Tensor]
) -> list[Tensor]:
    """``carry = body(*carry)`` while ``goes_on(*carry)``, one boolean, as one node of the trace that is being made.

    Both may read other tensors of the trace. Returns the last carry.
    """
    noted, tools = current(), Tools()
    assert noted is not None

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple([in_order(x) for x in body(*tensors)])

    with tools.proxies.disable_proxy_modes_tracing(), noted.within_step(nested=False):
        samples = [in_order(x) for x in carry]
        graphs = [tools.proxies.make_fx(function, PRODUCTS)(*samples) for function in (goes_on, flat)]
        _share_transposed(graphs[1])
    for graph in graphs:
        refuse_frozen(graph)
    constants = [noted.given(x) for x in _opened(*graphs)]
    with torch.no_grad():  # (parts of what goes round may be one tensor, which torch refuses)
        read = tuple(map(noted.readable, constants))
        found = tools.while_loop(*graphs, tuple(map(copy_of, carry)), read)
    return list(found)


def _share_transposed(graph: Any) -> None:
    """Turn around, within a graph, a tensor that it has as its own, where it has it turned around as well.

    (A product with a Hessian reads a matrix and its transpose, of which a loop would be given a copy in another order.)
    """
    own = {node: own_tensor(graph, node) for node in graph.graph.nodes}
    found = {node: x for node, x in own.items() if x is not None and x.layout is torch.strided}
    straight = {_lies_at(x): node for node, x in found.items() if x.is_contiguous()}
    for node, x in found.items():
        order = sorted(range(x.ndim), key=x.stride, reverse=True)
        other = None if x.is_contiguous() else straight.get(_lies_at(x.permute(order)))
        if other is not None:
            with graph.graph.inserting_before(node):
                whole = graph.graph.get_attr(other.target)
                turned = graph.graph.call_function(_PERMUTE, (whole, sorted(range(x.ndim), key=order.__getitem__)))
            node.replace_all_uses_with(turned)
            graph.graph.erase_node(node)
    graph.recompile()


_PERMUTE = torch.ops.aten.permute.default


def _lies_at(x: Tensor) -> tuple[object, ...]:
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape, x.stride()


def _opened(*graphs: Any) -> list[Tensor]:
    """Turn the tensors that some graphs have as their own into inputs behind the others, of each; returns them."""
    own = [own_tensor(graph, node) for graph in graphs for node in graph.graph.nodes]
    constants = {id(constant): constant for constant in own if constant is not None}
    for graph in graphs:
        last = [node for node in graph.graph.nodes if node.op == "placeholder"][-1]
        places: dict[int, Any] = {}
        for key in constants:
            with graph.graph.inserting_after(last):
                last = places[key] = graph.graph.placeholder(f"captured_{len(places)}")
        for node in list(graph.graph.nodes):
            constant = own_tensor(graph, node)
            if constant is not None:
                node.replace_all_uses_with(places[id(constant)])
                graph.graph.erase_node(node)
        graph.recompile()
    return list(constants.values())
