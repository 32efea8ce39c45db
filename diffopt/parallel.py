"""A trajectory taken apart for rules that work on many steps at once: C, E, D by step, H and M batched over time."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import final

import torch
from torch import Tensor

from diffopt import autodiff
from diffopt.dynamics import Level
from diffopt.errors import RandomnessError
from diffopt.leaves import Leaves
from diffopt.trajectory import DirectTerms, Trajectory


@final
class ParallelSteps:
    r"""The blocks of steps ``1, ..., T``, derivations section 0: all that needs no curvature, and all that does.

    .. math:: J_t = C_t + E_t H_t P,\qquad B_t = D_t + E_t M_t

    ``C_t' x``, ``E_t' x`` and ``D_t' x`` are one pullback of the update, without a second derivative of the loss.
    ``(H_t u_t, M_t' u_t)`` are taken for many ``t`` at once: time is one more leading axis of the stacked problem.

    Args:
        trajectory: one that keeps every state and gradient (``Keep(first=1, checkpoint=1, gradients=True)``).
        chunk_size: how many steps are batched at most; ``None``: all that are asked for.

    Raises:
        RandomnessError: the inner loss draws random numbers, which cannot be drawn again for many steps at once.
    """

    def __init__(self, trajectory: Trajectory, chunk_size: int | None) -> None:
        if trajectory.record.draws:
            raise RandomnessError(
                "the inner loss draws random numbers, and this estimator evaluates many steps at once: they cannot be "
                "drawn again as they were; pass them in batches, or use Reverse() or Truncated()"
            )
        self._trajectory, self._chunk_size = trajectory, chunk_size
        dynamics = trajectory.dynamics
        self._read = [i for i in trajectory.wanted if i < dynamics.hyperparameters_start]
        self._hypers = [i for i in trajectory.wanted if i >= dynamics.hyperparameters_start]
        self._updates = {t: self._record_update(t) for t in range(1, trajectory.steps + 1)}

    def pull_update(self, step: int, adjoint: Leaves) -> tuple[Leaves, Leaves]:
        """``C_t' x`` (one tensor per state leaf) and ``E_t' x`` (one per parameter leaf)."""
        count, params = self._trajectory.dynamics.state_count, self._trajectory.dynamics.params_count
        terms = self._updates[step].pullback(adjoint, range(count + params), retain=True)
        through_state = autodiff.or_zeros(terms[:count], adjoint)
        return Leaves(through_state), Leaves(autodiff.or_zeros(terms[count:], adjoint[:params]))

    def add_update_terms(self, direct: DirectTerms, step: int, adjoint: Leaves) -> None:
        """Add ``D_t' x`` to the direct terms."""
        first = self._trajectory.dynamics.state_count + self._trajectory.dynamics.params_count
        terms = self._updates[step].pullback(adjoint, range(first, first + len(self._hypers)), retain=True)
        direct.add(step, dict(zip(self._hypers, terms, strict=True)))

    def curvature(
        self, cotangents: dict[int, Leaves], direct: DirectTerms | None = None, mixed: Collection[int] = ()
    ) -> dict[int, Leaves]:
        """``P' H_t u_t``, like the state, for each step of ``cotangents``; those of ``mixed`` add ``M_t' u_t`` too."""
        products: dict[int, Leaves] = {}
        mixed = mixed if self._read else ()
        size = self._chunk_size or max(len(cotangents), 1)
        for adds in (False, True):
            steps = [t for t in sorted(cotangents) if (t in mixed) == adds]
            for start in range(0, len(steps), size):
                products |= self._curvature_of_chunk(steps[start : start + size], cotangents, direct if adds else None)
        counts = self._trajectory.record.counts
        counts.products, counts.depth = counts.products + len(cotangents), counts.depth + -(-len(cotangents) // size)
        return products

    def _curvature_of_chunk(
        self, steps: list[int], cotangents: dict[int, Leaves], direct: DirectTerms | None
    ) -> dict[int, Leaves]:
        stacked = [torch.stack(column) for column in zip(*(cotangents[t] for t in steps), strict=True)]
        count, read = len(stacked), self._read if direct is not None else []
        terms = self._gradients(steps).pullback(stacked, range(count + len(read)))
        curved = autodiff.or_zeros(terms[:count], stacked)
        zeros = self._trajectory.final[count:].zeros()
        for number, term in zip(read, terms[count:], strict=True):
            if direct is not None and term is not None:
                self._add_mixed(direct, steps, number, term)
        return {t: Leaves([*(leaf[i] for leaf in curved), *zeros]) for i, t in enumerate(steps)}

    def _add_mixed(self, direct: DirectTerms, steps: Sequence[int], number: int, term: Tensor) -> None:
        if self._trajectory.dynamics.stepped[number]:
            for step, part in zip(steps, term, strict=True):
                direct.add(step, {number: part})
        else:
            direct.add(steps[0], {number: term})

    def _gradients(self, steps: Sequence[int]) -> autodiff.Graph:
        """The graph from the parameters of these steps (and what the loss reads) to their gradients, batched."""
        trajectory, dynamics = self._trajectory, self._trajectory.dynamics
        count = dynamics.params_count
        params = [torch.stack(c) for c in zip(*(trajectory.record.states[t][:count] for t in steps), strict=True)]
        slices = [dynamics.at_step(trajectory.extras, t) for t in steps]
        current = [
            torch.stack([row[i] for row in slices]) if stepped and i < dynamics.hyperparameters_start else slices[0][i]
            for i, stepped in enumerate(dynamics.stepped)
        ]
        dims = (*(0,) * dynamics.state_count, *(0 if stepped else None for stepped in dynamics.stepped))
        batched = dynamics.batched(Level(dims, len(steps), "error"))

        def function(roots: tuple[Tensor, ...]) -> Sequence[Tensor]:
            for number, root in zip(self._read, roots[count:], strict=True):
                current[number] = root
            losses = batched.losses(roots[:count], current)
            again = trajectory.losses_to_replay()
            again[..., [t - 1 for t in steps]] = losses.detach().movedim(0, -1)
            trajectory.refuse_other_losses(again)
            grads = autodiff.gradient(losses.sum(), roots[:count], differentiable=True)
            return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)]

        with trajectory.record.replay(None, params[0].device):
            graph = autodiff.Graph.record(function, [*params, *(current[i] for i in self._read)], check=True)
        return graph

    def _record_update(self, step: int) -> autodiff.Graph:
        """The graph of one update, with its gradient as an independent input."""
        trajectory, dynamics = self._trajectory, self._trajectory.dynamics
        current, count = list(dynamics.at_step(trajectory.extras, step)), dynamics.state_count
        grads = trajectory.record.gradients[step]

        def function(roots: tuple[Tensor, ...]) -> Leaves:
            for number, root in zip(self._hypers, roots[count + len(grads) :], strict=True):
                current[number] = root
            return dynamics.update(roots[:count], roots[count:][: len(grads)], current, step)

        inputs = [*trajectory.record.states[step], *grads, *(current[i] for i in self._hypers)]
        return autodiff.Graph.record(function, inputs)
