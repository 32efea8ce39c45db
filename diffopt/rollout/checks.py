"""The checks of one rollout: of its losses, its gradients and its updates, at the first step and at later ones."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from diffopt.errors import (
    CapturedTensorError,
    DisconnectedError,
    NonFiniteGradientError,
    NonFiniteLossError,
    PrecisionWarning,
)
from diffopt.rollout.dynamics import Dynamics
from diffopt.rollout.record import Watch
from diffopt.tensors import autograd_graph, transforms
from diffopt.tensors.captures import everything_held, mend_for, names_of
from diffopt.tensors.leaves import Leaves, all_finite
from diffopt.tensors.torch_errors import forward_mode_error


@final
class Checks:
    """Evaluates the losses and the first update of one rollout, and refuses what would give a silent wrong number.

    # NOTE [what is looked for at every step, and what it costs]
    A loss may read other tensors later than at its first step (behind an ``if``, after a warm-up). So the graph of
    every loss is walked for captured tensors: about half a microsecond a node, 7 for an MLP of three layers. Of updates
    those are, and later than at their first step, that are not this library's own.
    """

    def __init__(self, dynamics: Dynamics, watch: Watch, *, passes_tangents: bool = False) -> None:
        """Look at nothing yet. ``passes_tangents``: plain code that forward-mode differentiation goes through."""
        self.dynamics, self.watch = dynamics, watch
        self._drops_tangents = watch.values and not passes_tangents
        self._wrapped_are_held: bool | None = None
        self._born = -1

    def losses(self, params: Sequence[Tensor], current: Sequence[Tensor], step: int) -> Tensor:
        """The losses, evaluated apart from transforms, hooks and tangents that they may not meet."""
        losses: Tensor = apart_from(self.levels_at(step), self._evaluated, params, current)
        if self.watch.levels and transforms.is_wrapped(losses):
            raise _wrapped_error()
        return losses

    def update(self, state: Leaves, grads: Sequence[Tensor], current: Sequence[Tensor], step: int) -> Leaves:
        """The update, evaluated apart from the transforms around the solve."""
        after: Leaves = apart_from(self.levels_at(step), self.dynamics.update, state, grads, current, step)
        return after

    def levels_at(self, step: int) -> range:
        """The levels to watch: at later steps only if some tensor of theirs is held, for empty vmaps cost much."""
        if not self.watch.levels:
            return range(0)
        if self._wrapped_are_held is None:
            self._wrapped_are_held = any(
                transforms.is_wrapped(x) for x in everything_held(self.dynamics.functions()).tensors
            )
        return self.watch.levels if step == 1 or self._wrapped_are_held else range(0)

    def refuse_captured(self, outputs: Sequence[Tensor], given: Sequence[Tensor]) -> None:
        """Refuse tensors that require grad in the graph of a step, besides those that it was given or made by itself.

        ``given`` begins with the params, from which the graph grows.
        """
        if self.watch.captures:
            starts = [x.grad_fn for x in outputs if x.requires_grad]
            found = autograd_graph.captured_nodes(starts, given, self._born)
            if found:  # else nobody needs names, which are not cheap
                refuse_captures("the inner loss (or the optimizer)", self.dynamics.functions(), found)
            if given[0].grad_fn is None:
                self._born = max([self._born, *map(autograd_graph.number, starts)])

    def refuse_captured_by_update(self, after: Sequence[Tensor], given: Sequence[Tensor], step: int) -> None:
        """The same for the update of a step."""
        if step == 1 or type(self.dynamics.optimizer.template).__module__ != "diffopt.optimizers":
            self.refuse_captured(after, given)

    def _evaluated(self, params: Sequence[Tensor], current: Sequence[Tensor]) -> Tensor:
        if self._drops_tangents and transforms.in_dual_level():
            return self._without_tangents(params, current)
        return self.dynamics.losses(params, current)

    def _without_tangents(self, params: Sequence[Tensor], current: Sequence[Tensor]) -> Tensor:
        with transforms.tangents_seen():
            losses = self.dynamics.losses(params, current)
            if transforms.has_tangent([losses]):
                raise forward_mode_error("the inner loss reads a tensor that")
        return losses


def apart_from(levels: range, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function`` and refuse a captured tensor that a transform has wrapped at one of ``levels``."""
    try:
        return transforms.apart_from(levels, function, *arguments)
    except transforms.WrappedTensorError as error:
        raise _wrapped_error() from error


