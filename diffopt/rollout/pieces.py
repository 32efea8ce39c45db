"""Inner gradients, and their products, in pieces of a batch: the memory of one piece.

# NOTE [pieces]
The loss is a mean over the leading axis of its batch, so its gradient, its curvature product and its mixed product are
the means of the pieces', weighted by their sizes (derivations, section 13). The gradient is one node of a step's graph,
which remembers what it was computed from and no more: pulled back, it takes the pieces again one by one, each with a
graph of its own that is freed before the next. The update sees the mean gradient and is not concerned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from diffopt.errors import LossError
from diffopt.rollout.checks import Checks
from diffopt.rollout.dynamics import Dynamics
from diffopt.tensors import autograd_graph, derivatives, random_state, transforms


@final
@dataclass
class _Taken:
    """One gradient that was taken in pieces.

    Attributes:
        dynamics: the inner problem.
        draws: where the generators stood before it, if it drew random numbers.
        autocast: as it was then.
        values: the losses and the gradient, until they have been handed out.
    """

    dynamics: Dynamics
    draws: random_state.GeneratorStates | None
    autocast: derivatives.Autocast
    values: list[Tensor] = field(default_factory=list)


def pieced(
    steps: Dynamics | Checks, params: Sequence[Tensor], read: Sequence[Tensor], step: int, *, linked: bool
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """The losses of a step and their gradient, joined to params and to what was read by one node if ``linked``."""
    dynamics = steps.dynamics if isinstance(steps, Checks) else steps
    device = params[0].device
    before = random_state.present(device)
    roots, seen = [x.detach().requires_grad_() for x in params], [x.detach() for x in read]
    losses, found, size = _mean(steps, roots, seen, step)
    drawn = random_state.changed(before, random_state.present(device))
    if isinstance(steps, Checks):
        steps.whole = seen
        if steps.compares_values and not drawn and (step & (step - 1) == 0 or step == dynamics.layout.steps):
            _refuse_no_mean(dynamics, params, seen, losses, size, step)
    if not linked:
        return losses, found
    taken = _Taken(dynamics, before if drawn else None, derivatives.Autocast(device))
    taken.values = [losses, *derivatives.filled(found, roots)]
    joined = transforms.apply(_Pieced, taken, len(params), *params, *read)
    return joined[0], joined[1:]


def _mean(
    steps: Dynamics | Checks, params: Sequence[Tensor], read: Sequence[Tensor], step: int
) -> tuple[Tensor, list[Tensor | None], Tensor]:
    """The mean of the losses and of their gradients, piece by piece; the mean of their sizes, which have no sign."""
    total = size = params[0].new_zeros(())
    grads: list[Tensor | None] = [None] * len(params)
    dynamics = steps.dynamics if isinstance(steps, Checks) else steps
    for piece, weight in dynamics.pieces(read):
        losses = steps.losses(params, piece, step)
        found = steps.gradient(losses, params, step, differentiable=False)
        total, size = total + weight * losses.detach(), size + weight * losses.detach().abs()
        _add(grads, found, weight)
    return total, grads, size


def _add(sums: list[Tensor | None], terms: Sequence[Tensor | None], weight: float) -> None:
    for i, term in enumerate(terms):
        if term is not None:
            old = sums[i]
            sums[i] = weight * term if old is None else old + weight * term


class _Pieced(torch.autograd.Function):
    """``(params, read) -> (losses, gradient)``, whose pullback goes from piece to piece."""

    @staticmethod
    def forward(ctx: Any, taken: _Taken, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.taken, ctx.count = taken, count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        values, taken.values = taken.values, []
        return tuple(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *cotangents: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        taken: _Taken = ctx.taken
        given, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        sums: list[Tensor | None] = [None] * len(given)
        wanted = [i for i, need in enumerate(needed) if need]
        device = given[0].device
        with torch.enable_grad(), taken.autocast.entered(), random_state.replayed(taken.draws, device):
            roots = [x.detach().requires_grad_(i < ctx.count or needed[i]) for i, x in enumerate(given)]
            params = roots[: ctx.count]
            for piece, weight in taken.dynamics.pieces(roots[ctx.count :]):
                losses = taken.dynamics.losses(params, piece)
                found = derivatives.gradient(losses, params, differentiable=True)
                autograd_graph.refuse_broken_graph([g.grad_fn for g in found if g is not None])
                pairs = [
                    (x, c)
                    for x, c in zip([losses, *found], cotangents, strict=True)
                    if x is not None and c is not None and x.requires_grad
                ]
                if pairs:
                    outputs, weights = zip(*pairs, strict=True)
                    terms = derivatives.pullback(outputs, [roots[i] for i in wanted], weights)
                    every: list[Tensor | None] = [None] * len(given)
                    for i, term in zip(wanted, terms, strict=True):
                        every[i] = term
                    _add(sums, every, weight)
                del losses, found, pairs
        return None, None, *sums


def _refuse_no_mean(
    dynamics: Dynamics, params: Sequence[Tensor], read: Sequence[Tensor], losses: Tensor, size: Tensor, step: int
) -> None:
    """Refuse a loss that is no mean over the leading axis of its batch; it is taken whole, without a graph."""
    with random_state.preserved(params[0].device), torch.enable_grad():
        try:
            whole = dynamics.losses([x.detach() for x in params], read).detach()
        except RuntimeError:  # one that differentiates by itself
            whole = dynamics.losses([x.detach().requires_grad_() for x in params], read).detach()
    eps = max(torch.finfo(losses.dtype).eps, derivatives.Autocast(params[0].device).eps)
    if bool(((whole - losses).abs() <= eps**0.5 * size).all()):
        return
    worst = (whole - losses).abs().flatten().argmax()
    raise LossError(
        f"micro_batches: the loss of step {step} is {float(whole.flatten()[worst]):.6g}, and "
        f"{float(losses.flatten()[worst]):.6g} as the mean of its pieces, weighted by their sizes",
        "a mean over the leading axis of the batch",
        "batch statistics (batch norm in training mode), a sum, and a mean over some entries only (ignore_index, a "
        "mask) are none: divide by a fixed number of entries, or leave micro_batches out",
    )
