"""Implicit differentiation of the inner optimizer's fixed point."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from diffopt.errors import EstimatorError, StepsError
from diffopt.estimator import Adjoint
from diffopt.implicit import implicit_pullback
from diffopt.leaves import Leaves
from diffopt.linear_solve import ConjugateGradient, LinearSolver, refuse_unsolved
from diffopt.record import Keep
from diffopt.trajectory import Cotangents, Trajectory


@final
@dataclass(frozen=True)
class Implicit(Adjoint):
    r"""The hypergradient of the fixed point that the inner optimizer has (nearly) reached.

    .. math:: (I - J^\top)\,v = \frac{\partial F}{\partial s},\qquad \nabla = B^\top v

    with the blocks of the last step, at the final state. By default the unknown is ``params``, with the buffers held
    fixed: for gradient descent, with or without momentum and decay, that is stationarity of the inner loss, a
    symmetric system; for :class:`diffopt.ProximalGD` it is iMAML. ``whole_state`` takes the whole state, as for any
    contractive step; its system is not symmetric under momentum (use ``GMRES`` or ``Neumann``).

    Exact only at the fixed point. ``Solution.diagnostics`` gets ``"stationarity"``, ``|params - step(params)|``, and as
    a share of the average step ``"relative_stationarity"``; and the system's ``"residual"`` and ``"iterations"``. Cost:
    two gradients (one to check that the loss repeats itself), one HVP per iteration of the solver and one more. Memory:
    no states, the graph of one step: independent of the number of steps.

    Not for: unfinished inner problems; the initial parameters (the fixed point does not depend on them: zero, except
    through a proximal center); step sizes and momentum (likewise, nearly zero); adaptive optimizers such as Adam, whose
    preconditioned system is not symmetric, with conjugate gradients; half precision with a step size times curvature
    that is not well above its ``eps``: ``I - J`` then cancels (and the system is refused as unsolved).

    Args:
        solver: a :mod:`diffopt.linear_solve` object.
        whole_state: solve for params and buffers together.

    Raises:
        LinearSolveError: in the backward pass, if the system is not solved and the solver throws.

    References: Rajeswaran et al. (2019), "Meta-Learning with Implicit Gradients"; Grazzi et al. (2020), "On the
    Iteration Complexity of Hypergradient Computation", section 3. Derivations (6.1).
    """

    solver: LinearSolver = field(default_factory=ConjugateGradient)
    whole_state: bool = False

    def __post_init__(self) -> None:
        """Check the solver."""
        if not isinstance(self.solver, LinearSolver):
            raise EstimatorError(f"Implicit: solver is {self.solver!r}, expected a diffopt.linear_solve object")

    def keep(self, steps: int) -> Keep:
        """No step: the final state is enough."""
        if steps == 0:
            raise StepsError("Implicit: the inner problem has no step, expected one whose fixed point was reached")
        return Keep(first=steps + 1)

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        """Solve the adjoint system at the final state."""
        result, found = implicit_pullback(trajectory, cotangent, self.solver, whole_state=self.whole_state)
        if self.solver.throw:
            refuse_unsolved(self.solver, found)
        return result
