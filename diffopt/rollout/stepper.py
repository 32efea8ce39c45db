"""Takes the steps of one rollout, with or without their graph, and makes the checks that need a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt.rollout import compiled
from diffopt.rollout.checks import Checks, refuse_bad_start
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.hidden_state import HiddenState
from diffopt.rollout.record import Keep, Record, Watch
from diffopt.rollout.step_graph import Block
from diffopt.tensors import autograd_graph, derivatives, random_state
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.torch_errors import changed_in_place

GRAPH_BUDGET = 2**30
"""Bytes up to which ``checkpoint=None`` retains step graphs."""


class Stepper:
    """Takes steps of one rollout, keeping of each what was asked for."""

    def __init__(self, dynamics: Dynamics, extras: Sequence[Tensor], record: Record, watch: Watch) -> None:
        self.dynamics, self.record, self.watch = dynamics, record, watch
        self.extras = tuple(extra.detach() for extra in extras)
        self._checks = Checks(dynamics, watch)
        self._compiled = compiled.Steps(dynamics)
        self._drawn: random_state.GeneratorStates | None = None
        self._draws_from: random_state.GeneratorStates | None = None
        self._keep: Keep | None = None
        self._held: HiddenState | None = None
        self._growing: Block | None = None
        self._first_graph: list[Any] | None = None

    def take(self, state: Leaves, step: int, keep: Keep | None) -> tuple[Leaves, Tensor]:
        """Step number ``step`` from ``state``: the next state and the losses."""
        device = state[0].device
        before = random_state.snapshot(device) if self._drawn is None else self._drawn
        self._keep, self._draws_from = keep, before
        with random_state.replayed(self.record.draws.get(step), device):
            if keep is None or step < keep.first:
                after, losses = self._plain(state, step)
            else:
                after, losses = self._kept(state, step, keep)
        self._drawn = random_state.snapshot(device)
        if random_state.changed(before, self._drawn):
            self.record.draws[step] = before
        return after, losses

    def block(
        self, state: Leaves, first: int, last: int, losses: Tensor, *, apart: bool = False
    ) -> tuple[Block, Leaves]:
        """Steps ``first, ..., last`` from ``state`` with their graph, as the rollout took them, and the state after.

        Their losses are written to their places in ``losses`` ``[..., T]``. ``apart``: see :class:`Block`.
        """
        block = self.new_block(state, apart=apart)
        for step in range(first, last + 1):
            with self.record.replay(step, state[0].device):
                losses[..., step - 1] = self.extend(block, step)
        after = Leaves(leaf.detach() for leaf in block.now)
        block.close()
        return block, after

    def states(self, state: Leaves, first: int, last: int, losses: Tensor) -> list[Leaves]:
        """The states before steps ``first, ..., last``, as the rollout had them, the first of which is ``state``.

        The losses on the way are written to their places in ``losses`` ``[..., T]``.
        """
        states = [state]
        for step in range(first, last):
            with self.record.replay(step, state[0].device):
                after, losses[..., step - 1] = self._plain(states[-1], step)
            states.append(after)
        return states

    def losses(self, state: Leaves, step: int) -> Tensor:
        """The losses of step ``step`` at a state, and nothing else."""
        with self.record.replay(step, state[0].device), torch.enable_grad():  # a loss may differentiate by itself
            params = [leaf.detach().requires_grad_() for leaf in state[: self.dynamics.params_count]]
            return self.dynamics.losses(params, self.dynamics.at_step(self.extras, step)).detach()

    def new_block(self, state: Leaves, *, apart: bool = False) -> Block:
        """A block that starts at ``state``."""
        with torch.enable_grad():
            return Block(self.dynamics, state, self.extras, self.record.wanted, apart=apart)

    def extend(self, block: Block, step: int) -> Tensor:
        """Take one more step in a block; returns its losses."""
        dynamics = self.dynamics
        with torch.enable_grad():
            current = block.inputs(step)
            # Views: a leaf that the last update computed from another one must not carry that one's gradient too.
            params = block.now[: dynamics.params_count]
            before = block.read or [p.view_as(p) if p.requires_grad else p.detach().requires_grad_() for p in params]
            versions = [leaf._version for leaf in block.now]
            losses, grads = self._losses_and_grads(before, current, step, differentiable=True)
            after = self._checks.update(block.now, derivatives.filled(grads, before), current, step)
            if versions != [leaf._version for leaf in block.now]:
                raise changed_in_place()
            if self._first_graph is None:
                nodes = list(autograd_graph.nodes(leaf.grad_fn for leaf in after))
                autograd_graph.refuse_broken_graph(nodes)
                self._first_graph = nodes if self._growing is not None else []
            if self.watch.values:  # else it has been looked at before
                self._checks.refuse_captured([losses], [*before, *current])
            known = [*block.now, *current, *(g for g in grads if g is not None)]
            self._checks.refuse_captured_by_update(after.tensors, known, step)
            block.advance(after, shallow=any(grad is None for grad in grads))
        return losses.detach()

    def _kept(self, state: Leaves, step: int, keep: Keep) -> tuple[Leaves, Tensor]:
        record, count = self.record, self.dynamics.steps - keep.first + 1
        if step == keep.first:
            record.checkpoint = math.isqrt(count - 1) + 1 if keep.checkpoint == "sqrt" else keep.checkpoint
            if record.checkpoint is None or record.checkpoint == "graph":
                self._growing = self.new_block(state)
        if self._growing is not None:
            return self._grow(self._growing, state, step, keep)
        if isinstance(record.checkpoint, int) and (step - keep.first) % record.checkpoint == 0:
            record.store(step, state, offload=keep.offload)
        after, losses = self._plain(state, step, keep_gradients=keep.gradients)
        return after, losses

    def _grow(self, block: Block, state: Leaves, step: int, keep: Keep) -> tuple[Leaves, Tensor]:
        """Take a step with its graph; measure the first, and decide whether to go on with graphs."""
        record, count = self.record, self.dynamics.steps - keep.first + 1
        losses = self.extend(block, step)
        after = Leaves(leaf.detach() for leaf in block.now)
        if step == keep.first:
            expected = autograd_graph.saved_bytes(self._first_graph or (), self.extras) * count
            self._first_graph = []
            large = record.checkpoint is None and expected > GRAPH_BUDGET and record.hidden_state is None
            if large and not self._keeps_state(state, losses, step):
                record.checkpoint, self._growing = math.isqrt(count - 1) + 1, None
                record.store(step, state, offload=keep.offload)
                return after, losses
            record.checkpoint, record.bytes_stored = "graph", expected
        if step == self.dynamics.steps:
            block.close()
            record.block, self._growing = block, None
        return after, losses

    def _keeps_state(self, state: Leaves, losses: Tensor, step: int) -> bool:
        """Whether the losses of a step come out differently when they are computed again, which moves nothing.

        What has the graphs of all steps needs none again, and takes them whatever their size: what is right for a small
        model must not be wrong, or refused, for a large one.
        """
        if not self.watch.values:
            return False
        held, current = HiddenState(self.dynamics.loss), self.dynamics.at_step(self.extras, step)

        def again() -> tuple[Tensor, Sequence[Tensor]]:
            params = [leaf.detach().requires_grad_() for leaf in state[: self.dynamics.params_count]]
            with torch.enable_grad(), random_state.replayed(self._draws_from, params[0].device):
                return self.dynamics.losses(params, current).detach(), ()

        keeps = held.matters(again, losses, (), exactly=True)
        self._held = None if keeps else held  # looked at again after the last step
        return keeps

    def _plain(self, state: Leaves, step: int, *, keep_gradients: bool = False) -> tuple[Leaves, Tensor]:
        """One step without its graph."""
        dynamics, current = self.dynamics, self.dynamics.at_step(self.extras, step)
        before = state[: dynamics.params_count]
        fast = self._compiled.take(state, current, step) if dynamics.compile else None
        if fast is not None and not (step == 1 and self.watch.values):
            self.record.counts.gradients += 1
            if keep_gradients:
                self.record.gradients[step] = fast.grads
            return fast.after, fast.losses
        with torch.enable_grad():
            if step == 1:
                params = derivatives.make_roots(before)
            else:  # cheaper; and nothing is left of this graph that could keep them alive
                params = tuple(leaf.detach().requires_grad_() for leaf in before)
            losses, found = self._losses_and_grads(params, current, step, differentiable=False)
            self._checks.refuse_captured([losses], [*params, *current])
        grads = derivatives.filled(found, before)
        if fast is not None:
            compiled.refuse_stale(fast.losses, losses)
        if keep_gradients:
            self.record.gradients[step] = Leaves(grads)
        if step == 1 and self.watch.values:
            return self._watched_update(state, grads, current), losses.detach()
        return dynamics.update(state, grads, current, step), losses.detach()

    def _watched_update(self, state: Leaves, grads: Sequence[Tensor], current: Sequence[Tensor]) -> Leaves:
        """The first update, once it is seen not to read a tensor that it was not given."""
        with torch.enable_grad():
            roots = Leaves(derivatives.make_roots(state))
            after = self._checks.update(roots, grads, current, 1)
        self._checks.refuse_captured_by_update(after.tensors, roots.tensors, 1)
        return Leaves(leaf.detach() for leaf in after)

    def _losses_and_grads(
        self, params: Sequence[Tensor], current: Sequence[Tensor], step: int, *, differentiable: bool
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        if self._held is None and self.watch.state and self._keep is not None:
            self._held = HiddenState(self.dynamics.loss)
        losses = self._checks.losses(params, current, step)
        grads = derivatives.gradient(losses, params, differentiable=differentiable)
        self.record.counts.gradients += 1
        if step == 1 and self.watch.values:
            refuse_bad_start(self.dynamics, losses, grads, params, current)
        if self._held is not None and step in (1, self.dynamics.steps) and self._held.has_moved():
            self._judge(self._held, losses, grads, params, current, exactly=not differentiable)
        return losses, grads

    def _judge(
        self,
        held: HiddenState,
        losses: Tensor,
        grads: Sequence[Tensor | None],
        params: Sequence[Tensor],
        current: Sequence[Tensor],
        *,
        exactly: bool,
    ) -> None:
        """Note state of the loss that has moved, if its value depends on that; refuse what cannot be right.

        What has the graphs of all steps needs none again, and takes them whatever their size: what is right for a small
        model must not be wrong, or refused, for a large one. (Looked at after the first step and after the last, by
        when other state may have moved, or have begun to matter.)
        """

        def again() -> tuple[Tensor, Sequence[Tensor]]:
            with torch.enable_grad(), random_state.replayed(self._draws_from, params[0].device):
                roots = [leaf.detach().requires_grad_() for leaf in params]
                value = self.dynamics.losses(roots, current)
                return value.detach(), derivatives.or_zeros(
                    derivatives.gradient(value, roots, differentiable=False), roots
                )

        if not held.matters(again, losses.detach(), derivatives.or_zeros(grads, params), exactly=exactly):
            return
        self.record.hidden_state, keep = held.error(), self._keep
        stored = isinstance(self.record.checkpoint, int) or (keep is not None and keep.checkpoint is not None)
        if stored and keep is not None and keep.checkpoint != "graph" and keep.first <= self.dynamics.steps:
            raise self.record.hidden_state
