"""The rollout of an inner problem: its steps, what is kept of them, and the checks made on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor

from diffopt import autodiff, graph, randomness
from diffopt.dynamics import Dynamics
from diffopt.errors import (
    CapturedTensorError,
    DisconnectedError,
    DivergenceError,
    NonFiniteLossError,
    RandomnessError,
)
from diffopt.leaves import Leaves

Checkpoint: TypeAlias = Literal["graph", "sqrt"] | int | None

GRAPH_BUDGET = 2**30
"""Bytes up to which ``checkpoint=None`` retains step graphs."""


@final
@dataclass(frozen=True)
class Keep:
    """What a rule will revisit: the steps ``first, ..., T``, and how they are kept.

    Attributes:
        first: the earliest step that will be pulled back (from 1); ``T + 1`` keeps nothing.
        checkpoint: ``"graph"``: the steps' graphs; ``k``: every ``k``-th state, blocks recomputed; ``"sqrt"``: ``k``
            near the root of the number of steps; ``None``: graphs while they fit, else ``"sqrt"``.
        gradients: keep also the inner gradient of every step whose state is kept.
    """

    first: int
    checkpoint: Checkpoint = 1
    gradients: bool = False


@final
@dataclass
class Counts:
    """What one solve has computed so far, per task; the backward pass adds to it.

    Attributes:
        gradients: evaluations of the inner gradient.
        products: curvature products, of which one gives ``H_t u`` and ``M_t' u`` together.
        depth: how many batches of curvature products had to wait for one another.
    """

    gradients: int = 0
    products: int = 0
    depth: int = 0

    def add_products(self, count: int) -> None:
        """One batch of curvature products."""
        self.products += count
        self.depth += 1


@final
@dataclass
class Record:
    """What one rollout kept. The first backward pass takes it apart; a later one rolls out again.

    Attributes:
        states: stored states ``s_t`` by ``t``.
        graphs: retained step graphs by ``t``.
        draws: the generators' states before each step that drew random numbers.
        losses: the inner losses ``[..., T]``, to which a replay is compared.
        wanted: the extras that the graphs can be pulled back to.
        gradients: stored inner gradients ``g_t`` by ``t``.
        counts: what has been computed so far.
        diagnostics: what the rule reports of its own quality.
        autocast: its state during the rollout.
        checkpoint: how steps were kept, once chosen.
        states_stored: how many states were stored in the rollout.
        bytes_stored: their bytes, or an estimate of the graphs' bytes from the first one.
    """

    wanted: tuple[int, ...] = ()
    states: dict[int, Leaves] = field(default_factory=dict)
    graphs: dict[int, autodiff.StepGraph] = field(default_factory=dict)
    draws: dict[int, randomness.GeneratorStates] = field(default_factory=dict)
    losses: Tensor | None = None
    gradients: dict[int, Leaves] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
    diagnostics: dict[str, Tensor] = field(default_factory=dict)
    autocast: autodiff.Autocast | None = None
    checkpoint: Checkpoint = 1
    states_stored: int = 0
    bytes_stored: int = 0
    usable: bool = False

    @contextmanager
    def replay(self, step: int | None, device: torch.device) -> Iterator[None]:
        """Evaluate a step's loss as in the rollout: the same random numbers, the same autocast."""
        autocast = nullcontext() if self.autocast is None else self.autocast.entered()
        with autocast, randomness.replayed(None if step is None else self.draws.get(step), device):
            yield


@final
@dataclass(frozen=True)
class Watch:
    """Which checks a rollout makes.

    Attributes:
        values: refuse losses and states that are not finite, and a loss that does not depend on params.
        captures: refuse captured tensors that require grad.
        levels: refuse captured tensors of these ``torch.func`` transforms.
    """

    values: bool = False
    captures: bool = False
    levels: range = range(0)


