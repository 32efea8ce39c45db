"""How many states fit into a given amount of memory."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from diffopt.errors import HyperparameterError
from diffopt.rollout.inputs import Inputs, Place
from diffopt.rollout.ranks import largest
from diffopt.rollout.step_graph import Block, graph_bytes
from diffopt.tensors import autograd_graph
from diffopt.tensors.plain_numbers import is_integer, plain
from diffopt.tensors.spread import nbytes
from diffopt.tensors.tree import describe

_UNITS = {"B": 1, **{f"{name}B": 1000**i for i, name in enumerate("KMGT", 1)}}
_UNITS |= {f"{name}IB": 1024**i for i, name in enumerate("KMGT", 1)}


def as_bytes(where: str, value: Any) -> int:
    """An amount of memory as a number of bytes: ``2_000_000_000`` and ``"2GB"`` are the same, ``"2GiB"`` is more.

    Raises:
        HyperparameterError: it is no amount.
    """
    number = plain(value)
    if is_integer(number) and 1 <= number < 2**63:
        return int(number)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Z]+)\s*", number.upper()) if isinstance(number, str) else None
    unit = _UNITS.get(found[2]) if found else None
    if found is None or unit is None or not 1 <= float(found[1]) * unit < 2**63:
        raise HyperparameterError(
            f"{where} is {describe(value)}",
            "None, a number of bytes >= 1 or a text such as '500MB' or '1.5GiB'",
        )
    return int(float(found[1]) * unit)


def slots_within(memory: int, block: Block, inputs: Inputs, wanted: Collection[Place], least: int) -> int:
    """How many states, ``least`` at least, fit into ``memory`` bytes beside all else that a backward pass holds.

    # NOTE [what a backward pass holds]
    At its peak it has the stored states and that of the step at hand; the final state; the cotangent that came in, the
    adjoint, and the one that is being computed; a step's graph, measured on the first one, ``block``; what autograd
    holds while it goes through that graph, at most about as much again and twice the params; and the direct terms' sums
    and the latest terms.

    Raises:
        HyperparameterError: not even ``least`` fit.
    """
    nodes = autograd_graph.nodes(block.last_nodes)
    state = largest(sum(map(nbytes, block.before)), nodes, inputs.params)
    direct = sum([nbytes(inputs.at(place)) for place in wanted])
    graph = graph_bytes(nodes, inputs)
    # (what a rank holds for itself may be larger on another, and all must store as many)
    given = largest(sum(map(nbytes, inputs.params)) + direct, nodes, inputs.params)
    besides = 5 * state + 2 * graph + 2 * given
    found = (memory - besides) // max(state, 1)
    if found < least:
        raise HyperparameterError(
            f"memory is {memory} bytes",
            f"at least {besides + least * state} here: {least} stored state(s) of {state}, a step's graph of {graph}, "
            f"and {besides - graph} for what is computed meanwhile",
            "give it more, or make a step's graph smaller: a smaller batch, a checkpoint in the loss",
        )
    return found
