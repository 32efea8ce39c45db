"""The checks of one rollout: of its losses, its gradients and its updates, at the first step and at later ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, final

import torch
from torch import Tensor

from diffopt.errors import DiffoptError
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.first_step import FirstStep
from diffopt.rollout.hidden_state import HiddenState
from diffopt.rollout.record import Keep, Watch
from diffopt.rollout.refusals import apart_from, refuse_bad_start, refuse_captures, wrapped_error
from diffopt.tensors import autograd_graph, derivatives, random_state, transforms
from diffopt.tensors.captures import everything_held
from diffopt.tensors.leaves import Leaves
from diffopt.tensors.torch_errors import changed_in_place, forward_mode_error

_SOURCE = "the inner loss (or the optimizer)"


@final
class Checks:
    """The dynamics of one rollout seen through checks, which refuse what would give a silent wrong number.

    It stands in the place of :class:`~diffopt.rollout.dynamics.Dynamics` in the loop: the loss, the gradient and the
    update are those, and what they return is looked at.

    # NOTE [what is looked for at every step, and what it costs]
    A loss may read other tensors later than at its first step (behind an ``if``, after a warm-up). So the graph of
    every loss is walked for captured tensors: about a microsecond a node, most of which makes the nodes' Python
    objects, 13 for an MLP of three layers. Of updates those are that are not this library's own.

    Attributes:
        dynamics: what is looked at.
        micro_batches: in how many pieces gradients are taken.
        observer: what looks at the params after every step.
        compares_values: whether values are looked at.
        hidden_state: the error for whoever computes a step again; ``None``: no state of the loss is known.
        whole: what the last step has read, if it was taken in pieces.
        ranks: what is looked at where other ranks take the first step, too.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        watch: Watch,
        keep: Keep | None = None,
        draws: random_state.Draws | None = None,
        *,
        passes_tangents: bool = False,
        stops: bool = False,
    ) -> None:
        """Look at nothing yet.

        Args:
            dynamics: what is looked at.
            watch: what for.
            keep: what will be kept of the steps; whoever keeps graphs calls :meth:`look_at_graph`.
            draws: where the generators stood before the steps.
            passes_tangents: plain code that forward-mode differentiation goes through.
            stops: any step may turn out to be the last.
        """
        self.dynamics, self.compares_values = dynamics, watch.values
        self.micro_batches, self.observer = dynamics.micro_batches, dynamics.observer
        self._watch, self._keep, self._draws = watch, keep, draws
        self._last, self._own_update = dynamics.layout.steps, dynamics.own_update
        self._stops = stops
        self.ranks = FirstStep.here() if watch.values else None
        self._drops_tangents = watch.values and not passes_tangents and transforms.in_dual_level()
        self._plainly = not (watch.levels or self._drops_tangents)
        self._wrapped_are_held: bool | None = None
        self._looks_for_breaks, self._born = keep is None, autograd_graph.newest()
        self._noted: list[autograd_graph.GraphPart] = []
        self._held: HiddenState | None = None
        self._stores = self._sparse = False
        self._latest: tuple[Tensor, Sequence[Tensor | None], Sequence[Tensor], bool] | None = None
        self._step = 0
        self._read: Sequence[Tensor] = ()
        self._versions: list[int] = []
        self.hidden_state: DiffoptError | None = None
        self.whole: Sequence[Tensor] | None = None

    # ------------------------------------------------------------------------------------ what the loop calls

    def losses(
        self, params: Sequence[Tensor], read: Sequence[Tensor], step: int, aux: list[Tensor] | None = None
    ) -> Tensor:
        """The losses, evaluated apart from transforms, hooks and tangents that they may not meet."""
        self._step, self._read, self._versions = step, read, [x._version for x in params]
        if self._watch.state and self._held is None and self._keep is not None:
            self._held = HiddenState(self.dynamics.loss)
        if step == 1 and self.ranks is not None and not self.ranks.evaluates:
            with self.ranks.evaluating():
                return self.losses(params, read, step, aux)
        if self._plainly:
            return self.dynamics.losses(params, read, step, aux)
        if not (self._drops_tangents or self.levels_at(step)):
            return self._unwrapped(self.dynamics.losses(params, read, step, aux), aux)
        evaluate = self._without_tangents if self._drops_tangents else self.dynamics.losses

        def function(params: Sequence[Tensor], read: Sequence[Tensor]) -> Tensor:
            if aux is not None:
                aux.clear()  # of what an evaluation before has returned besides
            return evaluate(params, read, step, aux)

        marking = not self.dynamics.layout.levels
        return self._unwrapped(self._apart(step, function, params, read, marking=marking), aux)

    def _unwrapped(self, losses: Tensor, aux: Sequence[Tensor] | None) -> Tensor:
        """The losses, unless one of them, or of what comes besides, belongs to a transform around the solve."""
        if self._watch.levels and any([transforms.is_wrapped(x) for x in (losses, *(aux or ()))]):
            raise wrapped_error()
        return losses

    def observed(self, params: Sequence[Tensor], read: Sequence[Tensor], step: int) -> Sequence[Tensor]:
        """What is observed, evaluated as the losses are."""
        versions = [x._version for x in params]
        observed: Sequence[Tensor]
        if self._plainly:
            observed = self.dynamics.observed(params, read)
        else:
            function = self._observed_without_tangents if self._drops_tangents else self.dynamics.observed
            observed = self._apart(step, function, params, read)
            if any(transforms.is_wrapped(x) for x in observed):
                raise wrapped_error()
        if versions != [x._version for x in params]:
            raise changed_in_place()
        self._refuse_captured(observed, [*params, *read], "observe")
        return observed

    def stopped(self) -> None:
        """The last step has been made, before its time: look at what was put off until then."""
        self._look_at_noted()
        if self._held is not None and self._latest is not None and self._held.has_moved():
            self._judge(self._held, *self._latest[:3], exactly=self._latest[3])

    def gradient(
        self, losses: Tensor, params: Sequence[Tensor], step: int, *, differentiable: bool
    ) -> tuple[Tensor | None, ...]:
        """The gradient; a first one tells whether the loss depends on the params and is finite there."""
        if step > 1 or self.ranks is None:
            grads = derivatives.gradient(losses, params, differentiable=differentiable)
        else:
            grads = self.ranks.gradient(losses, params, differentiable=differentiable)
        if self._versions != [x._version for x in params]:
            raise changed_in_place()
        watch, read = self._watch, self._read
        if watch.values:
            if step == 1:
                differentiated = self._keep is not None and self._keep.evaluates
                refuse_bad_start(self.dynamics, losses, grads, params, read, differentiated=differentiated)
                self._sparse = any([g is not None and transforms.is_sparse(g) for g in grads])
            if watch.captures:
                self._note_captured(losses, params, read, step, at_once=not differentiable)
        if self._sparse:
            grads = tuple([g.to_dense() if g is not None and transforms.is_sparse(g) else g for g in grads])
        if self._stops and self._held is not None:
            found = [None if g is None else g.detach() for g in grads]
            self._latest = losses.detach(), found, params, not differentiable
        if self._held is not None and step in (1, self._last) and self._held.has_moved():
            self._judge(self._held, losses, grads, params, exactly=not differentiable)
        return grads

    def update(self, state: Leaves, grads: Sequence[Tensor], hyperparameters: Sequence[Tensor], step: int) -> Leaves:
        """The update, evaluated apart from the transforms around the solve."""
        if step == 1 and self.ranks is not None and self.ranks.compares_update():
            after = self.update(state, grads, hyperparameters, step)
            self.ranks.refuse_other_updates(after)
            return after
        if self._own_update and not self._looks_for_breaks:
            return self.dynamics.update(state, grads, hyperparameters, step)
        if not torch.is_grad_enabled():  # without a graph, for which a first one is made to look at
            if step > 1 or not self._watch.values or self._own_update:
                return self.dynamics.update(state, grads, hyperparameters, step)
            with torch.enable_grad():
                roots = Leaves(derivatives.make_roots(state))
                after = self._apart_update(roots, grads, hyperparameters, step)
            self._refuse_captured(after, roots)
            return Leaves([leaf.detach() for leaf in after])
        versions = [] if self._own_update else [leaf._version for leaf in state]
        after = self._apart_update(state, grads, hyperparameters, step)
        if self._looks_for_breaks:
            autograd_graph.refuse_broken_graph([leaf.grad_fn for leaf in after])
            self._looks_for_breaks = False
        if not self._own_update:
            if versions != [leaf._version for leaf in state]:
                raise changed_in_place()
            self._refuse_captured(after, [*state, *hyperparameters, *grads])
        return after

    # ------------------------------------------------------------------------------------ captured tensors

    def levels_at(self, step: int) -> range:
        """The levels to watch: at later steps only if some tensor of theirs is held, for empty vmaps cost much."""
        if step == 1 or not self._watch.levels:
            return self._watch.levels
        if self._wrapped_are_held is None:
            self._wrapped_are_held = any(
                transforms.is_wrapped(x) for x in everything_held(self.dynamics.without_names()).tensors
            )
        return self._watch.levels if self._wrapped_are_held else _NO_LEVELS

    def _apart(
        self,
        step: int,
        function: Callable[..., Any],
        params: Sequence[Tensor],
        read: Sequence[Tensor],
        *,
        marking: bool = False,
    ) -> Any:
        """``function(params, read)``, evaluated apart from the levels that are watched.

        Where that draws random numbers, it is evaluated plainly after that, as it will be when it is computed again:
        under an empty vmap torch draws in another order if a tensor does not lie in memory in the order of its axes.
        """
        levels, device = self.levels_at(step), params[0].device
        before = random_state.snapshot(device) if levels else ()
        found = apart_from(levels, function, params, read, marking=marking)
        if not levels or not random_state.changed(before, random_state.snapshot(device)):
            return found
        with random_state.replayed(before, device):
            return function(params, read)

    def _apart_update(
        self, state: Leaves, grads: Sequence[Tensor], hyperparameters: Sequence[Tensor], step: int
    ) -> Leaves:
        levels, update = _NO_LEVELS if self._own_update else self.levels_at(step), self.dynamics.update
        if not levels:
            return update(state, grads, hyperparameters, step)
        after: Leaves = apart_from(levels, update, state, grads, hyperparameters, step)
        return after

    def _refuse_captured(self, outputs: Sequence[Tensor], given: Sequence[Tensor], what: str = _SOURCE) -> None:
        """Refuse tensors that require grad in the graph of a step, besides those that it was given or made by itself.

        ``given`` begins with the params, from which the graph grows.
        """
        if not self._watch.captures:
            return
        parts = [autograd_graph.GraphPart.of(x, given) for x in outputs if x.requires_grad]
        self._look_at(parts, parts, what)

    def _note_captured(
        self, losses: Tensor, params: Sequence[Tensor], read: Sequence[Tensor], step: int, *, at_once: bool
    ) -> None:
        """The same of a step's losses: at once, or, where graphs stay anyway, of some together, which is faster."""
        start = losses.grad_fn
        looks = at_once and start is not None and not self._noted
        # (params are leaves there, and all that a graph grows from as a rule)
        if looks and autograd_graph.ends_in_given(start, (), set(map(id, params))):
            self._born = max(self._born, autograd_graph.number(start))
            return
        wanted = [x for x in read if x.requires_grad]
        self._noted.append(autograd_graph.GraphPart.of(losses, [*params, *wanted]))
        if at_once or step == self._last or len(self._noted) == _AT_ONCE:
            self._look_at_noted()

    def look_at_graph(self, graph: Sequence[Any]) -> None:
        """Look at the graph of the first step of which one is kept, given by all its nodes.

        (Their Python objects, whose making is most of the work, are then there for what its losses have captured too.)
        """
        self._look_at_noted()
        autograd_graph.refuse_broken(graph)

    def _look_at_noted(self) -> None:
        noted, self._noted = self._noted, []
        self._look_at(noted, noted[-1:])

    def _look_at(
        self,
        parts: Sequence[autograd_graph.GraphPart],
        last: Sequence[autograd_graph.GraphPart],
        what: str = _SOURCE,
    ) -> None:
        """Look at parts of a graph; among the ``last`` is that which ends in the newest node."""
        found = autograd_graph.captured_nodes(parts, self._born)
        if found:  # else nobody needs names, which are not cheap
            refuse_captures(what, self.dynamics.functions(), found)
        newest = [autograd_graph.number(part.start) for part in last if part.start is not None]
        self._born = max([self._born, *newest])

    def _without_tangents(
        self, params: Sequence[Tensor], read: Sequence[Tensor], step: int, aux: list[Tensor] | None
    ) -> Tensor:
        with transforms.tangents_seen():
            losses = self.dynamics.losses(params, read, step, aux)
            if transforms.has_tangent([losses]):
                raise forward_mode_error("the inner loss reads a tensor that")
        return losses

    def _observed_without_tangents(self, params: Sequence[Tensor], read: Sequence[Tensor]) -> Sequence[Tensor]:
        with transforms.tangents_seen():
            observed = self.dynamics.observed(params, read)
            if transforms.has_tangent(observed):
                raise forward_mode_error("observe reads a tensor that")
        return observed

    # ------------------------------------------------------------------------------------ state that a loss keeps

    def keeps_state(self, state: Leaves, losses: Tensor) -> bool:
        """Whether the losses of the step from ``state`` come out differently if computed again, which moves nothing."""
        if not self._watch.values:
            return False
        held = HiddenState(self.dynamics.loss)

        def again() -> tuple[Tensor, Sequence[Tensor]]:
            params = [leaf.detach().requires_grad_() for leaf in self.dynamics.layout.params(state)]
            with torch.enable_grad(), self._drawing_again(params[0].device):
                if self.whole is None:
                    return self.dynamics.losses(params, self._read).detach(), ()
                pieces = self.dynamics.pieces(self.whole)
                values = [weight * self.dynamics.losses(params, piece).detach() for piece, weight in pieces]
                return sum(values[1:], params[0].new_zeros(()) + values[0]), ()

        keeps = held.matters(again, losses, (), exactly=True)
        self._held = None if keeps else held  # looked at again after the last step
        self._stores = not keeps
        return keeps

    def _drawing_again(self, device: torch.device) -> AbstractContextManager[None]:
        """Draw the random numbers of the step that is being taken once more."""
        return random_state.replayed(None if self._draws is None else self._draws.before(self._step), device)

    def _judge(
        self,
        held: HiddenState,
        losses: Tensor,
        grads: Sequence[Tensor | None],
        params: Sequence[Tensor],
        *,
        exactly: bool,
    ) -> None:
        """Note state of the loss that has moved, if its value depends on that; refuse what cannot be right.

        Looked at after the first step and after the last, by when other state may have moved, or have begun to matter.
        """

        def again() -> tuple[Tensor, Sequence[Tensor]]:
            with torch.enable_grad(), self._drawing_again(params[0].device):
                roots = [leaf.detach().requires_grad_() for leaf in params]
                value = self.dynamics.losses(roots, self._read)
                return value.detach(), derivatives.or_zeros(
                    derivatives.gradient(value, roots, differentiable=False), roots
                )

        if not held.matters(again, losses.detach(), derivatives.or_zeros(grads, params), exactly=exactly):
            return
        self.hidden_state, keep = held.error(), self._keep
        stores = self._stores or (keep is not None and keep.checkpoint not in (None, "graph"))
        if stores and keep is not None and keep.first <= self._last:
            raise self.hidden_state


_NO_LEVELS = range(0)
_AT_ONCE = 16
"""Graphs of losses that are looked at together; more would be held for long."""