def roll_out(
    dynamics: Dynamics,
    state: Sequence[Tensor],
    extras: Sequence[Tensor],
    keep: Keep | None,
    record: Record,
    watch: Watch,
) -> tuple[Leaves, Tensor]:
    """Run all steps without a graph through them; returns the final state and the losses ``[..., steps]``.

    # NOTE [why the rollout runs under no_grad]
    Its inputs may require grad; with grad mode on, autograd would record the whole rollout beside what is kept here.
    Each step turns grad mode on for itself, on tensors cut off from the steps before it.
    """
    now, stepper = Leaves(state), Stepper(dynamics, extras, record, watch)
    losses = state[0].new_empty([level.size for level in reversed(dynamics.levels)] + [0])
    record.autocast = autodiff.Autocast(state[0].device)
    with torch.no_grad():
        for step in range(1, dynamics.steps + 1):
            now, loss = stepper.take(now, step, keep)
            # One tensor for all losses: a small one per step, kept between the large ones that come and go, leaves
            # the C allocator with holes that nothing fits into, and the process grows by a state per step.
            losses = loss.new_empty(*loss.shape, dynamics.steps) if step == 1 else losses
            losses[..., step - 1] = loss
        if watch.values:
            _refuse_divergence(losses.unbind(-1), now)
    record.usable, record.losses = keep is not None, losses
    return now, losses


def roll_out_recorded(
    dynamics: Dynamics, state: Sequence[Tensor], extras: Sequence[Tensor], watch: Watch
) -> tuple[Leaves, Tensor]:
    """Run all steps as plain code that whatever surrounds the caller records; returns as :func:`roll_out`."""
    now, losses = Leaves(state), []
    for step in range(1, dynamics.steps + 1):
        current = dynamics.at_step(extras, step)
        guard = autodiff.CaptureGuard(watch.levels, _refuse_wrapped) if step == 1 and watch.levels else None
        grads: Sequence[Tensor | None]
        if autodiff.transforms_active():
            now_params = now.tensors[: dynamics.params_count]
            function = partial(_losses, dynamics, current, guard)
            grads, loss = _shifted(guard, autodiff.functional_gradient)(function, now_params)
        else:
            with torch.enable_grad():
                # views, so that a tensor that is also an argument counts here as the params only
                before = now[: dynamics.params_count]
                params = [p.view_as(p) if p.requires_grad else p.detach().requires_grad_() for p in before]
                loss = _shifted(guard, dynamics.losses)(params, current, guard)
                grads = autodiff.gradient(loss.sum(), params, differentiable=True)
                if step == 1 and watch.values:
                    graph.refuse_broken_graph(grads)
        if step == 1 and watch.values:
            _refuse_bad_start(loss, grads)
        flat = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, now, strict=False)]
        now = dynamics.update(now, flat, current, step)
        losses.append(loss.detach())
    if watch.values:
        _refuse_divergence(losses, now)
    return now, torch.stack(losses, dim=-1) if losses else now[0].new_empty(0)


def _shifted(guard: autodiff.CaptureGuard | None, function: Callable[..., Any]) -> Callable[..., Any]:
    return function if guard is None else guard.shift(function)


def _losses(
    dynamics: Dynamics, current: Sequence[Tensor], guard: autodiff.CaptureGuard | None, *params: Tensor
) -> Tensor:
    return dynamics.losses(params, current, guard)


