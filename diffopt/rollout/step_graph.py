"""The graph of some inner steps in a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from diffopt.rollout.dynamics import Dynamics
from diffopt.tensors import derivatives
from diffopt.tensors.leaves import Leaves


@final
@dataclass(frozen=True)
class BlockTerms:
    r"""What pulling an adjoint back through a block gives.

    Attributes:
        state: the adjoint of the leaves of the state before the block that were asked for.
        shared: the block's sum of direct terms of each wanted extra that is the same in every step.
        stepped: the direct term of each wanted extra that runs over steps, by its number and the step.
    """

    state: Leaves
    shared: dict[int, Tensor | None]
    stepped: dict[tuple[int, int], Tensor | None]


@final
class Block:
    """The graph of steps ``first, first + 1, ...``, from the state before them to the state after them.

    It grows as steps are taken (:meth:`inputs` before each, :meth:`advance` after it) and is then closed, from when on
    it is held by its edges only: no tensor is kept alive but what the graph saved for itself.

    # NOTE [one graph for a block, not one per step]
    Steps are linked, so that one call of autograd pulls an adjoint through all of them and adds terms in place. Each
    step still takes its inner gradient from the state before it and looks no further back.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        state: Sequence[Tensor],
        extras: Sequence[Tensor],
        wanted: Sequence[int],
        *,
        apart: bool = False,
    ):
        """Start a block at ``state``, to be differentiated in it and in the extras ``wanted``.

        ``apart``: of one step, in which the loss reads the params :attr:`read`, the update those of the state: see
        :meth:`pullback_apart`.
        """
        self._dynamics, self._extras = dynamics, extras
        self._stepped = [i for i in wanted if dynamics.stepped[i]]
        self._shared = [i for i in wanted if not dynamics.stepped[i]]
        roots = derivatives.make_roots([*state, *(extras[i] for i in self._shared)])
        count = dynamics.state_count
        self._roots, self._shared_roots = roots, roots[count:]
        self._slices: dict[tuple[int, int], Tensor] = {}
        self._slices_at: list[tuple[int, int]] = []
        self._graph: derivatives.Graph | None = None
        self.now = Leaves(roots[:count])
        self.read = derivatives.make_roots(state[: dynamics.params_count]) if apart else None

    def inputs(self, step: int) -> list[Tensor]:
        """The extras as step ``step`` sees them, joined to the graph where they are wanted."""
        current = list(self._dynamics.at_step(self._extras, step))
        for number, root in zip(self._shared, self._shared_roots, strict=True):
            current[number] = root
        for number, root in zip(
            self._stepped, derivatives.make_roots([current[i] for i in self._stepped]), strict=True
        ):
            current[number] = self._slices[number, step] = root
        return current

    def advance(self, state: Leaves, *, shallow: bool) -> None:
        """Go on from ``state``.

        ``shallow`` says that some parameter may not have come through this step's loss. All are then made to look
        equally deep: autograd searches the whole graph behind the shallowest input of a gradient.
        """
        self.now = Leaves(derivatives.join(state.tensors)) if shallow else state

    def close(self) -> None:
        """Let go of all tensors."""
        self._graph = derivatives.Graph([*self._roots, *self._slices.values(), *(self.read or ())], self.now)
        self._slices_at = list(self._slices)
        self._roots, self._shared_roots, self._slices, self.now, self.read = (), (), {}, Leaves(()), None

    def pullback_apart(self, after: Sequence[int], adjoint: Leaves, before: Sequence[int]) -> tuple[Leaves, Leaves]:
        """Pull the adjoint of some leaves of the state after, the others' being zero, back to as many before the step.

        As often as needed. Returns what comes past the inner gradient, and what comes through it: their sum would
        swallow a small curvature in the round-off of what the update hands on.
        """
        assert self._graph is not None, "the block is still growing"
        count, params = self._dynamics.state_count, self._dynamics.params_count
        cotangents: list[Tensor | None] = [None] * count
        for i, x in zip(after, adjoint, strict=True):
            cotangents[i] = x
        read = [i for i in before if i < params]
        first = count + len(self._shared) + len(self._slices_at)
        terms = self._graph.pullback(cotangents, [*before, *(first + i for i in read)], retain=True)
        through = dict(zip(read, terms[len(before) :], strict=True))
        past = Leaves(derivatives.or_zeros(terms[: len(before)], adjoint))
        return past, Leaves(derivatives.or_zeros([through.get(i) for i in before], adjoint))

    def pullback(
        self, adjoint: Leaves, *, state: Sequence[int], direct: bool = True, retain: bool = False
    ) -> BlockTerms:
        """Pull the adjoint of the state after the block back to the state before it, and to the wanted extras.

        Args:
            adjoint: of every leaf of the state after the block.
            state: the leaves of the state before it that are asked for.
            direct: whether the wanted extras are asked for.
            retain: whether there will be another call; if not, the graph is freed on the way.
        """
        assert self._graph is not None, "the block is still growing"
        first, numbers = self._dynamics.state_count, len(self._shared) + len(self._slices_at)
        extras = range(first, first + numbers if direct else first)
        terms = self._graph.pullback(adjoint, [*state, *extras], retain=retain)
        before = Leaves(derivatives.or_zeros(terms[: len(state)], [adjoint[i] for i in state]))
        rest = terms[len(state) :]
        return BlockTerms(
            before,
            dict(zip(self._shared, rest, strict=False)),
            dict(zip(self._slices_at, rest[len(self._shared) :], strict=False)),
        )
