"""The blocks of many updates that need no curvature: ``C_t``, ``E_t`` and ``D_t`` (derivations, section 0).

A *stack* is ``Leaves`` whose axis 0 runs over steps in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, final

import torch
from torch import Tensor

from diffopt import autodiff
from diffopt.dynamics import Level
from diffopt.leaves import Leaves
from diffopt.trajectory import DirectTerms, Trajectory

Factor: TypeAlias = "float | Leaves"


class UpdateBlocks(Protocol):
    """``C_t' x`` and ``E_t' x`` for many steps ``t``."""

    def turn(self, adjoints: Leaves, first: int) -> Leaves:
        """``E_t' x_t``, like the params, for the stack ``x_first, x_{first+1}, ...``."""

    def scan(self, last: Leaves, first: int, end: int, pushes: Leaves | None) -> Leaves:
        """The stack ``x_{first-1}, ..., x_{end-1}`` of ``x_{t-1} = C_t' x_t + P' y_t``, from ``x_end = last``.

        ``pushes`` is the stack ``y_first, ..., y_end``, like the params; ``None``: zero.
        """


def record_update(trajectory: Trajectory, hypers: Sequence[int], step: int) -> autodiff.Graph:
    """The graph of one update from the state, its gradient (as an independent input) and the extras ``hypers``."""
    dynamics = trajectory.dynamics
    current, count = list(dynamics.at_step(trajectory.extras, step)), dynamics.state_count
    grads = trajectory.record.gradients[step]

    def function(roots: tuple[Tensor, ...]) -> Leaves:
        for number, root in zip(hypers, roots[count + len(grads) :], strict=True):
            current[number] = root
        return dynamics.update(roots[:count], roots[count:][: len(grads)], current, step)

    inputs = [*trajectory.record.states[step], *grads, *(current[i] for i in hypers)]
    return autodiff.Graph.record(function, inputs)


def add_update_terms(trajectory: Trajectory, hypers: Sequence[int], adjoints: Leaves, direct: DirectTerms) -> None:
    """Add ``D_t' x_t`` for the stack ``x_1, ..., x_T`` to the direct terms of the extras ``hypers``."""
    first = trajectory.dynamics.state_count + trajectory.dynamics.params_count
    for step in range(1, trajectory.steps + 1) if hypers else ():
        graph = record_update(trajectory, hypers, step)
        terms = graph.pullback([leaf[step - 1] for leaf in adjoints], range(first, first + len(hypers)))
        direct.add(step, dict(zip(hypers, terms, strict=True)))


@final
class GraphBlocks:
    """For any update: one graph per step, pulled back step by step."""

    def __init__(self, trajectory: Trajectory) -> None:
        """Record every update."""
        dynamics = trajectory.dynamics
        self._count, self._params = dynamics.state_count, dynamics.params_count
        self._graphs = [record_update(trajectory, (), step) for step in range(1, trajectory.steps + 1)]

    def turn(self, adjoints: Leaves, first: int) -> Leaves:
        """See :class:`UpdateBlocks`."""
        wanted, rows = range(self._count, self._count + self._params), []
        for offset, row in enumerate(zip(*adjoints, strict=True)):
            terms = self._graphs[first + offset - 1].pullback(row, wanted, retain=True)
            rows.append(autodiff.or_zeros(terms, row[: self._params]))
        return _stacked(rows)

    def scan(self, last: Leaves, first: int, end: int, pushes: Leaves | None) -> Leaves:
        """See :class:`UpdateBlocks`."""
        rows, now = [], tuple(last)
        for step in range(end, first - 1, -1):
            terms = self._graphs[step - 1].pullback(now, range(self._count), retain=True)
            now = autodiff.or_zeros(terms, now)
            if pushes is not None:
                pushed = (x + leaf[step - first] for x, leaf in zip(now, pushes, strict=False))
                now = (*pushed, *now[self._params :])
            rows.append(now)
        return _stacked(rows[::-1])


