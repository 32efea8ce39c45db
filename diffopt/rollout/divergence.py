"""What is refused of a rollout because a number of it is not finite, and the step and the reason that are named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from diffopt.errors import DiffoptError, DivergenceError, NonFiniteGradientError
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.inputs import Inputs
from diffopt.rollout.layout import Layout
from diffopt.tensors import derivatives, transforms, tree
from diffopt.tensors.leaves import Leaves, all_finite
from diffopt.tensors.random_state import preserved


def refuse_divergence(
    dynamics: Dynamics, inputs: Inputs, losses: Tensor, final: Leaves, finite: Iterable[bool]
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
    reason = not_finite(dynamics.layout, inputs.params, *dynamics.layout.at_step(inputs, step or 1), step)
    if step == 1 and what == "the state after" and not reason:
        _refuse_bad_first_gradient(dynamics, inputs)
    raise DivergenceError(
        f"the inner optimizer diverged: {what} step {step} of {steps} is not finite",
        "finite numbers",
        reason or _DIVERGED,
        step=step,
    )


_DIVERGED = (
    "check the learning rate, or clip or rescale the gradients (and look for roots, norms or logarithms at zero, whose "
    "gradient is not finite)"
)


def not_finite(
    layout: Layout, params: Sequence[Tensor], read: Sequence[Tensor], hyperparameters: Sequence[Tensor], step: int
) -> str:
    """Which of the tensors that a step was given is not finite itself, in words; empty if all are."""
    names = layout.names()
    called = [*names.params]
    more = (True,) * (len(read) - len(names.read))  # of a batch that a function has handed out
    stepped = (*layout.stepped.read, *more, *layout.stepped.hyperparameters)
    own = (*layout.names_of_step()[: len(read)], *names.hyperparameters)
    called += [f"{name} at step {step}" if runs else name for name, runs in zip(own, stepped, strict=True)]
    for name, x in zip(called, (*params, *read, *hyperparameters), strict=False):
        if x.is_floating_point() and x.layout == torch.strided and not all_finite([x]):
            return f"{name} is not finite itself"
    return ""


def _refuse_bad_first_gradient(dynamics: Dynamics, inputs: Inputs) -> None:
    """Refuse a gradient at the initial params that is NaN or infinite, once it is known that the first step went wrong.

    No learning rate puts that right. It is taken again, which a run that goes well does not pay for.
    """
    grads = _first_gradient(dynamics, inputs)
    for path, grad in zip(tree.paths(dynamics.layout.params_structure), grads, strict=False):
        values = transforms.plain(grad)
        bad = values[~values.isfinite()]
        if bad.numel():
            raise NonFiniteGradientError(
                f"the gradient of the inner loss by params{path} is {float(bad[0])} at the initial params, though "
                "the loss is finite there",
                "finite numbers",
                "check for roots, norms or logarithms at zero in the inner loss (add a small number under them), "
                "or try another initialisation",
            )


def _first_gradient(dynamics: Dynamics, inputs: Inputs) -> Sequence[Tensor]:
    params, (read, _) = tuple(inputs.params), dynamics.layout.at_step(inputs, 1)
    with preserved(params[0].device):
        try:
            if transforms.transforms_active():
                found, _ = transforms.functional_gradient(partial(_losses_at, dynamics, read), params)
                return derivatives.filled(found, params)
            with torch.enable_grad():
                leaves = tuple(x.detach().requires_grad_() for x in params)
                losses = dynamics.losses(leaves, [x.detach() for x in read])
                return derivatives.filled(derivatives.gradient(losses, leaves, differentiable=False), leaves)
        except DiffoptError:  # the loss does not bear another call; the divergence is the better message then
            return ()


def _losses_at(dynamics: Dynamics, read: Sequence[Tensor], *params: Tensor) -> tuple[Tensor]:
    return (dynamics.losses(params, read),)