class Stepper:
    """Takes steps of one rollout, keeping of each what was asked for."""

    def __init__(self, dynamics: Dynamics, extras: Sequence[Tensor], record: Record, watch: Watch) -> None:
        self.dynamics, self.record, self.watch = dynamics, record, watch
        self.extras = tuple(extra.detach() for extra in extras)
        self._drawn: randomness.GeneratorStates | None = None
        self._check_graph = True

    def take(self, state: Leaves, step: int, keep: Keep | None) -> tuple[Leaves, Tensor]:
        """Step number ``step`` from ``state``: the next state and the losses."""
        device = state[0].device
        before = randomness.snapshot(device) if self._drawn is None else self._drawn
        with randomness.replayed(self.record.draws.get(step), device), autodiff.named_in_place_changes():
            if keep is None or step < keep.first:
                after, losses = self._plain(state, step)
            else:
                after, losses = self._kept(state, step, keep)
        self._drawn = randomness.snapshot(device)
        if randomness.changed(before, self._drawn):
            self.record.draws[step] = before
        return after, losses

    def _kept(self, state: Leaves, step: int, keep: Keep) -> tuple[Leaves, Tensor]:
        record, count = self.record, self.dynamics.steps - keep.first + 1
        if step == keep.first:
            record.checkpoint = math.isqrt(count - 1) + 1 if keep.checkpoint == "sqrt" else keep.checkpoint
            if record.checkpoint is None or record.checkpoint == "graph":
                return self._first_graph(state, step, count)
        if record.checkpoint == "graph":
            record.graphs[step], after, losses = self.graph(state, step)
            return after, losses
        if isinstance(record.checkpoint, int) and (step - keep.first) % record.checkpoint == 0:
            record.states[step] = state
            record.states_stored += 1
            record.bytes_stored += sum(leaf.nbytes for leaf in state)
        after, losses = self._plain(state, step, keep_gradients=keep.gradients)
        return after, losses

    def _first_graph(self, state: Leaves, step: int, count: int) -> tuple[Leaves, Tensor]:
        """Record the first graph, measure it, and decide whether to go on with graphs."""
        record = self.record
        recorded, after, losses = self.graph(state, step)
        expected = graph.saved_bytes(recorded.nodes(), self.extras) * count
        if record.checkpoint == "graph" or expected <= GRAPH_BUDGET:
            record.checkpoint, record.bytes_stored = "graph", expected
            record.graphs[step] = recorded
        else:
            record.checkpoint, record.states[step] = math.isqrt(count - 1) + 1, state
            record.states_stored, record.bytes_stored = 1, sum(leaf.nbytes for leaf in state)
        return after, losses

    def _plain(self, state: Leaves, step: int, *, keep_gradients: bool = False) -> tuple[Leaves, Tensor]:
        """One step without its graph."""
        dynamics, current = self.dynamics, self.dynamics.at_step(self.extras, step)
        with torch.enable_grad():
            params = autodiff.make_roots(state[: dynamics.params_count])
            losses, grads = self._losses_and_grads(params, current, step, differentiable=False)
        if keep_gradients:
            self.record.gradients[step] = Leaves(grads)
        if step == 1 and (self.watch.captures or self.watch.levels):
            self._refuse_captures_of_update(state, grads, current)
        return dynamics.update(state, grads, current, step), losses.detach()

    def _refuse_captures_of_update(self, state: Leaves, grads: Sequence[Tensor], current: Sequence[Tensor]) -> None:
        """Take the first update once more, only to see whether it reads a tensor that it was not given."""
        guard = autodiff.CaptureGuard(self.watch.levels, _refuse_wrapped)

        def update(*leaves: Tensor) -> tuple[Tensor, ...]:
            return self.dynamics.update(leaves, grads, current, 1).tensors

        with torch.enable_grad():
            roots = autodiff.make_roots(state)
            after = guard.shift(guard.watch(update))(*roots)
        if self.watch.captures and any(graph.reaches_captured(x, roots) for x in after if x.requires_grad):
            _refuse_capture()

    def graph(self, state: Leaves, step: int) -> tuple[autodiff.StepGraph, Leaves, Tensor]:
        """One step with its graph, from the state and the wanted extras to the next state."""
        dynamics, current = self.dynamics, list(self.dynamics.at_step(self.extras, step))
        seen: list[Tensor] = []

        def function(roots: tuple[Tensor, ...]) -> Leaves:
            for number, root in zip(self.record.wanted, roots[dynamics.state_count :], strict=True):
                current[number] = root
            state_roots = roots[: dynamics.state_count]
            losses, grads = self._losses_and_grads(
                state_roots[: dynamics.params_count], current, step, differentiable=True
            )
            seen.append(losses.detach())
            return dynamics.update(state_roots, grads, current, step)

        inputs = [*state, *(current[i] for i in self.record.wanted)]
        if step == 1 and (self.watch.captures or self.watch.levels):
            grads = [torch.zeros_like(p) for p in state[: dynamics.params_count]]
            self._refuse_captures_of_update(state, grads, current)
        recorded, after = autodiff.StepGraph.record(function, inputs, check=self._check_graph)
        self._check_graph = False
        return recorded, Leaves(after), seen[0]

    def _losses_and_grads(
        self, params: Sequence[Tensor], current: Sequence[Tensor], step: int, *, differentiable: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        watched = step == 1 and self.watch.levels
        guard = autodiff.CaptureGuard(self.watch.levels, _refuse_wrapped) if watched else None
        losses = _shifted(guard, self.dynamics.losses)(params, current, guard)
        if step == 1 and self.watch.captures and graph.reaches_captured(losses, params):
            _refuse_capture()
        grads = autodiff.gradient(losses.sum(), params, differentiable=differentiable)
        self.record.counts.gradients += 1
        if step == 1 and self.watch.values:
            _refuse_bad_start(losses, grads)
        return losses, tuple(torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True))