@final
class DiagonalBlocks:
    r"""For an update that treats every coordinate by itself: the diagonals of ``C_t`` and ``E_t``, for all steps.

    The state is then ``k`` copies of the params' shape (params, and each buffer), ``C_t`` is ``k x k`` diagonals and
    ``E_t`` is ``k``. Where one is the same number in every coordinate and step it is kept as that number. If ``C`` is
    the identity, as in plain gradient descent, a scan is a cumulative sum, and no step waits for another.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        """Read the diagonals off one graph of all updates, or of each if they look at the number of their step."""
        self._size = trajectory.dynamics.params_count
        self._kinds = range(trajectory.dynamics.state_count // self._size)
        steps = range(1, trajectory.steps + 1)
        try:
            states = _stacked([trajectory.record.states[t] for t in steps])
            diagonals = self._read_off(_record_all_updates(trajectory, states), states)
        except _StepIsReadError:
            rows = [self._read_off(record_update(trajectory, (), t), trajectory.final) for t in steps]
            diagonals = {key: _stacked_or_none([row[key] for row in rows]) for key in rows[0]}
        factors = {key: _constant(stack) for key, stack in diagonals.items() if stack is not None}
        gradient = len(self._kinds)
        self._through = {key: factor for key, factor in factors.items() if key[1] != gradient}
        self._turns = {key[0]: factor for key, factor in factors.items() if key[1] == gradient}

    def _read_off(self, graph: autodiff.Graph, state: Leaves) -> dict[tuple[int, int], Leaves | None]:
        """The diagonal between each kind of leaf that comes out and each that goes in, the last being the gradient."""
        found: dict[tuple[int, int], Leaves | None] = {}
        zeros = list(state.zeros())
        for out in self._kinds:
            ones = list(zeros)
            ones[self._part(out)] = [torch.ones_like(leaf) for leaf in state[self._part(out)]]
            terms = graph.pullback(ones, range((len(self._kinds) + 1) * self._size), retain=True)
            for into in range(len(self._kinds) + 1):
                part = terms[self._part(into)]
                none = all(term is None for term in part)
                found[out, into] = None if none else Leaves(autodiff.or_zeros(part, state[: self._size]))
        return found

    def _part(self, kind: int) -> slice:
        return slice(kind * self._size, (kind + 1) * self._size)

    def turn(self, adjoints: Leaves, first: int) -> Leaves:
        """See :class:`UpdateBlocks`."""
        end = first + len(adjoints[0]) - 1
        terms = [adjoints[self._part(out)] * _of_steps(f, first, end) for out, f in self._turns.items()]
        return _sum(terms, adjoints[: self._size])

    def scan(self, last: Leaves, first: int, end: int, pushes: Leaves | None) -> Leaves:
        """See :class:`UpdateBlocks`."""
        count = end - first + 1
        if self._through == {(0, 0): 1.0}:
            if pushes is None:
                return last.map(lambda leaf: leaf.expand(count, *leaf.shape))
            return pushes.map(lambda leaf: leaf.flip(0).cumsum_(0).flip(0)) + last
        rows, now = [], [last[self._part(kind)] for kind in self._kinds]
        for step in range(end, first - 1, -1):
            old, now = now, []
            for into in self._kinds:
                terms = [old[out] * _at(f, step) for (out, i), f in self._through.items() if i == into]
                if into == 0 and pushes is not None:
                    terms.append(pushes.map(lambda leaf, at=step - first: leaf[at]))
                now.append(_sum(terms, old[into]))
            rows.append([leaf for part in now for leaf in part])
        return _stacked(rows[::-1])


def update_blocks(trajectory: Trajectory) -> UpdateBlocks:
    """The blocks of all updates of a trajectory that keeps every state and gradient."""
    dynamics = trajectory.dynamics
    shapes = [leaf.shape for leaf in trajectory.final]
    kinds, rest = divmod(len(shapes), dynamics.params_count)
    alike = rest == 0 and shapes == shapes[: dynamics.params_count] * kinds
    return DiagonalBlocks(trajectory) if dynamics.optimizer.elementwise and alike else GraphBlocks(trajectory)


class _StepIsReadError(Exception):
    """An update has looked at the number of its step."""


class _UnreadStep:
    """Stands for the number of every step at once: whoever looks at it must take the steps one by one."""

    def _refuse(self, *others: object) -> Any:
        raise _StepIsReadError

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __int__ = __float__ = __index__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __floordiv__ = __mod__ = __pow__ = __rpow__ = __neg__ = __abs__ = __round__ = __hash__ = _refuse


def _record_all_updates(trajectory: Trajectory, states: Leaves) -> autodiff.Graph:
    """The graph of the updates of all steps, stacked; :class:`_StepIsReadError` if one looks at its step's number."""
    dynamics, record = trajectory.dynamics, trajectory.record
    if dynamics.window > 1:
        raise _StepIsReadError
    steps = range(1, trajectory.steps + 1)
    slices = [dynamics.at_step(trajectory.extras, t) for t in steps]
    current = [
        torch.stack([row[i] for row in slices]) if stepped else slices[0][i]
        for i, stepped in enumerate(dynamics.stepped)
    ]
    dims = (*(0,) * dynamics.state_count, *(0 if stepped else None for stepped in dynamics.stepped))
    batched = dynamics.batched(Level(dims, len(steps), "error"))
    count, grads = dynamics.state_count, _stacked([record.gradients[t] for t in steps])
    return autodiff.Graph.record(
        lambda roots: batched.update_once(roots[:count], roots[count:], current, _UnreadStep()), [*states, *grads]
    )


def _constant(stack: Leaves) -> Factor:
    """A stack of diagonals, or the one number that all of it is."""
    value = stack[0].flatten()[0]
    same = torch.stack([(leaf == value).all() for leaf in stack]).all()
    return float(value) if bool(same) else stack


def _stacked_or_none(rows: Sequence[Leaves | None]) -> Leaves | None:
    known = [row for row in rows if row is not None]
    return _stacked([known[0].zeros() if row is None else row for row in rows]) if known else None


def _of_steps(factor: Factor, first: int, end: int) -> Factor:
    return factor.map(lambda leaf: leaf[first - 1 : end]) if isinstance(factor, Leaves) else factor


def _at(factor: Factor, step: int) -> Factor:
    return factor.map(lambda leaf: leaf[step - 1]) if isinstance(factor, Leaves) else factor


def _sum(terms: Sequence[Leaves], like: Leaves) -> Leaves:
    total = terms[0] if terms else like.zeros()
    for term in terms[1:]:
        total = total + term
    return total


def _stacked(rows: Sequence[Sequence[Tensor]]) -> Leaves:
    return Leaves(torch.stack(column) for column in zip(*rows, strict=True))
