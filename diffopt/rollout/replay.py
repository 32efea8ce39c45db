"""Steps of a finished rollout, taken again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from diffopt.rollout import compiled, schedules
from diffopt.rollout.checks import Checks
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.inputs import Inputs
from diffopt.rollout.loop import take_step
from diffopt.rollout.ranks import largest
from diffopt.rollout.record import Counts, Rollout, Watch
from diffopt.rollout.step_graph import Block, Plain, graph_bytes
from diffopt.tensors import autograd_graph
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.spread import nbytes


@final
class Replay:
    """Takes steps as a rollout took them: on the same random numbers, under the same autocast."""

    def __init__(
        self, dynamics: Dynamics, inputs: Inputs, rollout: Rollout, counts: Counts, *, check: bool = False
    ) -> None:
        """``check``: look for captured tensors in updates, of which the rollout itself made no graph."""
        self._dynamics, self._inputs, self._rollout, self._counts = dynamics, inputs.detached(), rollout, counts
        self._steps = Checks(dynamics, Watch(captures=True)) if check else dynamics
        self._fast = compiled.Steps(dynamics, self._inputs) if dynamics.compile else None

    def block(
        self, state: Leaves, first: int, last: int, losses: Tensor, *, apart: bool = False, observes: bool = False
    ) -> tuple[Block, Leaves]:
        """Steps ``first, ..., last`` from ``state`` with their graph, and the state after them.

        Their losses are written to their places in ``losses`` ``[..., T]``. ``apart``: see :class:`Block`;
        ``observes``: what is observed is an output of it, too.
        """
        block = Block(self._dynamics, self._inputs, self._rollout.wanted, state, apart=apart)
        for step in range(first, last + 1):
            self._take(block, step, losses, observes)
        after = block.state
        block.close()
        return block, after

    def block_of_small(
        self, state: Leaves, first: int, last: int, losses: Tensor, *, observes: bool = False
    ) -> tuple[Block | None, Leaves]:
        """:meth:`block`, unless its first graph is larger than a state: then ``None`` and the state after that step."""
        block = Block(self._dynamics, self._inputs, self._rollout.wanted, state)
        self._take(block, first, losses, observes)
        graph = autograd_graph.nodes(block.last_nodes)
        if graph_bytes(graph, self._inputs) > largest(sum(map(nbytes, state)), graph, self._inputs.params):
            return None, block.state
        for step in range(first + 1, last + 1):
            self._take(block, step, losses, observes)
        after = block.state
        block.close()
        return block, after

    def backwards(self, first: int, last: int, losses: Tensor) -> Iterator[tuple[int, Leaves]]:
        """The steps from ``last`` down to ``first`` and the states before them, of which ``s_first`` is stored.

        States in between are stored for a while, within the slots of the rollout, if it was given any, and each goes
        when it is handed out. No more steps are taken than (13.2) says. The losses on the way are written to their
        places in ``losses`` ``[..., T]``.
        """
        states, slots = self._rollout.states, self._rollout.kept.slots
        for end in range(last, first - 1, -1):
            step = states.latest
            state = states.take(step) if step == end else states[step]
            while step < end:
                free = end - step + 1 if slots is None else slots - len(states) + 1
                to = step + schedules.split(end - step + 1, free) if free > 1 else end
                state, step = self._advanced(state, step, to, losses), to
                if step < end:
                    states[step] = state
            yield end, state
            del state  # else it would live on while the next ones are computed

    def _advanced(self, state: Leaves, first: int, last: int, losses: Tensor) -> Leaves:
        """The state before step ``last``, by steps from ``state``, that before step ``first``."""
        ground = Plain(self._dynamics, self._inputs, state)
        del state
        for step in range(first, last):
            self._take(ground, step, losses)
        return ground.state

    def losses(self, state: Leaves, step: int) -> Tensor:
        """The losses of step ``step`` at a state, and nothing else."""
        layout = self._dynamics.layout
        with self._rollout.replay(step, state[0].device), torch.enable_grad():  # a loss may differentiate by itself
            params = [leaf.detach().requires_grad_() for leaf in layout.params(state)]
            return self._dynamics.losses(params, layout.at_step(self._inputs, step)[0]).detach()

    def _take(self, ground: Block | Plain, step: int, losses: Tensor, observes: bool = False) -> None:
        with self._rollout.replay(step, losses.device):
            done = None if self._fast is None else self._fast.take(ground, step)
            rows = take_step(self._steps, ground, step, observes=observes)[0] if done is None else (done.losses,)
            losses[..., step - 1] = rows[0]
        if done is not None:
            ground.keep(done.after, done.grads, done.losses, step)
        self._counts.gradients += 1
        self._counts.extra_steps += 1
