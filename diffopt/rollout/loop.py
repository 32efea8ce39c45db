r"""The rollout of an inner problem: slice, losses, gradient, update, keep, for every step.

.. math:: g_t = \nabla_{params}\, loss(params_t, read_t),\qquad s_{t+1} = U(s_t, g_t; \eta_t)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffopt.rollout import compiled, rollout_program, traced
from diffopt.rollout.along import NEVER, Stop, Tables
from diffopt.rollout.checks import Checks
from diffopt.rollout.divergence import refuse_divergence
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.inputs import Inputs, Place
from diffopt.rollout.keeper import GRAPH_BUDGET, Keeper
from diffopt.rollout.pieces import pieced
from diffopt.rollout.record import Counts, Keep, Kept, Rollout, Watch
from diffopt.rollout.step_graph import Block, Plain
from diffopt.tensors import derivatives, random_state, saved_hooks, tracing
from diffopt.tensors.leaves import Leaves, all_finite

_NOTHING = Watch()


def take_step(
    steps: Dynamics | Checks, ground: Block | Plain, step: int, *, observes: bool = True, stop: Stop = NEVER
) -> tuple[Sequence[Tensor], Tensor | None]:
    """Take step ``step`` on ``ground``, which then stands at the next state.

    Returns what it hands out (its losses, what is observed after it, what the loss returns besides), and for each task
    whether the gradient was small enough to stop (``None``: nobody asks). If it was for all, the step is not taken.
    """
    aux: list[Tensor] = []
    found: Sequence[Tensor | None]
    with torch.enable_grad():
        state, params, read, hyperparameters = ground.slice(step)
        if steps.micro_batches is None:
            losses = steps.losses(params, read, step, aux)
            found = steps.gradient(losses, params, step, differentiable=ground.linked)
        else:
            losses, found = pieced(steps, params, read, step, linked=ground.linked)
    grads = derivatives.filled(found, params)
    enough = None if stop.tol is None else stop.reached(grads, losses.ndim)
    if enough is not None and bool(enough.all()):
        return (losses.detach(), *aux), enough
    with torch.set_grad_enabled(ground.linked):
        after = steps.update(state, grads, hyperparameters, step)
        ground.keep(after, grads, losses, step, shallow=grads is not found)
    observed = _observed(steps, ground, read, step) if observes and steps.observer is not None else ()
    return (losses.detach(), *[x.detach() for x in observed], *aux), enough


def _observed(steps: Dynamics | Checks, ground: Block | Plain, read: Sequence[Tensor], step: int) -> Sequence[Tensor]:
    with torch.enable_grad():
        observed = steps.observed(ground.params, read, step)
    ground.hand_out(observed)
    return observed


def _look(dynamics: Dynamics, inputs: Inputs) -> Sequence[Tensor]:
    """What is observed of the initial params, as if after the first step."""
    with torch.enable_grad():
        params = [x.detach().requires_grad_() for x in inputs.params]
        return [x.detach() for x in dynamics.observed(params, dynamics.layout.at_step(inputs, 1)[0])]


def roll_out(
    dynamics: Dynamics,
    inputs: Inputs,
    *,
    counts: Counts,
    keep: Keep | None = None,
    wanted: Collection[Place] = (),
    watch: Watch = _NOTHING,
    draws: Mapping[int, random_state.GeneratorStates] | None = None,
    stop: Stop = NEVER,
) -> tuple[Leaves, Rollout]:
    """Run all steps without a graph through them; returns the final state, and what was handed out and kept.

    Args:
        dynamics: the inner problem.
        inputs: all its tensors.
        counts: what is computed is added to it.
        keep: what is kept of the steps; ``None``: nothing.
        wanted: the inputs besides the state that a kept graph can be pulled back to.
        watch: what is checked.
        draws: the generators' states for steps that are to draw the same random numbers again.
        stop: what may end it before its last step.

    # NOTE [why the rollout runs under no_grad]
    Its inputs may require grad; with grad mode on, autograd would record the whole rollout beside what is kept here.
    Each step turns grad mode on for itself, on tensors cut off from the steps before it.
    """
    if tracing.current() is not None and _is_one_step(dynamics, keep, stop):
        return _record(dynamics, inputs, counts=counts, wanted=wanted, watch=watch)
    if tracing.current() is not None:
        return traced.roll_out(dynamics, inputs, counts=counts, keep=keep, wanted=wanted, watch=watch, stop=stop)
    if dynamics.compile and keep is not None:
        keep = keep.within(GRAPH_BUDGET, dynamics.layout.steps, inputs.state)
    if dynamics.compile and stop is NEVER and not draws:
        plainly = partial(_roll_out_plainly, dynamics, keep=keep, wanted=wanted, watch=watch)
        found = rollout_program.roll_out_wholly(
            dynamics, inputs, counts=counts, keep=keep, watch=watch, plainly=plainly
        )
        if found is not None:
            return found[0], replace(found[1], wanted=tuple(wanted))
    layout, inputs = dynamics.layout, inputs.detached()
    ground: Block | Plain = Plain(dynamics, inputs, inputs.state)
    stops, device = stop is not NEVER, inputs.params[0].device
    keeper, drawn = Keeper(dynamics, inputs, keep, wanted, stops=stops), random_state.Draws(device, draws)
    known, steps = drawn.known, Checks(dynamics, watch, keep, drawn, stops=stops) if watch else dynamics
    fast = compiled.Steps(dynamics, inputs) if dynamics.compile and dynamics.aux is None and stop.tol is None else None
    tables, done, enough = Tables(len(layout.levels), layout.steps), 0, None
    autocast = derivatives.Autocast(device)
    if layout.stream is not None:
        layout.stream.remember(latest=fast is not None)
    with torch.no_grad(), derivatives.named_in_place_changes(), saved_hooks.kept_out():
        rows: Sequence[Tensor] = []
        for step in range(1, layout.steps + 1):
            ground = keeper.before(ground, step) if step >= keeper.first else ground
            with random_state.replayed(known[step], device) if step in known else nullcontext():
                # (on a graph no step is compiled; the first one is looked at all the same)
                looks = step == 1 and watch.values and ground.linked
                place = Plain(dynamics, inputs, ground.state) if looks else ground
                made = None if fast is None else fast.take(place, step)
                trusted = made is not None and not (step == 1 and watch.values)
                if made is None or not trusted:
                    rows, enough = take_step(steps, ground, step, stop=stop)
                if made is not None and not trusted:
                    compiled.refuse_stale(made.losses, rows[0])
                elif made is not None:
                    ground.keep(made.after, made.grads, made.losses, step)
                    read = layout.at_step(inputs, step)[0]
                    rows = made.losses, *([] if dynamics.observer is None else _observed(steps, ground, read, step))
            if enough is not None and bool(enough.all()):
                if step == 1:  # what would have been handed out, of which there is nothing, says its form
                    tables.write(1, (rows[0], *_look(dynamics, inputs), *rows[1:]), dynamics.names_of_rows)
                break
            ground, done = keeper.after(ground, step, steps, rows[0]) if step >= keeper.first else ground, step
            tables.write(step, rows, dynamics.names_of_rows)
            drawn.look(step)
            if stop.on_step is not None and stop.told(layout.first_update(step) + layout.length(step) - 1, rows[0]):
                break
        if layout.stream is not None:
            layout.stream.remember(latest=False)
        state, handed_out = ground.state, tables.until(done)
        losses = handed_out[0] if handed_out else inputs.params[0].new_empty(*layout.tasks_shape, 0)
        if isinstance(steps, Checks) and done < layout.steps:
            steps.stopped()
        if watch.values:
            made_again = _finite_again(dynamics.until(done), inputs, known)
            refuse_divergence(dynamics, inputs, losses, state, made_again)
    counts.gradients += done if enough is None or not bool(enough.all()) else done + 1
    keeper.finish(ground, done)
    return state, Rollout(
        wanted=tuple(wanted),
        first=None if keep is None else keeper.first,
        steps=done,
        updates=min(done * layout.window, layout.inner_steps),
        enough=enough,
        kept=keeper.kept,
        states=keeper.states,
        gradients=keeper.gradients,
        graphs=keeper.graphs,
        losses=losses,
        handed_out=tuple(handed_out[1:]),
        draws=known,
        autocast=autocast,
        hidden_state=steps.hidden_state if isinstance(steps, Checks) else None,
        copied_to=tuple(steps.ranks.copied_to) if isinstance(steps, Checks) and steps.ranks is not None else (),
        shards=isinstance(steps, Checks) and steps.ranks is not None and steps.ranks.shards,
    )


def _is_one_step(dynamics: Dynamics, keep: Keep | None, stop: Stop) -> bool:
    """Whether all there is to roll out is one step whose graph may be kept."""
    layout = dynamics.layout
    besides = (dynamics.micro_batches, dynamics.observer, dynamics.aux, layout.stream)
    one = stop is NEVER and layout.steps == layout.inner_steps == 1
    return one and all([x is None for x in besides]) and keep == Keep(first=1, checkpoint=None)


def _record(
    dynamics: Dynamics, inputs: Inputs, *, counts: Counts, wanted: Collection[Place], watch: Watch
) -> tuple[Leaves, Rollout]:
    """That step, into the trace that is being made, with its graph: the way back needs no other one."""
    inputs, autocast = inputs.detached(), derivatives.Autocast(inputs.params[0].device)
    block = Block(dynamics, inputs, wanted, inputs.state)
    with torch.no_grad():
        (losses,), _ = take_step(dynamics, block, 1)
        state = block.state
        block.close()
        if watch.values:
            traced.note_finite([losses, *state])
    counts.gradients += 1
    return state, Rollout(
        wanted=tuple(wanted),
        first=1,
        steps=1,
        updates=1,
        kept=Kept("graph"),
        graphs=[block],
        losses=losses.unsqueeze(-1),
        autocast=autocast,
    )


def _roll_out_plainly(dynamics: Dynamics, inputs: Inputs, **options: Any) -> tuple[Leaves, Rollout]:
    return roll_out(replace(dynamics, compile=False), inputs, **options)


def _finite_again(
    dynamics: Dynamics, inputs: Inputs, draws: Mapping[int, random_state.GeneratorStates]
) -> Iterator[bool]:
    """Take the steps of a rollout once more; yields whether the state after each is finite."""
    ground = Plain(dynamics, inputs, inputs.state)
    for step in range(1, dynamics.layout.steps + 1):
        with random_state.replayed(draws.get(step), inputs.params[0].device):
            take_step(dynamics, ground, step)
        yield all_finite(ground.state)
