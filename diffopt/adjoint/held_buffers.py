"""Where a fixed point depends on how buffers move, so that its derivative with them held fixed is another one.

# NOTE [buffers held fixed]
At rest a velocity is ``1 / (1 - momentum)`` gradients, and a step sees it and the gradient in a sum. Where a step rests
because that sum is zero, holding the velocity fixed changes every term by the same factor, and the solution not at all.
It is wrong where something else stands beside the sum: the penalty of a prox (or the curvature of a set that is
projected onto), the slow weights to which a step of Lookahead goes back, the decoupled decay of AdamW.
"""

from __future__ import annotations

from diffopt.errors import EstimatorError
from diffopt.optimizers.adam import AdamW
from diffopt.optimizers.averaging import EMA, Lookahead
from diffopt.optimizers.base import Optimizer
from diffopt.optimizers.checks import is_zero
from diffopt.optimizers.clip import Clip
from diffopt.optimizers.groups import Groups
from diffopt.optimizers.held import held
from diffopt.optimizers.prox import Proximal
from diffopt.optimizers.proximal import ProximalGD
from diffopt.optimizers.sgd import SGD
from diffopt.rollout.dynamics import Dynamics

_WITHOUT = (Clip, EMA, Groups, Proximal, ProximalGD)
"""Optimizers without buffers of their own that a step of the params depends on and changes."""
_WHOLE = "take Implicit(GMRES(max_iterations=100), whole_state=True)"


def refuse_held_buffers(dynamics: Dynamics, *, ends_known: bool) -> None:
    """Refuse an optimizer at whose fixed point the buffers cannot be held; ``ends_known``: so is its last step."""
    layout = dynamics.layout
    last = layout.start + max(layout.steps, 1) * layout.window
    for optimizer in held(dynamics.optimizer.template):
        if isinstance(optimizer, Proximal) and not optimizer.prox.polyhedral:
            if layout.buffers_layout and any(map(_has_velocity, held(optimizer.optimizer))):
                raise _error(
                    f"{type(optimizer.prox).__name__} after an optimizer with momentum or other buffers of its own",
                    f"{_WHOLE}, or leave out the momentum",
                )
        elif isinstance(optimizer, Lookahead) and ends_known:
            if last // optimizer.period > (last - layout.window) // optimizer.period:
                raise _error(
                    f"Lookahead(period={optimizer.period}), which goes back at the last step, {last}",
                    f"take a number of steps that the period does not divide, or {_WHOLE[5:]}",
                )
        elif isinstance(optimizer, AdamW) and not is_zero(optimizer.weight_decay):
            raise _error(
                "AdamW with its decoupled weight_decay",
                f"take Adam(..., weight_decay=...) or a penalty in the loss, or {_WHOLE[5:]} once its statistics rest",
            )


def _has_velocity(optimizer: Optimizer) -> bool:
    """Whether an optimizer has buffers that move the params; of one that is not known here it is taken to be so."""
    return not is_zero(optimizer.momentum) if isinstance(optimizer, SGD) else not isinstance(optimizer, _WITHOUT)


def _error(got: str, fix: str) -> EstimatorError:
    return EstimatorError(
        f"Implicit holds the optimizer's buffers fixed, and was given {got}",
        "an optimizer whose fixed point is one of its params alone",
        fix,
    )
