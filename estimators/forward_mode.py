"""Forward mode: one tangent per hyperparameter, carried along the rollout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffopt.adjoint.estimator import Adjoint
from diffopt.adjoint.trajectory import Cotangents, Trajectory
from diffopt.rollout.dynamics import Dynamics, Level
from diffopt.rollout.record import Keep
from diffopt.tensors import autograd_graph, derivatives
from diffopt.tensors.arguments import Options
from diffopt.tensors.leaves import Leaves


@final
@dataclass(frozen=True)
class ForwardMode(Adjoint):
    r"""The exact hypergradient, by carrying the tangents of every hyperparameter forward.

    .. math:: Z_1 = \frac{\partial s_1}{\partial\theta},\quad Z_{t+1} = J_t Z_t + B_t,\qquad
              \nabla = Z_{T+1}^\top\,\frac{\partial F}{\partial s_{T+1}}

    Exact. Cost: one more rollout and ``T * p`` HVPs for ``p`` hyperparameters (per task), batched over ``p``. Memory:
    ``p`` states, independent of ``T``. Depth ``T``. All that for each tensor that is learned, one after the other:
    twelve tensors of one number have the depth ``12 * T``, so put them in one and let the loss take it apart.

    Args:
        chunk_size: how many tangents are carried at once; ``None``: all of one tensor. Bounds the memory, and each
            chunk costs a rollout.

    Not for: many hyperparameters, an initialisation above all. Whatever requires grad gets its tangents, also if the
    backward pass is asked for other inputs only: detach an initialisation that is not to be learned.

    Reference: Franceschi et al. (2017), "Forward and Reverse Gradient-Based Hyperparameter Optimization", algorithm 2.
    Derivations, section 1.
    """

    chunk_size: int | None = None

    def __post_init__(self) -> None:
        """Check ``chunk_size``."""
        Options(self).integer("chunk_size", 1, also=(None,))

    def keep(self, steps: int) -> Keep:
        """No step: the rollout is run again with its tangents."""
        return Keep(first=steps + 1)

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        """The product of the cotangent with the tangents of every wanted input."""
        count = trajectory.dynamics.state_count
        initial = None
        if trajectory.wants_initial:
            initial = Leaves(self._derivative(trajectory, cotangent, i) for i in range(count))
        extras = {number: self._derivative(trajectory, cotangent, count + number) for number in trajectory.wanted}
        return Cotangents(initial, extras)

    def _derivative(self, trajectory: Trajectory, cotangent: Leaves, number: int) -> Tensor:
        """The derivative for one input, all its coordinates in turn."""
        like = [*trajectory.initial, *trajectory.extras][number]
        batched = [level.dims[number] is not None for level in reversed(trajectory.dynamics.levels)]
        own = like.shape[sum(batched) :]
        size = math.prod(own)
        if size == 0:
            return torch.zeros_like(like)
        chunk = self.chunk_size or size
        parts = []
        for start in range(0, size, chunk):
            indices = torch.arange(start, min(start + chunk, size), device=like.device)
            basis = torch.nn.functional.one_hot(indices, size).to(like.dtype)
            tangent = basis.reshape(-1, *(1,) * sum(batched), *own).expand(-1, *like.shape)
            part = _contract(_carry(trajectory, number, tangent), cotangent, batched)
            if like.is_complex():  # torch's gradient: the real part's derivative plus i times the imaginary part's
                part = torch.complex(part, _contract(_carry(trajectory, number, 1j * tangent), cotangent, batched))
            parts.append(part)
        return torch.cat(parts).movedim(0, -1).reshape(like.shape)


def _contract(tangents: Leaves, cotangent: Leaves, batched: list[bool]) -> Tensor:
    """The inner product of each tangent with the cotangent, per task where the input is a task's own: ``[p, ...]``."""
    total = None
    for tangent, weight in zip(tangents, cotangent, strict=True):
        summed = [axis + 1 for axis in range(weight.ndim) if axis >= len(batched) or not batched[axis]]
        product = tangent * weight
        term = product.sum(dim=summed) if summed else product
        total = term if total is None else total + term
    assert total is not None
    return total


def _carry(trajectory: Trajectory, number: int, tangent: Tensor) -> Leaves:
    """The tangents of the final state, given that of input ``number`` (directions along axis 0)."""
    count, size = trajectory.dynamics.state_count, len(tangent)
    dims = tuple(0 if i < count or i == number else None for i in range(count + len(trajectory.extras)))
    dynamics = trajectory.dynamics.batched(Level(dims, size, "same"))
    state = Leaves(leaf.expand(size, *leaf.shape) for leaf in trajectory.initial)
    moving = state.zeros()
    extras = list(trajectory.extras)
    if number < count:
        moving = Leaves(tangent if i == number else leaf for i, leaf in enumerate(moving))
    else:
        # not an expanded tensor: a loss that differentiates in it in forward mode gives its parts tangents to write to
        extras[number - count] = extras[number - count].expand(tangent.shape).contiguous()
    again = trajectory.losses_to_replay()
    trajectory.record.counts.gradients += dynamics.steps
    for step in range(1, dynamics.steps + 1):
        trajectory.record.counts.add_products(size)
        with trajectory.record.replay(step, tangent.device):
            current = dynamics.at_step(extras, step)
            rates: dict[int, Tensor] = {}
            if number >= count:
                extra = number - count
                rates[extra] = dynamics.slice_at(extra, tangent, step) if dynamics.stepped[extra] else tangent
            state, moving, loss = _step(dynamics, state, moving, current, rates, step)
            again[..., step - 1] = loss[0]
    trajectory.refuse_other_losses(again)
    return moving


def _step(
    dynamics: Dynamics,
    state: Leaves,
    moving: Leaves,
    current: Sequence[Tensor],
    rates: dict[int, Tensor],
    step: int,
) -> tuple[Leaves, Leaves, Tensor]:
    """One step of the state and of its tangent, ``C s' + E (H P s' + M theta') + D eta'``."""
    params = dynamics.params_count
    read = {i: rate for i, rate in rates.items() if i < dynamics.hyperparameters_start}
    with torch.enable_grad():
        roots = derivatives.make_roots([*state[:params], *(current[i] for i in read)])
        seen = list(current)
        for i, root in zip(read, roots[params:], strict=True):
            seen[i] = root
        losses = dynamics.losses(roots[:params], seen)
        grads = derivatives.gradient(losses.sum(), roots, differentiable=True)
        if step == 1:
            autograd_graph.refuse_broken_graph(autograd_graph.nodes(g.grad_fn for g in grads if g is not None))
        grads_moving = derivatives.pullback(grads, roots[:params], [*moving[:params], *read.values()])
    flat = derivatives.or_zeros(grads[:params], state[:params])
    hypers = [i for i in rates if i not in read]

    def update(inputs: tuple[Tensor, ...]) -> Leaves:
        now = list(current)
        for i, value in zip(hypers, inputs[len(state) + params :], strict=True):
            now[i] = value
        return dynamics.update(inputs[: len(state)], inputs[len(state) :][:params], now, step)

    inputs = [*state, *flat, *(current[i] for i in hypers)]
    after, after_moving = derivatives.jvp(update, inputs, [*moving, *grads_moving, *(rates[i] for i in hypers)])
    return Leaves(after), Leaves(after_moving), losses.detach()
