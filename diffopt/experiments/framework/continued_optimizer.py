"""An optimizer that goes on from the buffers of another run, instead of new ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

from diffopt.optimizers.base import EACH, TREE, Buffers, Optimizer
from diffopt.tensors.leaves import Leaves


@final
@dataclass(frozen=True)
class Continued(Optimizer):
    """``optimizer``, as it stands after ``updates`` updates that left ``buffers``.

    Chained solves are then one rollout: with the first solve's ``state.buffers``, and as many ``updates`` as it made
    more, the second goes on with its velocity or moments, and its hypergradient flows back into them.

    Attributes:
        optimizer: the update rule; its hyperparameters are numbers.
        buffers: by name, each a tree shaped like ``params``; differentiable.
        updates: so many were made before; Adam's bias correction counts them.
    """

    optimizer: Optimizer = field(metadata=TREE)  # a leaf without tensors, which is left as it is
    buffers: dict[str, Any] = field(metadata=EACH)
    updates: int = 0

    def init(self, params: Leaves) -> Buffers:
        """The buffers that are gone on from."""
        return {name: Leaves(leaf.clone() for leaf in leaves) for name, leaves in self.buffers.items()}

    def update(self, params: Leaves, grads: Leaves, buffers: Buffers, step: int) -> tuple[Leaves, Buffers]:
        """The optimizer's own next step."""
        return self.optimizer.update(params, grads, buffers, self.updates + step)
