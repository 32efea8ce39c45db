"""Takes the steps of one rollout, with or without their graph, and makes the checks that need a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt import autodiff, compiled, graph, randomness, transforms
from diffopt.block import Block
from diffopt.captured import Given, mend_for, names_of
from diffopt.dynamics import Dynamics
from diffopt.errors import CapturedTensorError, DisconnectedError, NonFiniteLossError
from diffopt.faults import changed_in_place
from diffopt.leaves import Leaves, all_finite
from diffopt.record import Keep, Record, Watch

GRAPH_BUDGET = 2**30
"""Bytes up to which ``checkpoint=None`` retains step graphs."""


class Stepper:
    """Takes steps of one rollout, keeping of each what was asked for."""

    def __init__(self, dynamics: Dynamics, extras: Sequence[Tensor], record: Record, watch: Watch) -> None:
        self.dynamics, self.record, self.watch = dynamics, record, watch
        self.extras = tuple(extra.detach() for extra in extras)
        self._compiled = compiled.Steps(dynamics)
        self._drawn: randomness.GeneratorStates | None = None
        self._growing: Block | None = None
        self._check_graph = True

    def take(self, state: Leaves, step: int, keep: Keep | None) -> tuple[Leaves, Tensor]:
        """Step number ``step`` from ``state``: the next state and the losses."""
        device = state[0].device
        before = randomness.snapshot(device) if self._drawn is None else self._drawn
        with randomness.replayed(self.record.draws.get(step), device):
            if keep is None or step < keep.first:
                after, losses = self._plain(state, step)
            else:
                after, losses = self._kept(state, step, keep)
        self._drawn = randomness.snapshot(device)
        if randomness.changed(before, self._drawn):
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
            after = apart_from(
                self._levels_at(step), dynamics.update, block.now, autodiff.filled(grads, before), current, step
            )
            if versions != [leaf._version for leaf in block.now]:
                raise changed_in_place()
            if self._check_graph:
                self._check_nodes(losses, after, block.now if step == 1 and self.watch.captures else None)
            block.advance(after, shallow=any(grad is None for grad in grads))
        return losses.detach()

    def _check_nodes(self, losses: Tensor, after: Leaves, roots: Leaves | None) -> None:
        """Look once at the graph of a first step, and, if it grew from ``roots``, for what was captured in it."""
        seen: set[Any] = set()
        nodes = list(graph.nodes((leaf.grad_fn for leaf in after), seen))
        graph.refuse_broken_graph(nodes)
        if roots is not None:  # of what does not meet the params in the losses, nothing is left in their gradient
            nodes += graph.nodes([losses.grad_fn], seen)
            self._refuse_captures(graph.captured_nodes(nodes, roots))
        self._check_graph = False

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
            expected = graph.saved_bytes(graph.nodes(leaf.grad_fn for leaf in block.now), self.extras) * count
            if record.checkpoint is None and expected > GRAPH_BUDGET:
                record.checkpoint, self._growing = math.isqrt(count - 1) + 1, None
                record.store(step, state, offload=keep.offload)
                return after, losses
            record.checkpoint, record.bytes_stored = "graph", expected
        if step == self.dynamics.steps:
            block.close()
            record.block, self._growing = block, None
        return after, losses

    def _plain(self, state: Leaves, step: int, *, keep_gradients: bool = False) -> tuple[Leaves, Tensor]:
        """One step without its graph."""
        dynamics, current = self.dynamics, self.dynamics.at_step(self.extras, step)
        before = state[: dynamics.params_count]
        fast = self._compiled.take(state, current, step) if dynamics.compile else None
        if fast is not None and not (step == 1 and self._watches):
            self.record.counts.gradients += 1
            if keep_gradients:
                self.record.gradients[step] = fast.grads
            return fast.after, fast.losses
        with torch.enable_grad():
            if step == 1:
                params = autodiff.make_roots(before)
            else:  # cheaper; and nothing is left of this graph that could keep them alive
                params = tuple(leaf.detach().requires_grad_() for leaf in before)
            losses, found = self._losses_and_grads(params, current, step, differentiable=False)
            behind = list(graph.nodes([losses.grad_fn])) if step == 1 and self.watch.captures else []
            if behind:
                self._refuse_captures(graph.captured_nodes(behind, params))
        grads = autodiff.filled(found, before)
        if fast is not None:
            compiled.refuse_stale(fast.losses, losses)
        if keep_gradients:
            self.record.gradients[step] = Leaves(grads)
        if step == 1 and (self.watch.captures or self.watch.levels):
            return self._watched_update(state, grads, current), losses.detach()
        return dynamics.update(state, grads, current, step), losses.detach()

    def _watched_update(self, state: Leaves, grads: Sequence[Tensor], current: Sequence[Tensor]) -> Leaves:
        """The first update, once it is seen not to read a tensor that it was not given."""
        with torch.enable_grad():
            roots = autodiff.make_roots(state)
            after = apart_from(self.watch.levels, self.dynamics.update, roots, grads, current, 1)
        nodes = list(graph.nodes(leaf.grad_fn for leaf in after))
        if self.watch.captures:
            self._refuse_captures(graph.captured_nodes(nodes, roots))
        return Leaves(leaf.detach() for leaf in after)

    @property
    def _watches(self) -> bool:
        return self.watch.values or self.watch.captures or bool(self.watch.levels)

    def _refuse_captures(self, nodes: Sequence[Any]) -> None:
        others = Given(self.dynamics.constants())  # a module among them has parameters of its own
        functions = (self.dynamics.loss, self.dynamics.optimizer.template, others)
        refuse_captures("the inner loss (or the optimizer)", functions, nodes)

    def _levels_at(self, step: int) -> range:
        return self.watch.levels if step == 1 else range(0)

    def _losses_and_grads(
        self, params: Sequence[Tensor], current: Sequence[Tensor], step: int, *, differentiable: bool
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        losses = apart_from(self._levels_at(step), self.dynamics.losses, params, current)
        grads = autodiff.gradient(losses, params, differentiable=differentiable)
        self.record.counts.gradients += 1
        if step == 1 and self.watch.values:
            refuse_bad_start(self.dynamics, losses, grads, params, current)
        return losses, grads


def apart_from(levels: range, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function`` and refuse a captured tensor that a transform has wrapped at one of ``levels``."""
    try:
        return transforms.apart_from(levels, function, *arguments)
    except transforms.WrappedTensorError as error:
        raise CapturedTensorError(
            "the inner loss (or the optimizer) reads a tensor of a torch.func transform around the solve without being "
            "given it: it captured it, expected among the arguments. Pass it in *args (or batches), by itself or in a "
            "dict, a list or a tuple, also if it is a constant; or make it inside the loss"
        ) from error


