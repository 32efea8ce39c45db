"""The blocks of many updates that need no curvature: ``C_t``, ``E_t`` and ``D_t`` (derivations, section 0).

A *stack* is ``Leaves`` whose axis 0 runs over steps in a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, final

import torch
from torch import Tensor

from diffopt.adjoint.traced_updates import TracedBlocks
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.inputs import Inputs, Place
from diffopt.rollout.record import Rollout
from diffopt.tensors import autograd_graph, derivatives
from diffopt.tensors.leaves import Leaves

Factor: TypeAlias = "float | Leaves"


class UpdateBlocks(Protocol):
    """``C_t' x`` and ``E_t' x`` for many steps ``t``."""

    def to_gradient(self, adjoints: Leaves, first: int) -> Leaves:
        """``E_t' x_t``, like the params, for the stack ``x_first, x_{first+1}, ...``."""
        ...

    def scan(self, last: Leaves, first: int, end: int, pushes: Leaves | None) -> Leaves:
        """The stack ``x_{first-1}, ..., x_{end-1}`` of ``x_{t-1} = C_t' x_t + P' y_t``, from ``x_end = last``.

        ``pushes`` is the stack ``y_first, ..., y_end``, like the params; ``None``: zero.
        """
        ...


@final
@dataclass(frozen=True)
class UpdateGraph:
    """The graph of one update, pulled back as often as needed.

    Attributes:
        graph: from the state, the gradient and the hyperparameters to the state after.
        states: how many leaves the state has.
        grads: how many the gradient has.
        hypers: the places of the hyperparameters.
    """

    graph: derivatives.Graph
    states: int
    grads: int
    hypers: tuple[Place, ...]

    def to_state(self, adjoint: Leaves) -> Leaves:
        """``C_t' x``."""
        return Leaves(derivatives.or_zeros(self.graph.pullback(adjoint, range(self.states), retain=True), adjoint))

    def to_gradient(self, adjoint: Leaves) -> Leaves:
        """``E_t' x``, like the params, which come first among the leaves of a state."""
        terms = self.graph.pullback(adjoint, range(self.states, self.states + self.grads), retain=True)
        return Leaves(derivatives.or_zeros(terms, adjoint[: self.grads]))

    def to_hyperparameters(self, adjoint: Sequence[Tensor]) -> dict[Place, Tensor | None]:
        """``D_t' x`` by place; ``None`` is zero."""
        first = self.states + self.grads
        terms = self.graph.pullback(adjoint, range(first, first + len(self.hypers)), retain=True)
        return dict(zip(self.hypers, terms, strict=True))