def _wrapped_error() -> CapturedTensorError:
    return CapturedTensorError(
        "the inner loss (or the optimizer) reads a tensor of a torch.func transform around the solve without being "
        "given it: it captured it, expected among the arguments. Pass it in *args (or batches), by itself or in a "
        "dict, a list or a tuple, also if it is a constant; or make it inside the loss"
    )


def refuse_captures(what: str, functions: Sequence[object], nodes: Sequence[Any]) -> None:
    """Refuse the captured tensors that require grad at these nodes of a graph; ``functions`` may know their names."""
    if nodes:
        raise CapturedTensorError(
            f"{what} reads {names_of(nodes, functions)} without being given it: it captured it, and gives it no "
            f"hypergradient; expected among the arguments. {mend_for(nodes, functions)}"
        )


def warn_of_precision(dynamics: Dynamics, params: Sequence[Tensor]) -> None:
    """Warn of a hypergradient in half precision: it is known to be several percent off, and more the more steps."""
    place, dtype = params[0].device.type, params[0].dtype
    where = "params"
    if torch.is_autocast_enabled(place):
        dtype, where = torch.get_autocast_dtype(place), "torch.autocast"
    if dynamics.steps and torch.finfo(dtype).eps > 1e-4:
        warnings.warn(
            f"the hypergradient of {dynamics.inner_steps} steps is computed in {str(dtype).removeprefix('torch.')} "
            f"({where}), in which it is inaccurate: a few percent to a third off for one step, more for more, measured "
            "beside float64 (docs/precision.md). Use float32 where it matters, or silence diffopt.PrecisionWarning",
            PrecisionWarning,
            stacklevel=2,
        )


def refuse_bad_start(
    dynamics: Dynamics,
    losses: Tensor,
    grads: Sequence[Tensor | None],
    params: Sequence[Tensor],
    current: Sequence[Tensor],
) -> None:
    """Refuse a first loss that does not depend on params or is not finite."""
    if all(grad is None for grad in grads):
        raise DisconnectedError(
            "the inner loss does not depend on params, expected a gradient: check that the loss uses the params it is "
            "given, and does not detach them or leave torch (.item(), .numpy())"
        )
    values = transforms.plain(losses)
    if not (math.isfinite(values) if values.ndim == 0 else bool(values.isfinite().all())):
        raise NonFiniteLossError(
            f"the inner loss is {float(values[~values.isfinite()].flatten()[0])} at the initial params, expected a "
            f"finite number; {not_finite(dynamics, params, current, 1) or 'check the data and the initialisation'}"
        )


def not_finite(dynamics: Dynamics, params: Sequence[Tensor], current: Sequence[Tensor], step: int) -> str:
    """Which of the tensors that a step was given is not finite itself, in words; empty if all are."""
    names, others = dynamics.names()
    others = tuple(f"{x} at step {step}" if stepped else x for x, stepped in zip(others, dynamics.stepped, strict=True))
    for name, x in (*zip(names, params, strict=False), *zip(others, current, strict=True)):
        if x.is_floating_point() and x.layout == torch.strided and not all_finite([x]):
            return f"{name} is not finite itself"
    return ""


def refuse_non_finite(cotangent: Sequence[Tensor]) -> None:
    """Refuse a hypergradient that is not finite; ``cotangent`` is the outer loss's gradient, if it is known."""
    outer = ""
    if cotangent:
        finite = "is finite" if all_finite(cotangent) else "is not finite itself: check that loss"
        outer = f"The gradient of the outer loss at the solution {finite}. "
    raise NonFiniteGradientError(
        f"the hypergradient is NaN or infinite, expected finite numbers. {outer}Check for roots, norms or logarithms "
        "at zero in the inner loss, or take fewer or smaller steps"
    )