def _refuse_wrapped() -> None:
    raise CapturedTensorError(
        "the inner loss (or the optimizer) reads a tensor that it was not given and that a torch.func transform around "
        "the solve has wrapped: it captured it, through a closure or an attribute. Pass it in *args (or batches), "
        "also if it is a constant; or make it inside the loss"
    )


def _refuse_capture() -> None:
    raise CapturedTensorError(
        "the inner loss (or the optimizer) reads a tensor that it was not given: it captured it, through a closure, a "
        "module or an attribute. Such a tensor would silently get no hypergradient. Pass it in *args (or batches); "
        "a constant: .detach() it or set requires_grad_(False)"
    )


def refuse_other_losses(again: Tensor, losses: Tensor) -> None:
    """Refuse a replay that did not give the rollout's losses; looser than round-off, which may differ on a GPU."""
    if losses.numel() == 0:
        return
    tolerance = max(1e-3, 4 * torch.finfo(losses.dtype).eps)
    same = torch.isclose(again, losses, rtol=tolerance, atol=1e-6, equal_nan=True).reshape(-1, losses.shape[-1]).all(0)
    if not bool(same.all()):
        step = int((~same).nonzero()[0, 0]) + 1
        raise RandomnessError(
            f"the inner loss of step {step} came out differently when the backward pass recomputed it: it draws from a "
            "generator of its own or from numpy, or changes a state. Draw from torch's global generator, or pass the "
            "numbers in batches; or use Reverse('graph'), which recomputes nothing"
        )


def _refuse_bad_start(losses: Tensor, grads: Sequence[Tensor | None]) -> None:
    if all(grad is None for grad in grads):
        raise DisconnectedError(
            "the inner loss does not depend on params: its gradient is zero everywhere. Check that the loss uses the "
            "params it is given, and does not detach them or leave torch (.item(), .numpy())"
        )
    values = autodiff.plain(losses)
    if not bool(values.isfinite().all()):
        raise NonFiniteLossError(
            f"the inner loss is {float(values[~values.isfinite()].flatten()[0])} at the initial params, expected a "
            "finite number; check the data and the initialisation"
        )


def _refuse_divergence(losses: Sequence[Tensor], final: Leaves) -> None:
    """Refuse losses (by step) or a final state that are not finite, naming the step that led there."""
    good = [autodiff.plain(loss).isfinite().all() for loss in losses]
    good.append(torch.stack([autodiff.plain(leaf).isfinite().all() for leaf in final]).all())
    flags = torch.stack(good)
    if not bool(flags.all()):
        step, steps = int((~flags).nonzero()[0, 0]), len(losses)
        raise DivergenceError(
            f"the inner optimizer diverged: step {step} of {steps} led to a loss or state that is not finite; "
            "check the learning rate, or clip or rescale the gradients",
            step,
        )
