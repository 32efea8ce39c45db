"""Implicit differentiation of the inner optimizer's fixed point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from diffopt.adjoint.claims import Claims
from diffopt.adjoint.estimator import Adjoint
from diffopt.adjoint.fixed_point import implicit_pullback, refuse_unfit
from diffopt.adjoint.trajectory import Cotangents, Trajectory
from diffopt.errors import EstimatorError, StepsError
from diffopt.linear_solve import LinearSolver
from diffopt.rollout.problem import Problem
from diffopt.rollout.record import Keep
from diffopt.tensors.arguments import Options
from diffopt.tensors.leaves import Leaves


@final
@dataclass(frozen=True)
class Implicit(Adjoint):
    r"""The hypergradient of the fixed point that the inner optimizer has (nearly) reached.

    .. math:: (I - J^\top)\,v = \frac{\partial F}{\partial s},\qquad \nabla = B^\top v

    with the last step's blocks at the final state: of ``params``, the buffers held fixed (for a loss symmetric under
    descent, momentum and decay; iMAML under :class:`diffopt.ProximalGD`), or of the whole state. Exact only at the
    fixed point; ``Solution.diagnostics`` has ``stationarity`` (``|params - step(params)|``), ``relative_stationarity``
    (over the average step), ``residual``, ``iterations``. Cost: 2 gradients, one HVP an iteration and one more. Not
    for: unfinished problems (a warning); initial params, step sizes, momentum (zero, but for a proximal center); Adam
    or a prox by conjugate gradients; half precision if ``lr`` times H is small.

    Args:
        solver: a :mod:`diffopt.linear_solve` object; default: conjugate gradients, GMRES for a vector field.
        whole_state: solve for params and buffers together (by GMRES or Neumann).

    Raises:
        EstimatorError: the fixed point depends on how buffers move that are held fixed (momentum under a penalty).
        LinearSolveError: the solver is of no use for a vector field; or, in the backward pass, has not solved.

    References: Rajeswaran et al. (2019), Grazzi et al. (2020, section 3). Derivations (6.1).
    """

    solver: LinearSolver | None = None
    whole_state: bool = False

    def __post_init__(self) -> None:
        """Check the solver."""
        Options(self).instance("solver", LinearSolver, "a diffopt.linear_solve object", EstimatorError, also=(None,))
        Options(self).flag("whole_state")

    def claims(self, steps: int) -> Claims:
        """Of a fixed point, which does not depend on where it was sought from; as accurate as the solver."""
        return Claims("at the fixed point", frozenset({"args", "batches", "hyperparameters"}), tolerance=1e-3)

    def keep(self, steps: int) -> Keep:
        """No step: the final state is enough, and the graph of one step in the backward pass."""
        if steps == 0:
            raise StepsError("Implicit: the inner problem has no step", "one whose fixed point was reached")
        return Keep(first=steps + 1)

    def refuse(self, problem: Problem) -> None:
        """A solver of symmetric systems for a vector field; buffers that cannot be held fixed."""
        refuse_unfit(problem, self.solver, whole_state=self.whole_state)

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        """Solve the adjoint system at the final state."""
        return implicit_pullback(trajectory, cotangent, self.solver, whole_state=self.whole_state)[0]