@final
@dataclass(frozen=True)
class Updates:
    """The updates of steps ``first, ..., T`` of a rollout that kept their states and gradients."""

    dynamics: Dynamics
    inputs: Inputs
    rollout: Rollout
    first: int = 1

    @property
    def steps(self) -> range:
        """The numbers of the steps."""
        return range(self.first, self.dynamics.layout.steps + 1)

    def graph(self, step: int, hypers: Sequence[Place] = ()) -> UpdateGraph:
        """The graph of one update from the state, its gradient (as an independent input) and some hyperparameters."""
        dynamics, state, grads = self.dynamics, self.rollout.states[step], self.rollout.gradients[step]
        current = list(dynamics.layout.hyperparameters_at(self.inputs, step))

        def function(roots: tuple[Tensor, ...]) -> Leaves:
            own, read, others = dynamics.layout.split_update(roots)
            for place, root in zip(hypers, others, strict=True):
                current[place.number] = root
            return dynamics.update(own, read, current, step)

        inputs = [*state, *grads, *(current[place.number] for place in hypers)]
        return UpdateGraph(derivatives.Graph.record(function, inputs), len(state), len(grads), tuple(hypers))

    def all_terms(self, hypers: Sequence[Place], adjoints: Leaves) -> Iterator[tuple[int, dict[Place, Tensor | None]]]:
        """The steps, and ``D_t' x_t`` of each for the stack ``x_first, ..., x_T``."""
        for step in self.steps if hypers else ():
            yield step, self.graph(step, hypers).to_hyperparameters([leaf[step - self.first] for leaf in adjoints])

    def blocks(self) -> UpdateBlocks:
        """All that needs no curvature, in the form that suits the update."""
        if self.rollout.stack is not None:
            return TracedBlocks(self)
        layout, shapes = self.dynamics.layout, [leaf.shape for leaf in self.rollout.states[self.first]]
        params = layout.params_count
        # each buffer of its own: those of groups, which have some leaves each, could look like copies all together
        alike = all([count == params for _, count in layout.buffers_layout])
        alike = alike and shapes == shapes[:params] * (len(shapes) // params)
        return DiagonalBlocks(self) if self.dynamics.optimizer.elementwise and alike else GraphBlocks(self)


@final
class GraphBlocks:
    """For any update: one graph per step, pulled back step by step."""

    def __init__(self, updates: Updates) -> None:
        """Record every update."""
        self._layout = updates.dynamics.layout
        self._graphs = {step: updates.graph(step) for step in updates.steps}

    def to_gradient(self, adjoints: Leaves, first: int) -> Leaves:
        """See :class:`UpdateBlocks`."""
        rows = enumerate(zip(*adjoints, strict=True), first)
        return _stacked([self._graphs[step].to_gradient(Leaves(row)) for step, row in rows])

    def scan(self, last: Leaves, first: int, end: int, pushes: Leaves | None) -> Leaves:
        """See :class:`UpdateBlocks`."""
        rows, now = [], last
        for step in range(end, first - 1, -1):
            now = self._graphs[step].to_state(now)
            if pushes is not None:
                now = self._layout.pushed(now, pushes.map(lambda leaf, at=step - first: leaf[at]))
            rows.append(now)
        return _stacked(rows[::-1])


@final
class DiagonalBlocks:
    r"""For an update that treats every coordinate by itself: the diagonals of ``C_t`` and ``E_t``, for all steps.

    The state is then ``k`` copies of the params' shape (params, and each buffer), ``C_t`` is ``k x k`` diagonals and
    ``E_t`` is ``k``. Where one is the same number in every coordinate and step it is kept as that number. If ``C`` is
    the identity, as in plain gradient descent, a scan is a cumulative sum, and no step waits for another.
    """

    def __init__(self, updates: Updates) -> None:
        """Read the diagonals off one graph of all updates, or of each if they look at the number of their step."""
        self._first, self._size = updates.first, updates.dynamics.layout.params_count
        self._kinds = range(updates.dynamics.layout.state_count // self._size)
        count = len(updates.steps)
        try:
            first = _graph_of_any(updates, range(updates.first, updates.first + 1))
            if _depends_on_state(first, updates):
                states = _stacked([updates.rollout.states[t] for t in updates.steps])
                diagonals = self._read_off(_graph_of_any(updates, updates.steps), states)
            else:
                one = self._read_off(first, updates.rollout.states[updates.first].map(lambda leaf: leaf[None]))
                diagonals = {key: None if part is None else _repeated(part, count) for key, part in one.items()}
        except Exception:  # the step's number is looked at; or the update fails, and does so again, with its own error
            rows = [self._read_off(updates.graph(t).graph, updates.rollout.states[t]) for t in updates.steps]
            diagonals = {key: _stacked_or_none([row[key] for row in rows]) for key in rows[0]}
        factors = {key: _constant(stack) for key, stack in diagonals.items() if stack is not None}
        gradient = len(self._kinds)
        self._through = {key: factor for key, factor in factors.items() if key[1] != gradient}
        self._into_gradient = {key[0]: factor for key, factor in factors.items() if key[1] == gradient}

    def _read_off(self, graph: derivatives.Graph, state: Leaves) -> dict[tuple[int, int], Leaves | None]:
        """The diagonal between each kind of leaf that comes out and each that goes in, the last being the gradient."""
        found: dict[tuple[int, int], Leaves | None] = {}
        zeros = [leaf.new_zeros(()).expand_as(leaf) for leaf in state]
        for out in self._kinds:
            ones = list(zeros)
            ones[self._part(out)] = [leaf.new_ones(()).expand_as(leaf) for leaf in state[self._part(out)]]
            terms = graph.pullback(ones, range((len(self._kinds) + 1) * self._size), retain=True)
            for into in range(len(self._kinds) + 1):
                part = terms[self._part(into)]
                none = all(term is None for term in part)
                found[out, into] = None if none else Leaves(derivatives.or_zeros(part, state[: self._size]))
        return found

    def _part(self, kind: int) -> slice:
        return slice(kind * self._size, (kind + 1) * self._size)

    def to_gradient(self, adjoints: Leaves, first: int) -> Leaves:
        """See :class:`UpdateBlocks`."""
        end = first + len(adjoints[0]) - 1
        terms = [
            adjoints[self._part(out)] * _of_steps(f, first - self._first, end - self._first)
            for out, f in self._into_gradient.items()
        ]
        return _sum(terms, adjoints[: self._size])

    def scan(self, last: Leaves, first: int, end: int, pushes: Leaves | None) -> Leaves:
        """See :class:`UpdateBlocks`."""
        count = end - first + 1
        if self._through == {(0, 0): 1.0}:
            if pushes is not None and count == 1:
                return pushes + last
            if pushes is None:
                return last.map(lambda leaf: leaf.expand(count, *leaf.shape))
            return pushes.map(lambda leaf: leaf.flip(0).cumsum_(0).flip(0)) + last
        stack = last.map(lambda leaf: leaf.new_empty(count, *leaf.shape))
        now = [last[self._part(kind)] for kind in self._kinds]
        for step in range(end, first - 1, -1):
            old, now = now, []
            for into in self._kinds:
                terms = [old[out] * _at(f, step - self._first) for (out, i), f in self._through.items() if i == into]
                if into == 0 and pushes is not None:
                    terms.append(pushes.map(lambda leaf, at=step - first: leaf[at]))
                now.append(_sum(terms, old[into]))
            for leaf, row in zip(stack, (leaf for part in now for leaf in part), strict=True):
                leaf[step - first] = row
        return stack


class _StepIsReadError(Exception):
    """An update has looked at the number of its step."""


class _UnreadStep:
    """Stands for the number of every step at once: whoever looks at it must take the steps one by one."""

    def _refuse(self, *others: object) -> Any:
        raise _StepIsReadError

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __int__ = __float__ = __index__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __floordiv__ = __mod__ = __pow__ = __rpow__ = __neg__ = __abs__ = __round__ = __hash__ = _refuse


def _graph_of_any(updates: Updates, steps: range) -> derivatives.Graph:
    """The graph of the updates ``steps``, stacked; :class:`_StepIsReadError` if one looks at its step's number."""
    layout = updates.dynamics.layout
    if layout.window > 1:
        raise _StepIsReadError
    slices = [layout.hyperparameters_at(updates.inputs, t) for t in steps]
    current = [
        torch.stack([row[i] for row in slices]) if stepped else slices[0][i]
        for i, stepped in enumerate(layout.stepped.hyperparameters)
    ]
    batched, count = updates.dynamics.over_steps(len(slices)), layout.state_count
    states, grads = (_stacked([kept[t] for t in steps]) for kept in (updates.rollout.states, updates.rollout.gradients))
    return derivatives.Graph.record(
        lambda roots: batched.update_of_any_step(roots[:count], roots[count:], current, _UnreadStep()),
        [*states, *grads],
    )


def _depends_on_state(update: derivatives.Graph, updates: Updates) -> bool:
    """Whether the blocks of an update may differ from step to step: it saved more for them than hyperparameters."""
    nodes, inputs = list(autograd_graph.nodes(update.nodes())), updates.inputs
    stepped = any(updates.dynamics.layout.stepped.hyperparameters)
    # what a function written in Python keeps cannot be looked into
    unknown = any(hasattr(node, "saved_tensors") and not derivatives.is_root(node) for node in nodes)
    return stepped or unknown or autograd_graph.saved_bytes(nodes, (*inputs.read, *inputs.hyperparameters)) > 0


def _repeated(stack: Leaves, count: int) -> Leaves:
    return stack.map(lambda leaf: leaf.expand(count, *leaf.shape[1:]))


def _constant(stack: Leaves) -> Factor:
    """A stack of diagonals, or the one number that all of it is."""
    value = stack[0].flatten()[0]
    same = torch.stack([(leaf == value).all() for leaf in stack]).all()
    return float(value) if bool(same) else stack


def _stacked_or_none(rows: Sequence[Leaves | None]) -> Leaves | None:
    known = [row for row in rows if row is not None]
    return _stacked([known[0].zeros() if row is None else row for row in rows]) if known else None


def _of_steps(factor: Factor, first: int, last: int) -> Factor:
    return factor.map(lambda leaf: leaf[first : last + 1]) if isinstance(factor, Leaves) else factor


def _at(factor: Factor, index: int) -> Factor:
    return factor.map(lambda leaf: leaf[index]) if isinstance(factor, Leaves) else factor


def _sum(terms: Sequence[Leaves], like: Leaves) -> Leaves:
    total = terms[0] if terms else like.zeros()
    for term in terms[1:]:
        total = total + term
    return total


def _stacked(rows: Sequence[Sequence[Tensor]]) -> Leaves:
    return Leaves(torch.stack(column) for column in zip(*rows, strict=True))
