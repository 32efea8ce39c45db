"""Curvature products of many steps at once: time is one more leading axis of the stacked problem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from diffopt.adjoint.direct_terms import DirectTerms
from diffopt.adjoint.trajectory import Trajectory
from diffopt.errors import RandomnessError
from diffopt.rollout.inputs import Place
from diffopt.rollout.keeper import GRAPH_BUDGET
from diffopt.rollout.ranks import largest
from diffopt.tensors import autograd_graph, derivatives, tracing
from diffopt.tensors.leaves import Leaves


@final
class ParallelCurvature:
    r"""``(H_t u_t, M_t' u_t)`` for many steps ``t`` in one product (derivations, section 0).

    # NOTE [one graph for all products]
    The graph of the gradients of all steps is recorded once and serves every call, if it is small enough and not
    split into chunks. A call for a few of its steps pulls zeros back through the others; if those are the most, the
    few get a graph of their own.

    Args:
        trajectory: one that keeps every state (``Keep(first=1, checkpoint=1)``).
        first: no product will be asked for before this step.
        chunk_size: how many steps are batched at most; ``None``: all that are asked for.
        again: whether there will be more than one call.

    Raises:
        RandomnessError: the inner loss draws random numbers, which cannot be drawn again for many steps at once.
    """

    def __init__(self, trajectory: Trajectory, first: int, chunk_size: int | None, *, again: bool) -> None:
        if trajectory.rollout.draws:
            raise RandomnessError(
                "the inner loss draws random numbers",
                "none",
                "this estimator evaluates many steps at once, and they cannot be drawn again as they were; pass "
                "them in batches, or use Reverse() or Truncated()",
            )
        if chunk_size is not None and chunk_size <= trajectory.steps - first:  # which are there to bound the memory
            tracing.refuse("an estimator with a chunk_size of fewer steps than there are")
        self._trajectory, self._first, self._chunk_size = trajectory, first, chunk_size
        self._read: list[Place] = trajectory.wanted_of("read")
        self._again = again and chunk_size is None
        self._kept: derivatives.Graph | None = None

    @property
    def reads_wanted(self) -> bool:
        """Whether any ``M_t' u`` is asked for."""
        return bool(self._read)

    def product(
        self, vectors: Leaves, first: int, direct: DirectTerms | None = None, *, counted: int | None = None
    ) -> Leaves:
        """``H_t u_t`` for the stack ``u_first, u_{first+1}, ...``; with ``direct``, ``M_t' u_t`` is added to it.

        ``counted``: how many of them have not been counted before, if not all.
        """
        steps = range(first, first + len(vectors[0]))
        size, counts = self._chunk_size or len(steps), self._trajectory.record.counts
        counts.products += len(steps) if counted is None else counted
        counts.depth += -(-len(steps) // size)
        parts = [
            self._of_chunk(steps[i : i + size], vectors.map(lambda leaf, i=i: leaf[i : i + size]), direct)
            for i in range(0, len(steps), size)
        ]
        return parts[0] if len(parts) == 1 else Leaves(torch.cat(column) for column in zip(*parts, strict=True))

    def _of_chunk(self, steps: range, vectors: Leaves, direct: DirectTerms | None) -> Leaves:
        every = range(self._first, self._trajectory.steps + 1)
        if not self._again or 2 * len(steps) < len(every):
            return self._pull(self._record(steps), steps, vectors, direct, retain=False)
        if self._kept is None:
            self._kept = self._record(every)
            if tracing.current() is None:  # (what a program keeps is the compiler's business)
                nodes = autograd_graph.nodes(self._kept.nodes())
                size = autograd_graph.saved_bytes(nodes, self._trajectory.inputs.read)
                self._again = largest(size, nodes, vectors) <= GRAPH_BUDGET
        before = steps.start - every.start
        padded = vectors.map(lambda leaf: _between_zeros(leaf, before, len(every)))
        product = self._pull(self._kept, every, padded, direct, retain=self._again)
        if not self._again:
            self._kept = None
        return product.map(lambda leaf: leaf[before : before + len(steps)])

    def _pull(
        self, gradients: derivatives.Graph, steps: range, vectors: Leaves, direct: DirectTerms | None, *, retain: bool
    ) -> Leaves:
        count, read = len(vectors), self._read if direct is not None else []
        terms = gradients.pullback(vectors, range(count + len(read)), retain=retain)
        for place, term in zip(read, terms[count:], strict=True):
            if direct is None or term is None:
                continue
            direct.add_rows(steps, {place: term})
        return Leaves(derivatives.or_zeros(terms[:count], vectors))

    def _record(self, steps: range) -> derivatives.Graph:
        """The graph from the parameters of these steps (and what the loss reads) to their gradients, batched."""
        trajectory, layout = self._trajectory, self._trajectory.layout
        params = trajectory.params_at(steps)
        current = layout.read_at_steps(trajectory.inputs, steps)
        batched = trajectory.dynamics.over_steps(len(steps))

        def function(roots: tuple[Tensor, ...]) -> Sequence[Tensor]:
            own, read = roots[: len(params)], roots[len(params) :]
            for place, root in zip(self._read, read, strict=True):
                current[place.number] = root
            losses = batched.losses(own, current)
            if trajectory.compares_losses:
                again = trajectory.losses_to_replay()
                # autocast may give a loss another dtype under vmap
                again[..., [t - 1 for t in steps]] = losses.detach().movedim(0, -1).to(again.dtype)
                trajectory.refuse_other_losses(again)
            return derivatives.filled(derivatives.gradient(losses.sum(), own, differentiable=True), params)

        with trajectory.rollout.replay(None, params[0].device):
            sources = [*params, *(current[place.number] for place in self._read)]
            return derivatives.Graph.record(function, sources, check=True)


def _between_zeros(leaf: Tensor, before: int, total: int) -> Tensor:
    padded = leaf.new_zeros(total, *leaf.shape[1:])
    padded[before : before + len(leaf)] = leaf
    return padded
