"""The graph of some inner steps in a row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from diffopt.rollout.along import Running
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.inputs import Inputs, Place
from diffopt.rollout.ranks import largest
from diffopt.tensors import autograd_graph, derivatives
from diffopt.tensors.leaves import Leaves


class Slice(NamedTuple):
    """What one step is computed from.

    Attributes:
        state: ``s_t``.
        params: its params as the loss is given them.
        read: what the loss reads in this step.
        hyperparameters: those of this step.
    """

    state: Leaves
    params: Sequence[Tensor]
    read: Sequence[Tensor]
    hyperparameters: Sequence[Tensor]


@final
@dataclass(frozen=True)
class BlockTerms:
    r"""What pulling an adjoint back through a block gives.

    Attributes:
        state: the adjoint of the leaves of the state before the block that were asked for.
        shared: the block's sum of direct terms of each wanted input that is the same in every step.
        stepped: the direct term of each wanted input that runs over steps, by its place and the step.
    """

    state: Leaves
    shared: dict[Place, Tensor | None]
    stepped: dict[tuple[Place, int], Tensor | None]


@final
class Block:
    """The graph of steps ``first, first + 1, ...``, from the state before them to the state after them.

    It grows as steps are taken (:meth:`slice` before each, :meth:`keep` after it) and is then closed, from when on it
    is held by its edges only: no tensor is kept alive but inputs, which live on anyway, and what the graph saved.

    # NOTE [one graph for a block, not one per step]
    Steps are linked, so that one call of autograd pulls an adjoint through all of them and adds terms in place. Each
    step still takes its inner gradient from the state before it and looks no further back.
    """

    linked = True

    def __init__(
        self,
        dynamics: Dynamics,
        inputs: Inputs,
        wanted: Collection[Place],
        state: Sequence[Tensor],
        *,
        apart: bool = False,
        held: bool = False,
    ):
        """Start a block at ``state``, to be differentiated in it and in the ``wanted`` of what steps read.

        ``apart``: of one step, in which the loss reads params of its own, the update those of the state: see
        :meth:`pullback_apart`. ``held``: the state lives on, whether the graph keeps it or not, as all inputs do.
        """
        layout = self._layout = dynamics.layout
        self._stepped = [place for place in wanted if layout.runs_over_steps(place)]
        self._shared = [place for place in wanted if not layout.runs_over_steps(place)]
        with torch.enable_grad():
            # (a gradient for params that come from one node with data would look for all that leads to those, too)
            starts = derivatives.make_leaves(state) if held else derivatives.make_roots(state)
            roots = *starts, *derivatives.make_leaves(map(inputs.at, self._shared))
            self._apart = derivatives.make_roots(layout.params(state)) if apart else None
        count = layout.state_count
        self._roots = roots
        # see :meth:`slice`; under a vmap nothing can be done to params, and ``observe`` could hand them to the loss
        self._as_they_are = bool(layout.levels) and dynamics.own_update and dynamics.observer is None
        self._with_roots = inputs.put(dict(zip(self._shared, roots[count:], strict=True))) if self._shared else inputs
        self._slices: dict[tuple[Place, int], Tensor] = {}
        self._slices_at: list[tuple[Place, int]] = []
        self._graph: derivatives.Graph | None = None
        self._now, self.before, self._own = Leaves(roots[:count]), Leaves(state), 0
        self._along: list[Tensor] = []
        self._along_at: list[tuple[int, int]] = []

    @property
    def state(self) -> Leaves:
        """The state after the last step, cut off from the graph."""
        return Leaves([x.detach() for x in self._now])

    def slice(self, step: int) -> Slice:
        """What step ``step`` is computed from, joined to the graph where it is wanted.

        The params are views: a leaf that the last update computed from another one must not carry that one's gradient
        too, and what a loss does to its params (a hook) must not be done to the chain of states. They are the state's
        own where neither can be.
        """
        read, hyperparameters = self._layout.at_step(self._with_roots, step)
        if self._stepped:
            read, hyperparameters = self._joined(read, hyperparameters, step)
        params = self._apart
        if params is None:
            params = own = tuple(self._now)[: self._layout.params_count]
            if not (self._as_they_are and all([x.requires_grad for x in own])):
                params = tuple([x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in own])
        return Slice(self._now, params, read, hyperparameters)

    def _joined(self, read: Leaves, hyperparameters: Leaves, step: int) -> tuple[Leaves, Leaves]:
        """The same with the wanted slices of this step as roots of the graph."""
        parts = {"read": list(read), "hyperparameters": list(hyperparameters)}
        roots = derivatives.make_leaves([parts[place.part][place.number] for place in self._stepped])
        for place, root in zip(self._stepped, roots, strict=True):
            parts[place.part][place.number] = self._slices[place, step] = root
        return Leaves(parts["read"]), Leaves(parts["hyperparameters"])

    @property
    def params(self) -> Sequence[Tensor]:
        """The params after the last step, for whoever looks at them."""
        return tuple(self._now)[: self._layout.params_count]

    def keep(self, state: Leaves, grads: Sequence[Tensor], losses: Tensor, step: int, *, shallow: bool = False) -> None:
        """Go on from ``state``, to which an update with these gradients has led in step ``step``.

        The ``losses`` are outputs of the block, too. ``shallow`` says that some parameter may not have come through
        this step's loss. All are then made to look equally deep: autograd searches the whole graph behind the
        shallowest input of a gradient.
        """
        self._now = Leaves(derivatives.join(state)) if shallow else state
        self._along.append(losses)
        self._along_at.append((step, 1))

    def hand_out(self, observed: Sequence[Tensor]) -> None:
        """Take what is observed after the last step for outputs of the block, too."""
        self._along += observed
        self._along_at[-1] = self._along_at[-1][0], 1 + len(observed)

    @property
    def last_nodes(self) -> list[Any]:
        """The nodes of the state after the last step."""
        return [x.grad_fn for x in self._now if x.grad_fn is not None]

    def close(self) -> None:
        """Let go of all tensors."""
        inputs, outputs = [*self._roots, *self._slices.values(), *(self._apart or ())], [*self._now, *self._along]
        self._graph, self._own = derivatives.Graph(inputs, outputs), len(inputs) - len(self._apart or inputs)
        self._slices_at = list(self._slices)
        self._roots, self._slices, self._now, self._apart, self.before = (), {}, Leaves(()), None, Leaves(())
        self._along = []
        del self._with_roots

    def pullback_apart(
        self, after: Sequence[int], before: Sequence[int], *, past: bool = True
    ) -> Callable[[Leaves], tuple[Leaves, Leaves]]:
        """What pulls the adjoint of some leaves of the state after, the others' being zero, back to some before it.

        There are as many before the step. It can be called as often as needed. It returns what comes past the inner
        gradient (nothing if ``past`` is not asked for), and what comes through it: their sum would swallow a small
        curvature in the round-off of what the update hands on.
        (Of a block that was not recorded ``apart`` their sum, as the second; ``past`` may not be asked for.)
        """
        assert self._graph is not None, "the block is still growing"
        read = [i for i in before if i < self._layout.params_count]
        direct = list(before) if past else []
        pull = self._graph.product(after, [*direct, *(self._own + i for i in read)])
        all_read = len(read) == len(before)

        def apart(adjoint: Leaves) -> tuple[Leaves, Leaves]:
            terms = pull(adjoint)
            handed_on = Leaves(derivatives.or_zeros(terms[: len(direct)], adjoint) if past else ())
            through = terms[len(direct) :]
            if not all_read:
                found = dict(zip(read, through, strict=True))
                through = [found.get(i) for i in before]
            return handed_on, Leaves(derivatives.filled(through, adjoint))

        return apart

    def pullback(
        self,
        adjoint: Leaves,
        *,
        state: Sequence[int],
        running: Running | None = None,
        direct: bool = True,
        retain: bool = False,
    ) -> BlockTerms:
        """Pull the adjoint of the state after the block back to the state before it, and to the wanted inputs.

        Args:
            adjoint: of every leaf of the state after the block.
            state: the leaves of the state before it that are asked for.
            running: the cotangents of what the steps have handed out; ``None``: zero.
            direct: whether the wanted inputs are asked for.
            retain: whether there will be another call; if not, the graph is freed on the way.
        """
        assert self._graph is not None, "the block is still growing"
        first, numbers = self._layout.state_count, len(self._shared) + len(self._slices_at)
        others = range(first, first + numbers if direct else first)
        along: list[Tensor | None] = []
        for step, number in self._along_at:
            along += [None] * number if running is None else running.at(step)[:number]
        graph, self._graph = self._graph, self._graph if retain else None  # of losses nobody asked for it keeps tensors
        terms = graph.pullback([*adjoint, *along], [*state, *others], retain=retain)
        before = Leaves(derivatives.or_zeros(terms[: len(state)], [adjoint[i] for i in state]))
        rest = terms[len(state) :]
        return BlockTerms(
            before,
            dict(zip(self._shared, rest, strict=False)),
            dict(zip(self._slices_at, rest[len(self._shared) :], strict=False)),
        )


def graph_bytes(graph: Sequence[Any], inputs: Inputs) -> int:
    """The bytes that a graph, given by its nodes, keeps alive besides the inputs; of ranks that share it, the most."""
    return largest(autograd_graph.saved_bytes(graph, (*inputs.read, *inputs.hyperparameters)), graph, inputs.params)


@final
class Plain:
    """The place of a block where no graph is kept: each step begins anew, cut off from the one before."""

    linked = False

    def __init__(self, dynamics: Dynamics, inputs: Inputs, state: Leaves) -> None:
        """Start at ``state``."""
        self._layout, self._inputs, self.state = dynamics.layout, inputs, state
        self.grads: Sequence[Tensor] = ()

    def slice(self, step: int) -> Slice:
        """What step ``step`` is computed from."""
        read, hyperparameters = self._layout.at_step(self._inputs, step)
        own = tuple(self.state)[: self._layout.params_count]
        return Slice(self.state, derivatives.make_leaves(own), read, hyperparameters)

    @property
    def params(self) -> Sequence[Tensor]:
        """The params after the last step, for whoever looks at them, and may differentiate by itself."""
        return [x.detach().requires_grad_() for x in tuple(self.state)[: self._layout.params_count]]

    def hand_out(self, observed: Sequence[Tensor]) -> None:
        """No graph is kept that could lead there."""

    def keep(self, state: Leaves, grads: Sequence[Tensor], losses: Tensor, step: int, *, shallow: bool = False) -> None:
        """Go on from ``state``, to which an update with these gradients has led."""
        self.state, self.grads = state, grads
