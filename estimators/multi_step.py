"""Multi-step estimation: one gradient serves a window of updates."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import final

from diffopt.adjoint.claims import Claims
from diffopt.adjoint.estimator import Estimator
from diffopt.adjoint.reverse import Reverse
from diffopt.rollout.problem import Outcome, Problem
from diffopt.tensors.arguments import Options


@final
@dataclass(frozen=True)
class MultiStep(Estimator):
    r"""Inner steps in windows of ``window`` updates that share one gradient, then any estimator on the composite steps.

    .. math:: s_{t+1} = U_t(s_t, g_{t_w}; \eta),\quad t = t_w, \dots, t_w + n - 1,\qquad
              \hat C_w = C_{t_w+n-1}\cdots C_{t_w},\quad
              \hat E_w = \sum_{i=0}^{n-1} C_{t_w+n-1}\cdots C_{t_w+i+1}\,E_{t_w+i}

    and ``D`` of a window likewise with ``D`` for ``E``.

    This changes the forward pass: the solution is that of the windowed dynamics, and with an exact ``adjoint`` the
    hypergradient is exact for *them*. ``window=1`` is the ordinary problem. With plain gradient descent it is
    gradient descent with ``window`` times the step size and fewer steps.

    Cost: ``T / window`` gradients and HVPs instead of ``T``; memory and depth likewise. ``T`` need not be a multiple
    of ``window``: the last window is then short. With ``batches``, the batch of a window's first step counts; the
    others are not looked at. ``Solution.losses`` has one entry per window.

    Not for: inner problems whose gradient changes much within a window.

    Args:
        window: updates per gradient, ``n``.
        adjoint: the estimator for the composite steps. Its own options (``Truncated.steps``, ``Binomial.order``,
            ``window``, ...) count windows, not updates.

    Raises:
        HyperparameterError: ``window`` is not an integer >= 1, or ``adjoint`` is not an estimator.

    Reference: Kim, Park and Choi (2020), "Multi-step Estimation for Gradient-based Meta-learning", equations (11)-(15).
    Derivations (5.1).
    """

    window: int
    adjoint: Estimator = field(default_factory=Reverse)
    if_wrong = "takes other steps"

    def __post_init__(self) -> None:
        """Check both options."""
        options = Options(self)
        options.integer("window", 1)
        options.instance("adjoint", Estimator, "an estimator such as Reverse()")

    def claims(self, steps: int) -> Claims:
        """Those of the estimator on the composite steps."""
        claims = self.adjoint.claims(-(-steps // self.window))
        return replace(claims, own_steps=claims.own_steps or min(self.window, steps) > 1)

    @property
    def traced(self) -> bool:  # type: ignore[override]
        """As the estimator on the composite steps."""
        return self.adjoint.traced

    def run(self, problem: Problem) -> Outcome:
        """Run the adjoint's estimator on the windowed problem."""
        layout = problem.dynamics.layout
        # A window is one step: one gradient, then that many updates with it (Dynamics.updates). Windows of a MultiStep
        # around it multiply.
        windowed = replace(problem.dynamics, layout=replace(layout, window=self.window * layout.window))
        return self.adjoint.run(replace(problem, dynamics=windowed))
