"""What is kept of the steps of a rollout: their graph, their states, their gradients."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any, final

from torch import Tensor

from diffopt.rollout import schedules
from diffopt.rollout.budget import slots_within
from diffopt.rollout.checks import Checks
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.inputs import Inputs, Place
from diffopt.rollout.record import Keep, Kept
from diffopt.rollout.step_graph import Block, Plain, graph_bytes
from diffopt.rollout.store import Store
from diffopt.tensors import autograd_graph
from diffopt.tensors.leaves import Leaves

GRAPH_BUDGET = 2**30
"""Bytes up to which ``checkpoint=None`` retains step graphs."""


@final
class Keeper:
    """Keeps of a rollout's steps what was asked for."""

    def __init__(
        self, dynamics: Dynamics, inputs: Inputs, keep: Keep | None, wanted: Collection[Place], *, stops: bool = False
    ) -> None:
        """Keep nothing yet; ``None``: nothing at all.

        ``stops``: any step may turn out to be the last. The last ones that are to be kept are then states, of which
        earlier ones are let go as later ones come.
        """
        self._dynamics, self._inputs, self._wanted = dynamics, inputs, wanted
        self._last, self._window, self._stops = dynamics.layout.steps, 0, stops
        self._memory = None if keep is None else keep.memory
        if keep is not None and stops and 1 < keep.first <= self._last:
            self._window = self._last - keep.first + 1
            keep, self._memory = replace(keep, first=1, checkpoint=1, memory=None), keep.memory
        self._keep = keep
        self.first = self._last + 1 if keep is None else keep.first
        self._checkpoint: Any = None
        self._slots: int | None = None
        self._at: frozenset[int] = frozenset()
        self._graph_bytes = 0
        self.states = Store(keep is not None and keep.offload)
        self.gradients: dict[int, Leaves] = {}
        self.graphs: list[Block] = []

    @property
    def kept(self) -> Kept:
        """How much has been kept."""
        states = (0, self._graph_bytes) if self.graphs else (len(self.states), self.states.nbytes)
        return Kept(self._checkpoint, *states, self._slots)

    def before(self, ground: Block | Plain, step: int) -> Block | Plain:
        """What step ``step >= first`` is to be taken on, after the step before it was taken on ``ground``."""
        keep, count = self._keep, self._last - self.first + 1
        assert keep is not None
        if step == self.first:
            self._checkpoint = math.isqrt(count - 1) + 1 if keep.checkpoint == "sqrt" else keep.checkpoint
            if self._checkpoint is None or self._checkpoint == "graph" or self._memory is not None:
                return Block(self._dynamics, self._inputs, self._wanted, ground.state, held=step == 1)
            if self._checkpoint == "log":
                self._plan(schedules.logarithmic(count))
        if step in self._at or (isinstance(self._checkpoint, int) and (step - self.first) % self._checkpoint == 0):
            self._store(step, ground.state)
        return ground

    def after(self, ground: Block | Plain, step: int, steps: Dynamics | Checks, losses: Tensor) -> Block | Plain:
        """What the next step is to be taken on, once step ``step >= first`` has been taken on ``ground``."""
        if isinstance(ground, Plain):
            if self._keep is not None and self._keep.gradients:
                self.gradients[step] = Leaves(ground.grads)
            return ground
        if step != self.first:
            return ground
        if self._memory is not None:
            self._choose(ground, self._memory)
        elif self._is_too_large(ground, steps, losses):
            self._checkpoint = math.isqrt(self._last - self.first) + 1
        else:
            return ground
        self._store(step, ground.before)
        return Plain(self._dynamics, self._inputs, ground.state)

    def _choose(self, first: Block, memory: int) -> None:
        """Store as many states as fit into ``memory`` beside what the first step says of all, and no more than help."""
        found = slots_within(memory, first, self._inputs, self._wanted, self._window or 1)
        if not self._window:
            self._plan(min(found, max(1, self._last - self.first)))

    def _plan(self, slots: int) -> None:
        """Store the states that the recursion within ``slots`` wants, and that before the last step.

        In (13.2) the first sweep ends before the last step, which is then pulled back at once. A rollout ends after it:
        so the state before it is kept too. (If the rollout ends early, there is one less, and never a wrong number.)
        """
        count = self._last - self.first + 1
        self._slots = slots
        self._at = frozenset([self.first + t for t in schedules.stored(count, slots)] + [self._last])

    def _is_too_large(self, block: Block, steps: Dynamics | Checks, losses: Tensor) -> bool:
        """Measure the graph of the first step, and decide whether to go on with graphs.

        What keeps a state needs none again with the graphs of all steps, and gets them whatever their size: what is
        right for a small model must not be wrong, or refused, for a large one.
        """
        graph = autograd_graph.nodes(block.last_nodes)
        if isinstance(steps, Checks):
            steps.look_at_graph(graph)
        expected = graph_bytes(graph, self._inputs) * (self._last - self.first + 1)
        large = self._checkpoint is None and expected > GRAPH_BUDGET
        if large and not (isinstance(steps, Checks) and steps.keeps_state(block.before, losses)):
            return True
        self._checkpoint, self._graph_bytes = "graph", expected
        return False

    def _store(self, step: int, state: Leaves) -> None:
        """Keep ``s_step``."""
        if step == self.first and not self._stops:
            self.states.expect(self._expected, state)
        self.states[step] = state
        if self._window and step > self._window + 1:  # one more than that: the step that is begun may not be taken
            self._drop(step - self._window - 1)

    @property
    def _expected(self) -> int:
        """How many states will be stored."""
        count = self._last - self.first + 1
        return -(-count // self._checkpoint) if isinstance(self._checkpoint, int) else len(self._at)

    def _drop(self, step: int) -> None:
        del self.states[step]
        self.gradients.pop(step, None)

    def finish(self, ground: Block | Plain, steps: int) -> None:
        """Let go of what is not needed, and close the graph, now that the last step made is the ``steps``-th."""
        for step in [*self.states] if self._stops else ():
            if step > steps or (self._window and step <= steps - self._window):
                self._drop(step)
        if self._window:
            self.first = max(1, steps - self._window + 1)
        elif self.first > self._last:  # nothing was to be kept
            self.first = steps + 1
        if isinstance(ground, Block):
            self.graphs.append(ground)
            ground.close()
        else:
            self.states.settle()
