"""A whole solve as the probes of :func:`diffopt.check` look at it: its end, a number, and what that depends on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from diffopt.adjoint.reverse import Reverse
from diffopt.inner_problem import checked_problem
from diffopt.optimizers.base import Optimizer
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.inputs import Inputs, Place
from diffopt.rollout.problem import Problem
from diffopt.rollout.problem_in_double import problem_in_double
from diffopt.tensors import random_state
from diffopt.tensors.in_double import WatchDraws
from diffopt.tensors.leaves import Leaves, norm

PIECES = 16
"""In how many pieces of equal length, at most, the steps are taken where the adjoint is wanted between them."""

_EXACT = Reverse("sqrt")
"""Exact, in little memory: pieces that each keep all their graphs would together keep many."""

_CALLED = {"params": "params", "read": "args", "hyperparameters": "hyperparameters"}
"""What may get a hypergradient, and what to call it."""


class Found(NamedTuple):
    """The derivatives of the end of a solve.

    Attributes:
        hypergradient: by place.
        adjoints: the norm of the adjoint of the params before each piece of the steps and after the last, in order.
        every: how many steps a piece has.
        drawn: the precisions in which random numbers are drawn.
    """

    hypergradient: dict[Place, Tensor]
    adjoints: list[float]
    every: int
    drawn: set[torch.dtype]

    @property
    def ratios(self) -> list[float]:
        """The norms of the adjoint relative to the last one."""
        return [norm / self.adjoints[-1] for norm in self.adjoints]


@final
@dataclass(frozen=True)
class Whole:
    """Some steps of an inner problem, with copies of everything they are given; their end is a random mean of params.

    (An outer loss may be smoother than that: what its mean over examples cancels, random weights do not.)

    Attributes:
        dynamics: the steps.
        inputs: where they start, and all that they read.
        parts: what is moved: the places of the tensors that get a hypergradient, by what to call them.
        generators: the generators' state under which the steps are taken.
    """

    dynamics: Dynamics
    inputs: Inputs
    parts: Mapping[str, tuple[Place, ...]]
    generators: random_state.GeneratorStates

    @classmethod
    def of(
        cls, loss: Callable[..., Any], params: Any, args: tuple[Any, ...], optimizer: Optimizer, steps: int
    ) -> Whole:
        """Flatten and check what a solve is given, as :func:`diffopt.solve` does."""
        problem = checked_problem(loss, params, args, optimizer, steps, None, True)
        given, layout = problem.inputs, problem.dynamics.layout
        wanted = [place for place in layout.places if given.at(place).requires_grad]
        wanted = [x for x in wanted if x.part != "buffers" and given.at(x).is_floating_point()]
        wanted = wanted or [place for place in layout.places if place.part == "params"]
        parts = {part: tuple(place for place in wanted if place.part == part) for part in _CALLED}
        copies = Inputs(*(Leaves([x.detach().clone() for x in part]) for part in given))
        moved = {_CALLED[part]: places for part, places in parts.items() if places}
        return cls(problem.dynamics, copies, moved, random_state.snapshot(given.params[0].device))

    @property
    def wanted(self) -> list[Place]:
        """The places of all that is moved."""
        return [place for places in self.parts.values() for place in places]

    def in_double(self) -> Whole:
        """The same in double precision, where the loss runs in it."""
        problem = problem_in_double(Problem(self.dynamics, self.inputs, True))
        return replace(self, dynamics=problem.dynamics, inputs=problem.inputs)

    def value(self, moved: Mapping[Place, Tensor]) -> Tensor:
        """The end, with other tensors at some places; it may be NaN."""
        with torch.no_grad(), self._taken():
            inputs = self.inputs.put(moved)
            outcome = _EXACT.run(Problem(self.dynamics, inputs, False))
            return self._end(outcome.state)

    def derivatives(self, pieces: int = 1) -> Found:
        """The hypergradient of the end, and the adjoint between so many pieces: one exact backward pass."""
        layout, roots = self.dynamics.layout, {place: self._root(place) for place in self._differentiated()}
        inputs = self.inputs.put(roots)
        every = max(1, -(-layout.inner_steps // pieces))
        between = [inputs.params]
        with torch.enable_grad(), self._taken(), WatchDraws() as watch:
            for first in range(0, layout.inner_steps, every):
                piece = replace(layout, start=layout.start + first, inner_steps=min(every, layout.inner_steps - first))
                outcome = _EXACT.run(Problem(replace(self.dynamics, layout=piece), inputs, True))
                inputs = layout.with_state(inputs, outcome.state)
                between.append(inputs.params)
            points = [x for params in between for x in params]
            found = torch.autograd.grad(
                self._end(inputs.state), [*roots.values(), *points], allow_unused=True, materialize_grads=True
            )
        own = dict(zip(roots, found, strict=False))
        rows, count = found[len(roots) :], layout.params_count
        norms = [norm(rows[i : i + count]) for i in range(0, len(rows), count)]
        return Found({place: own[place] for place in self.wanted}, norms, every, watch.kinds)

    def _differentiated(self) -> list[Place]:
        """What is moved, and the params, whose adjoint is always looked at."""
        return list(dict.fromkeys([*(Place("params", i) for i in range(len(self.inputs.params))), *self.wanted]))

    def _root(self, place: Place) -> Tensor:
        return self.inputs.at(place).detach().requires_grad_()

    def _end(self, state: Sequence[Tensor]) -> Tensor:
        """A mean of the params with random weights, of the size of one of them."""
        generator = torch.Generator().manual_seed(1)
        params = self.dynamics.layout.params(state)
        weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in params]
        count = sum(x.numel() for x in params)
        end = torch.stack([(w * x).sum() for w, x in zip(weights, params, strict=True)]).sum()
        return end.div(count**0.5)

    @contextmanager
    def _taken(self) -> Iterator[None]:
        """The same random numbers at every entry, without warnings of the precision, which is looked at here."""
        device = self.inputs.params[0].device
        with random_state.replayed(self.generators, device), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