def refuse_captures(what: str, functions: Sequence[object], nodes: Sequence[Any]) -> None:
    """Refuse the captured tensors that require grad at these nodes of a graph; ``functions`` may know their names."""
    if nodes:
        raise CapturedTensorError(
            f"{what} reads {names_of(nodes, functions)} without being given it: it captured it, and gives it no "
            f"hypergradient; expected among the arguments. {mend_for(nodes, functions)}"
        )


def refuse_bad_start(
    dynamics: Dynamics,
    losses: Tensor,
    grads: Sequence[Tensor | None],
    params: Sequence[Tensor],
    current: Sequence[Tensor],
) -> None:
    """Refuse a first loss that does not depend on params or is not finite."""
    if all(grad is None for grad in grads):
        raise DisconnectedError(
            "the inner loss does not depend on params, expected a gradient: check that the loss uses the params it is "
            "given, and does not detach them or leave torch (.item(), .numpy())"
        )
    values = transforms.plain(losses)
    if not bool(values.isfinite().all()):
        raise NonFiniteLossError(
            f"the inner loss is {float(values[~values.isfinite()].flatten()[0])} at the initial params, expected a "
            f"finite number; {not_finite(dynamics, params, current, 1) or 'check the data and the initialisation'}"
        )


def not_finite(dynamics: Dynamics, params: Sequence[Tensor], current: Sequence[Tensor], step: int) -> str:
    """Which of the tensors that a step was given is not finite itself, in words; empty if all are."""
    names, others = dynamics.names()
    others = tuple(f"{x} at step {step}" if stepped else x for x, stepped in zip(others, dynamics.stepped, strict=True))
    for name, x in (*zip(names, params, strict=False), *zip(others, current, strict=True)):
        if x.is_floating_point() and x.layout == torch.strided and not all_finite([x]):
            return f"{name} is not finite itself"
    return ""
