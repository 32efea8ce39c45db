"""The rollout of an inner problem: its steps, what is kept of them, and the checks made on the way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from diffopt.errors import DivergenceError, RandomnessError
from diffopt.rollout.bad_gradient import refuse_bad_first_gradient
from diffopt.rollout.checks import Checks, apart_from, not_finite, refuse_bad_start
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.record import Keep, Record, Watch
from diffopt.rollout.stepper import Stepper
from diffopt.tensors import autograd_graph, derivatives, saved_hooks, transforms
from diffopt.tensors.leaves import Leaves, all_finite


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
    losses = state[0].new_empty(*dynamics.tasks_shape, 0)
    record.autocast = derivatives.Autocast(state[0].device)
    with torch.no_grad(), derivatives.named_in_place_changes(), saved_hooks.kept_out():
        for step in range(1, dynamics.steps + 1):
            now, loss = stepper.take(now, step, keep)
            # One tensor for all losses: a small one per step, kept between the large ones that come and go, leaves
            # the C allocator with holes that nothing fits into, and the process grows by a state per step.
            losses = loss.new_empty(*loss.shape, dynamics.steps) if step == 1 else losses
            losses[..., step - 1] = loss
        if watch.values:
            _refuse_divergence(dynamics, losses, now, state, extras, _finite_again(dynamics, state, extras, record))
    record.usable, record.losses = keep is not None, losses
    record.first = None if keep is None else keep.first
    return now, losses


def roll_out_recorded(
    dynamics: Dynamics, state: Sequence[Tensor], extras: Sequence[Tensor], watch: Watch
) -> tuple[Leaves, Tensor]:
    """Run all steps as plain code that whatever surrounds the caller records; returns as :func:`roll_out`."""
    now, losses, largest, checks = Leaves(state), [], [], Checks(dynamics, watch, passes_tangents=True)
    recorded = torch.is_grad_enabled() or transforms.in_dual_level()
    for step in range(1, dynamics.steps + 1):
        current = dynamics.at_step(extras, step)
        grads: Sequence[Tensor | None]
        if transforms.transforms_active():
            now_params = now.tensors[: dynamics.params_count]
            function = partial(_losses, dynamics, current)
            grads, loss = apart_from(checks.levels_at(step), transforms.functional_gradient, function, now_params)
        else:
            with torch.enable_grad():
                # views, so that a tensor that is also an argument counts here as the params only
                before = now[: dynamics.params_count]
                params = [p.view_as(p) if p.requires_grad else p.detach().requires_grad_() for p in before]
                loss = checks.losses(params, current, step)
                grads = derivatives.gradient(loss, params, differentiable=recorded)
                if step == 1 and watch.values:
                    autograd_graph.refuse_broken_graph(autograd_graph.nodes(g.grad_fn for g in grads if g is not None))
        if step == 1 and watch.values:
            refuse_bad_start(dynamics, loss, grads, now, current)
        flat = derivatives.filled(grads, now[: dynamics.params_count])
        now = dynamics.update(now, flat, current, step)
        losses.append(loss.detach())
        if watch.values:
            # the largest number of each leaf, in one call: it is looked at only if the end is not finite
            largest.append(torch.stack(torch._foreach_norm([transforms.plain(x) for x in now if x.numel()], math.inf)))
    table = torch.stack(losses, dim=-1) if losses else now[0].new_empty(0)
    if watch.values:
        _refuse_divergence(dynamics, table, now, state, extras, (all_finite([x]) for x in largest))
    return now, table


def _losses(dynamics: Dynamics, current: Sequence[Tensor], *params: Tensor) -> Tensor:
    return dynamics.losses(params, current)


def refuse_other_losses(again: Tensor, losses: Tensor, autocast: derivatives.Autocast | None) -> None:
    """Refuse a replay that did not give the rollout's losses.

    Looser than round-off, which differs from one kernel to another and which the steps between two states magnify.
    """
    if torch.equal(again, losses):
        return
    eps = max(torch.finfo(losses.dtype).eps, 0.0 if autocast is None else autocast.eps)
    tolerance = max(min(1e-3, eps**0.4), 4 * eps)
    same = (
        torch.isclose(again, losses, rtol=tolerance, atol=1e-3 * tolerance, equal_nan=True)
        .reshape(-1, losses.shape[-1])
        .all(0)
    )
    if not bool(same.all()):
        step = int((~same).nonzero()[0, 0]) + 1
        raise RandomnessError(
            f"the inner loss of step {step} came out differently in the backward pass, expected the same number: it "
            "draws from numpy (or another thread drew), keeps a state, or reads what changed since the solve "
            "(data, module.eval()). Draw from torch's global generator, pass data in batches, or use Reverse('graph')"
        )


def _refuse_divergence(
    dynamics: Dynamics,
    losses: Tensor,
    final: Leaves,
    initial: Sequence[Tensor],
    extras: Sequence[Tensor],
    finite: Iterable[bool],
) -> None:
    """Refuse losses ``[..., T]`` or a final state that are not finite, naming the first step with such a one.

    ``finite`` says of every step whether the state after it is.
    """
    if all_finite([losses, *final]):
        return
    steps = losses.shape[-1]
    sound = (after and all_finite([losses[..., t]]) for t, after in enumerate(finite))
    step = next((t for t, good in enumerate(sound, 1) if not good), steps)
    what = "the state after" if all_finite([losses[..., step - 1 : step]]) else "the loss of"
    current = dynamics.at_step(extras, step) if step else extras
    reason = not_finite(dynamics, initial, current, step)
    if step == 1 and what == "the state after" and not reason:
        refuse_bad_first_gradient(dynamics, initial, extras)
    raise DivergenceError(
        f"the inner optimizer diverged: {what} step {step} of {steps} is not finite, expected finite numbers; "
        f"{reason or _DIVERGED}",
        step,
    )


def _finite_again(
    dynamics: Dynamics, state: Sequence[Tensor], extras: Sequence[Tensor], record: Record
) -> Iterator[bool]:
    """Take the steps of a rollout that kept no state once more; yields whether the state after each is finite."""
    now, stepper = Leaves(state), Stepper(dynamics, extras, record, Watch())
    for step in range(1, dynamics.steps + 1):
        now, _ = stepper.take(now, step, None)
        yield all_finite(now)


_DIVERGED = (
    "check the learning rate, or clip or rescale the gradients (and look for roots, norms or logarithms at zero, whose "
    "gradient is not finite)"
)
