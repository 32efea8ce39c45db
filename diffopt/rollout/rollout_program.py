"""``compile=True``: all steps of a rollout as one program, whose states are one stack.

# NOTE [what is looked at, and when]
The first use of a program is a plain rollout as well, with all of its checks, and so is one after anything that the
loss reads by closure has changed: a loss that gives other numbers is refused. So is every 2nd, 4th, 8th, ... use,
against what changes unseen. In between, the end and the losses are looked at: if they are not finite, the plain rollout
says which step is to blame.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from diffopt.rollout import known_programs, traced
from diffopt.rollout.compiled import refuse_stale
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.inputs import Inputs
from diffopt.rollout.layout import Layout
from diffopt.rollout.record import Counts, Keep, Kept, Rollout, Watch
from diffopt.tensors import derivatives, tracing
from diffopt.tensors.leaves import Leaves


class Plainly(Protocol):
    """The same rollout, step by step."""

    def __call__(self, inputs: Inputs, *, counts: Counts) -> tuple[Leaves, Rollout]:
        """Roll out."""
        ...


def roll_out_wholly(
    dynamics: Dynamics, inputs: Inputs, *, counts: Counts, keep: Keep | None, watch: Watch, plainly: Plainly
) -> tuple[Leaves, Rollout] | None:
    """As ``loop.roll_out``; ``None``: not by a program."""
    layout, inputs = dynamics.layout, inputs.detached()
    if not _suits(dynamics, inputs, keep):
        return None
    kept = Keep(layout.steps + 1) if keep is None else Keep(keep.first, keep.block(layout.steps), keep.gradients)
    tensors, what = [numbers_of(layout, inputs), *inputs.flat], ("rollout", kept, *kind_of_steps(layout))
    key = known_programs.key_of(dynamics, what, tensors)
    if key is None:
        return None
    known = known_programs.find(dynamics, key, tensors, lambda: _function(dynamics, kept, plainly))
    if known is None or known.program is None:
        return None
    known.set_forms(dynamics)
    captured, ran = known.program.captured, known.run(tensors)
    if ran is None:
        return None
    unsound, losses, *found = ran
    end = len(found) - _leaves_of_a_row(layout, kept)
    along, state = found[: end - layout.state_count], Leaves(found[end - layout.state_count : end])
    stack = Leaves(found[end:])
    due, unchanged, sound = known.is_due(), known.unchanged, bool(unsound.isfinite().item())
    if not unchanged or (watch.values and (due or not sound)):
        plain = plainly(inputs, counts=Counts())
        if not _is_right(known, (state, losses, along), *plain, sound=sound):
            counts.gradients += layout.steps
            return plain
        if not unchanged:
            known.settle(dynamics)
    counts.gradients += layout.steps
    return state, Rollout(
        first=None if keep is None else keep.first,
        steps=layout.steps,
        updates=layout.inner_steps,
        kept=Kept() if keep is None else traced.kept_of(stack[: layout.state_count], kept.block(layout.steps)),
        stack=stack,
        losses=losses,
        handed_out=tuple(along),
        autocast=derivatives.Autocast(inputs.params[0].device),
        key=key,
        captured=captured,
    )


def _is_right(
    known: known_programs.Known,
    found: tuple[Leaves, Tensor, Sequence[Tensor]],
    end: Leaves,
    plain: Rollout,
    *,
    sound: bool,
) -> bool:
    """Whether what a program has found is what the plain rollout has; if it never may be, the program is given up.

    Raises:
        CapturedTensorError: the loss is another one, from its first step on.
    """
    if plain.hidden_state is not None or plain.copied_to or plain.shards or plain.draws:
        known.program = None
        return False
    state, losses, along = found
    assert plain.losses is not None
    if sound:
        refuse_stale(losses[..., 0], plain.losses[..., 0])
    return sound and known.agrees([losses, *along, *state], [plain.losses, *plain.handed_out, *end])


def numbers_of(layout: Layout, inputs: Inputs) -> Tensor:
    """The numbers of the steps' first updates: an input, so that a solve that goes on needs no program of its own."""
    return _numbers(layout.first_update(1), layout.steps, layout.window, inputs.params[0].device)


@functools.lru_cache(maxsize=64)
def _numbers(first: int, steps: int, window: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(first, first + steps * window, window, device=device)


def kind_of_steps(layout: Layout) -> tuple[int, int, int | None]:
    """What steps are made up of, as far as no tensor says it."""
    return layout.inner_steps, layout.window, layout.start if any(layout.stepped.hyperparameters) else None


def _suits(dynamics: Dynamics, inputs: Inputs, keep: Keep | None) -> bool:
    layout, place = dynamics.layout, inputs.params[0].device
    if keep is not None and keep.first <= layout.steps and (not keep.stackable or keep.offload):
        return False
    if keep is not None and keep.gradients and keep.block(layout.steps) > 1:
        return False
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    alone = dynamics.micro_batches is None and layout.stream is None
    return alone and not ranks and not torch.is_inference_mode_enabled() and layout.steps > 0 and place.type == "cpu"


def _leaves_of_a_row(layout: Layout, keep: Keep) -> int:
    """How many tensors are stacked of what is kept."""
    return (layout.state_count + keep.gradients * layout.params_count) if keep.first <= layout.steps else 0


def _function(dynamics: Dynamics, keep: Keep, plainly: Plainly) -> Callable[..., Sequence[Tensor]]:
    """``(numbers, *inputs) -> (0 if all is finite, losses, *handed out, *final state, *kept states and gradients)``."""
    dynamics = replace(dynamics, compile=False)
    layout, steps = dynamics.layout, range(keep.first, dynamics.layout.steps + 1, keep.block(dynamics.layout.steps))

    def function(numbers: Tensor, *flat: Tensor) -> list[Tensor]:
        inputs = layout.inputs(flat)
        if tracing.current() is None:
            state, rollout = plainly(inputs, counts=Counts())
            rows = [(*rollout.states[t], *(rollout.gradients[t] if keep.gradients else ())) for t in steps]
            stack = [torch.stack(column) for column in zip(*rows, strict=True)]
        else:
            nobody = Counts()
            state, rollout = traced.roll_out(dynamics, inputs, counts=nobody, keep=keep, watch=Watch(), numbers=numbers)
            stack = list(rollout.stack or ()) if steps else []
        assert rollout.losses is not None
        sums = [(x - x).sum().double() for x in (rollout.losses, *state) if x.is_floating_point()]
        return [torch.stack(sums).sum(), rollout.losses, *rollout.handed_out, *state, *stack]

    return function
