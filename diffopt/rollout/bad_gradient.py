"""A first gradient that is not finite: no fault of the optimizer, and no learning rate mends it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from diffopt.errors import DiffoptError, NonFiniteGradientError
from diffopt.rollout.dynamics import Dynamics
from diffopt.tensors import derivatives, transforms, tree
from diffopt.tensors.random_state import preserved


def refuse_bad_first_gradient(dynamics: Dynamics, initial: Sequence[Tensor], extras: Sequence[Tensor]) -> None:
    """Refuse a gradient at the initial params that is NaN or infinite, once it is known that the first step went wrong.

    It is taken again, which a run that goes well does not pay for.
    """
    grads = _first_gradient(dynamics, initial, extras)
    for path, grad in zip(tree.paths(dynamics.params_structure), grads, strict=False):
        values = transforms.plain(grad)
        bad = values[~values.isfinite()]
        if bad.numel():
            raise NonFiniteGradientError(
                f"the gradient of the inner loss by params{path} is {float(bad[0])} at the initial params, though the "
                "loss is finite there, expected finite numbers: check for roots, norms or logarithms at zero in the "
                "inner loss (add a small number under them), or try another initialisation"
            )


def _first_gradient(dynamics: Dynamics, initial: Sequence[Tensor], extras: Sequence[Tensor]) -> Sequence[Tensor]:
    params, current = tuple(initial[: dynamics.params_count]), dynamics.at_step(extras, 1)
    with preserved(params[0].device):
        try:
            if transforms.transforms_active():
                found, _ = transforms.functional_gradient(partial(_losses, dynamics, current), params)
                return derivatives.filled(found, params)
            with torch.enable_grad():
                leaves = tuple(x.detach().requires_grad_() for x in params)
                losses = dynamics.losses(leaves, [x.detach() for x in current])
                return derivatives.filled(derivatives.gradient(losses, leaves, differentiable=False), leaves)
        except DiffoptError:  # the loss does not bear another call; the divergence is the better message then
            return ()


def _losses(dynamics: Dynamics, current: Sequence[Tensor], *params: Tensor) -> Tensor:
    return dynamics.losses(params, current)
