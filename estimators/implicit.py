"""Implicit differentiation of the inner optimizer's fixed point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from diffopt.adjoint.claims import Claims
from diffopt.adjoint.estimator import Adjoint
from diffopt.adjoint.fixed_point import LastStep, refuse_unfit
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

    Both blocks are those of one more step, taken at the final state. By default the unknown is ``params`` and buffers
    are constants: the system is then symmetric for gradient descent, momentum and weight decay on a loss, and is
    iMAML's under :class:`diffopt.ProximalGD`. With ``whole_state=True`` the unknown is the whole state.

    Exact only at the fixed point. ``Solution.diagnostics`` has ``stationarity`` (``|params - step(params)|``),
    ``relative_stationarity`` (over the average step), ``residual`` and ``iterations``. Cost: one gradient, one
    evaluation of the loss where checks are on, one HVP per iteration of the solver and one more (GMRES, Nystrom: two
    more). Memory: the final state, and the graph of one step.

    Not for: unfinished problems (there is a warning); initial params, step sizes or momentum, which get zero (except a
    proximal center); Adam or Proximal with conjugate gradients, since their systems are not symmetric; half precision
    where ``lr`` times the curvature is small.

    Args:
        solver: a :mod:`diffopt.linear_solve` object; default: conjugate gradients, GMRES for a vector field.
        whole_state: solve for params and buffers together (by GMRES or Neumann).

    Raises:
        EstimatorError: ``solver`` is not a linear solver; or the fixed point depends on how buffers move that are held
            fixed (momentum under a penalty).
        HyperparameterError: ``whole_state`` is neither ``True`` nor ``False``.
        StepsError: the inner problem has no step.
        RandomnessError: the inner loss draws random numbers, so that no step has a fixed point.
        LinearSolveError: the solver is of no use for a vector field; or, in the backward pass, has not solved.

    References: Rajeswaran et al. (2019), Grazzi et al. (2020, section 3). Derivations (6.1).
    """

    solver: LinearSolver | None = None
    whole_state: bool = False
    traced: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the solver."""
        fix = "such as Implicit(GMRES(max_iterations=100))"
        wanted = "a diffopt.linear_solve object"
        Options(self).instance("solver", LinearSolver, wanted, EstimatorError, also=(None,), fix=fix)
        Options(self).flag("whole_state")

    def claims(self, steps: int) -> Claims:
        """Of a fixed point, which does not depend on where it was sought from; as accurate as the solver."""
        return Claims("at the fixed point", frozenset({"args", "batches", "hyperparameters"}), tolerance=1e-3)

    def keep(self, steps: int) -> Keep:
        """No step: the final state is enough, and the graph of one step in the backward pass."""
        if steps == 0:
            fix = "take enough steps to reach the fixed point"
            raise StepsError("Implicit: the inner problem has no step", "at least one", fix)
        return Keep(first=steps + 1)

    def refuse(self, problem: Problem) -> None:
        """A solver of symmetric systems for a vector field; buffers that cannot be held fixed."""
        refuse_unfit(problem, self.solver, whole_state=self.whole_state)

    def pullback(self, trajectory: Trajectory, cotangent: Leaves) -> Cotangents:
        """Solve the adjoint system at the final state."""
        step = LastStep(trajectory, self.solver, whole_state=self.whole_state)
        v = step.solve(step.system, cotangent).value  # (I - J') v = dF/ds
        return step.cotangents(v, cotangent)  # B' v
