"""A gate behind the inputs of an evaluation, by which what depends on them without being returned is found out.

# NOTE [what a block leaves behind]
Only what a block returns is linked to its inputs. What it leaves elsewhere (an auxiliary loss in an attribute, a
record of a hook) would be a constant. So the graph of each evaluation ends in a node that raises when something left
behind is differentiated. (A gradient uses a graph up: what is left of that one may raise torch's error for it before.)
A transform that differentiates does not come by that graph: there the first evaluation may leave nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt.tensors import autograd_graph, transforms


def gated(refusal: Callable[[], Exception], *tensors: Tensor) -> tuple[Tensor, ...]:
    """These tensors as they are; a derivative that goes through to them raises ``refusal()``."""
    found: tuple[Tensor, ...] = transforms.apply(_Gate, refusal, *tensors)
    return found


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, refusal: Callable[[], Exception], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.refusal = refusal
        return tuple([x.view_as(x) for x in tensors])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise ctx.refusal()


def leads_past(gate: Any, found: Sequence[Tensor]) -> bool:
    """Whether any of these depends on something that requires grad and is not behind the node ``gate``."""
    if any(x.requires_grad and x.grad_fn is None for x in found):
        return True
    behind = autograd_graph.nodes([x.grad_fn for x in found if x.requires_grad], {gate})
    return any(all(inner is None for inner, _ in node.next_functions) for node in behind)
