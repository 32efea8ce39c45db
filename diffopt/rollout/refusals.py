"""What is refused of a rollout, or warned of, and in which words."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffopt.distributed.sharded import BARE, shards
from diffopt.errors import (
    CapturedTensorError,
    DisconnectedError,
    MissingDerivativeError,
    NonFiniteGradientError,
    NonFiniteLossError,
    PrecisionWarning,
    RandomnessError,
    RanksError,
)
from diffopt.rollout.divergence import not_finite
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.field import VectorField, refuse_constant
from diffopt.tensors import derivatives, transforms
from diffopt.tensors.captures import everything_held, mend_for, names_of
from diffopt.tensors.leaves import all_finite


def apart_from(levels: range, function: Callable[..., Any], *arguments: Any, marking: bool = False) -> Any:
    """Call ``function`` and refuse a captured tensor that a transform has wrapped at one of ``levels``."""
    try:
        return transforms.apart_from(levels, function, *arguments, marking=marking)
    except transforms.WrappedTensorError as error:
        raise wrapped_error() from error


def wrapped_error() -> CapturedTensorError:
    """The error for a captured tensor of a transform around the solve."""
    return CapturedTensorError(
        "the inner loss (or the optimizer) reads a tensor of a torch.func transform around the solve without "
        "being given it: it captured it",
        "among the arguments",
        "pass it in *args (or batches), by itself or in a dict, a list or a tuple, also if it is a constant; or "
        "make it inside the loss",
    )


def refuse_captures(what: str, functions: Sequence[object], nodes: Sequence[Any]) -> None:
    """Refuse the captured tensors that require grad at these nodes of a graph; ``functions`` may know their names."""
    if nodes:
        raise CapturedTensorError(
            f"{what} reads {names_of(nodes, functions)} without being given it: it captured it, and gives it no "
            "hypergradient",
            "among the arguments",
            mend_for(nodes, functions),
        )


def is_imprecise(dynamics: Dynamics, params: Sequence[Tensor]) -> bool:
    """Whether a hypergradient is known to be several percent off, and more the more steps: in half precision."""
    return dynamics.layout.steps > 0 and _precision(params)[0] in (torch.float16, torch.bfloat16)


def _precision(params: Sequence[Tensor]) -> tuple[torch.dtype, str]:
    """What steps are computed in, and who says so."""
    place = params[0].device.type
    if torch.is_autocast_enabled(place):
        return torch.get_autocast_dtype(place), "torch.autocast"
    return params[0].dtype, "params"


def warn_of_precision(dynamics: Dynamics, params: Sequence[Tensor]) -> None:
    """Warn of a hypergradient in half precision."""
    dtype, where = _precision(params)
    steps, name = dynamics.layout.inner_steps, str(dtype).removeprefix("torch.")
    warnings.warn(
        f"the hypergradient of {steps} steps is computed in {name} ({where}), in which it is inaccurate: a few percent "
        "to a third off for one step, more for more, measured beside float64 (docs/precision.md). Use float32 where it "
        "matters, or silence diffopt.PrecisionWarning",
        PrecisionWarning,
        stacklevel=2,
    )


def refuse_bad_start(
    dynamics: Dynamics,
    losses: Tensor,
    grads: Sequence[Tensor | None],
    params: Sequence[Tensor],
    read: Sequence[Tensor],
    *,
    differentiated: bool,
) -> None:
    """Refuse a first loss that does not depend on params, or is not finite, or whose gradient is sparse.

    (The last only if the gradient is to be differentiated.)
    """
    if all([grad is None for grad in grads]):
        if shards(everything_held(dynamics.without_names()).modules):
            raise RanksError(
                "the inner loss does not depend on params: the hooks of a sharded module that it calls put that "
                "module's own parameters in their place",
                "the bare module",
                BARE,
            )
        raise DisconnectedError(
            "the inner loss does not depend on params",
            "a gradient",
            "check that the loss uses the params it is given, and does not detach them or leave torch (.item(), "
            ".numpy())",
        )
    sparse = [i for i, grad in enumerate(grads) if grad is not None and transforms.is_sparse(grad)]
    if sparse and differentiated:
        raise MissingDerivativeError(
            f"the gradient of the inner loss by {dynamics.layout.names().params[sparse[0]]} is sparse",
            "a dense one, which can be differentiated",
            "write sparse=False for the sparse=True of embeddings",
        )
    if isinstance(dynamics.loss, VectorField):
        refuse_constant(losses, params, grads, dynamics.layout.names().params)
    values = transforms.unwrapped(losses)
    if math.isfinite(values.item() if values.ndim == 0 else values.detach().sum().item()):
        return
    values = values.detach()
    if not bool(values.isfinite().all()):
        named = not_finite(dynamics.layout, params, read, (), 1)
        raise NonFiniteLossError(
            f"the inner loss is {float(values[~values.isfinite()].flatten()[0])} at the initial params",
            "a finite number",
            named or "check the data and the initialisation",
        )


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
            f"the inner loss of step {step} came out differently in the backward pass",
            "the same number",
            "it draws from numpy (or another thread drew), keeps a state, or reads what changed since the solve "
            "(data, module.eval()). Draw from torch's global generator, pass data in batches, or use "
            "Reverse('graph')",
        )


def refuse_non_finite(cotangent: Sequence[Tensor]) -> None:
    """Refuse a hypergradient that is not finite; ``cotangent`` is the outer loss's gradient, if it is known."""
    outer = ""
    if cotangent:
        finite = "is finite" if all_finite(cotangent) else "is not finite itself: check that loss"
        outer = f"The gradient of the outer loss at the solution {finite}. "
    raise NonFiniteGradientError(
        "the hypergradient is NaN or infinite",
        "finite numbers",
        f"{outer}Check for roots, norms or logarithms at zero in the inner loss, or take fewer or smaller steps",
    )
