r"""The rollout of an inner problem: slice, losses, gradient, update, keep, for every step.

.. math:: g_t = \nabla_{params}\, loss(params_t, read_t),\qquad s_{t+1} = U(s_t, g_t; \eta_t)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from diffopt.rollout import compiled
from diffopt.rollout.checks import Checks
from diffopt.rollout.divergence import refuse_divergence
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.inputs import Inputs, Place
from diffopt.rollout.keeper import Keeper
from diffopt.rollout.record import Counts, Keep, Rollout, Watch
from diffopt.rollout.step_graph import Block, Plain
from diffopt.tensors import derivatives, random_state, saved_hooks
from diffopt.tensors.leaves import Leaves, all_finite

_NOTHING = Watch()


def take_step(steps: Dynamics | Checks, ground: Block | Plain, step: int) -> Tensor:
    """Take step ``step`` on ``ground``, which then stands at the next state; returns the losses."""
    with torch.enable_grad():
        state, params, read, hyperparameters = ground.slice(step)
        losses = steps.losses(params, read, step)
        found = steps.gradient(losses, params, step, differentiable=ground.linked)
    grads = derivatives.filled(found, params)
    with torch.set_grad_enabled(ground.linked):
        after = steps.update(state, grads, hyperparameters, step)
        ground.keep(after, grads, shallow=any([x is None for x in found]))
    return losses.detach()


def roll_out(
    dynamics: Dynamics,
    inputs: Inputs,
    *,
    counts: Counts,
    keep: Keep | None = None,
    wanted: Collection[Place] = (),
    watch: Watch = _NOTHING,
    draws: Mapping[int, random_state.GeneratorStates] | None = None,
) -> tuple[Leaves, Rollout]:
    """Run all steps without a graph through them; returns the final state, and the losses with all that was kept.

    Args:
        dynamics: the inner problem.
        inputs: all its tensors.
        counts: what is computed is added to it.
        keep: what is kept of the steps; ``None``: nothing.
        wanted: the inputs besides the state that a kept graph can be pulled back to.
        watch: what is checked.
        draws: the generators' states for steps that are to draw the same random numbers again.

    # NOTE [why the rollout runs under no_grad]
    Its inputs may require grad; with grad mode on, autograd would record the whole rollout beside what is kept here.
    Each step turns grad mode on for itself, on tensors cut off from the steps before it.
    """
    layout, inputs = dynamics.layout, inputs.detached()
    ground: Block | Plain = Plain(dynamics, inputs, inputs.state)
    device, keeper = inputs.params[0].device, Keeper(dynamics, inputs, keep, wanted)
    drawn = random_state.Draws(device, draws)
    known, steps = drawn.known, Checks(dynamics, watch, keep, drawn) if watch else dynamics
    fast = compiled.Steps(dynamics, inputs) if dynamics.compile else None
    losses = inputs.params[0].new_empty(*layout.tasks_shape, 0)
    autocast = derivatives.Autocast(device)
    with torch.no_grad(), derivatives.named_in_place_changes(), saved_hooks.kept_out():
        for step in range(1, layout.steps + 1):
            ground = keeper.before(ground, step) if step >= keeper.first else ground
            with random_state.replayed(known[step], device) if step in known else nullcontext():
                done = None if fast is None else fast.take(ground, step)
                trusted = done is not None and not (step == 1 and watch.values)
                loss = done.losses if done is not None and trusted else take_step(steps, ground, step)
            if done is not None and not trusted:
                compiled.refuse_stale(done.losses, loss)
            elif done is not None:
                ground.keep(done.after, done.grads)
            ground = keeper.after(ground, step, steps, loss) if step >= keeper.first else ground
            # One tensor for all losses: a small one per step, kept between the large ones that come and go, leaves
            # the C allocator with holes that nothing fits into, and the process grows by a state per step.
            losses = loss.new_empty(*loss.shape, layout.steps) if step == 1 else losses
            losses.select(-1, step - 1).copy_(loss)
            drawn.look(step)
        state = ground.state
        if watch.values:
            refuse_divergence(dynamics, inputs, losses, state, _finite_again(dynamics, inputs, known))
    counts.gradients += layout.steps
    for block in keeper.graphs:
        block.close()
    return state, Rollout(
        wanted=tuple(wanted),
        first=None if keep is None else keep.first,
        kept=keeper.kept,
        states=keeper.states,
        gradients=keeper.gradients,
        graphs=keeper.graphs,
        losses=losses,
        draws=known,
        autocast=autocast,
        hidden_state=steps.hidden_state if isinstance(steps, Checks) else None,
    )


def _finite_again(
    dynamics: Dynamics, inputs: Inputs, draws: Mapping[int, random_state.GeneratorStates]
) -> Iterator[bool]:
    """Take the steps of a rollout once more; yields whether the state after each is finite."""
    ground = Plain(dynamics, inputs, inputs.state)
    for step in range(1, dynamics.layout.steps + 1):
        with random_state.replayed(draws.get(step), inputs.params[0].device):
            take_step(dynamics, ground, step)
        yield all_finite(ground.state)
