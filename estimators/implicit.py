"""Implicit differentiation of the inner optimizer's fixed point."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from diffopt.adjoint.claims import Claims
from diffopt.adjoint.estimator import Adjoint
from diffopt.adjoint.fixed_point import implicit_pullback
from diffopt.adjoint.trajectory import Cotangents, Trajectory
from diffopt.errors import EstimatorError, StepsError
from diffopt.linear_solve import ConjugateGradient, LinearSolver, refuse_unsolved
from diffopt.rollout.record import Keep
from diffopt.tensors.arguments import Options
from diffopt.tensors.leaves import Leaves


@final
@dataclass(frozen=True)
class Implicit(Adjoint):
    r"""The hypergradient of the fixed point that the inner optimizer has (nearly) reached.

    .. math:: (I - J^\top)\,v = \frac{\partial F}{\partial s},\qquad \nabla = B^\top v

    with the last step's blocks at the final state: of ``params`` with the buffers held fixed (a symmetric system under
    gradient descent, momentum and decay; iMAML under :class:`diffopt.ProximalGD`) or the whole state (GMRES, Neumann).

    Exact only at the fixed point; ``Solution.diagnostics`` has ``stationarity`` (``|params - step(params)|``; over the
    average step: ``relative_stationarity``), ``residual``, ``iterations``. Cost: 2 gradients, ``iterations + 1`` HVPs.
    Not for: unfinished inner problems; initial parameters, step sizes and momentum (zero, for the fixed point does not
    depend on them, except through a proximal center); Adam and its like with conjugate gradients (not symmetric); half
    precision with ``lr`` times curvature not well above its ``eps``: ``I - J`` cancels (and is refused as unsolved).

    Args:
        solver: a :mod:`diffopt.linear_solve` object.
        whole_state: solve for params and buffers together.

    Raises:
        LinearSolveError: in the backward pass, if the system is not solved and the solver throws.

    References: Rajeswaran et al. (2019), Grazzi et al. (2020, section 3). Derivations (6.1).
    """

    solver: LinearSolver = field(default_factory=ConjugateGradient)
    whole_state: bool = False

    def __post_init__(self) -> None:
        """Check the solver."""
        options = Options(self)
        options.instance("solver", LinearSolver, "a diffopt.linear_solve object", EstimatorError)
        options.flag("whole_state")

    def claims(self, steps: int) -> Claims:
        """Of a fixed point, which does not depend on where it was sought from; as accurate as the solver."""
        return Claims("at the fixed point", frozenset({"args", "batches", "hyperparameters"}), tolerance=1e-3)

    def keep(self, steps: int) -> Keep:
        """No step: the final state is enough, and the graph of one step in the backward pass."""
        if steps == 0:
            raise StepsError("Implicit: the inner problem has no step", "one whose fixed point was reached")
        return Keep(first=steps + 1)

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        """Solve the adjoint system at the final state."""
        result, found = implicit_pullback(trajectory, cotangent, self.solver, whole_state=self.whole_state)
        if self.solver.throw:
            refuse_unsolved(self.solver, found)
        return result
