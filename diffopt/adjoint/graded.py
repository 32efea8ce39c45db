"""The adjoints of all steps by orders of curvature, all steps of an order at once (derivations, section 3)."""

from __future__ import annotations

from diffopt.adjoint.direct_terms import DirectTerms
from diffopt.adjoint.parallel_curvature import ParallelCurvature
from diffopt.adjoint.time_stack import copy_of_row, repeated, row, rows, scan, write
from diffopt.adjoint.trajectory import Cotangents, Pulled, Trajectory
from diffopt.tensors.leaves import Leaves


def graded(
    trajectory: Trajectory, cotangent: Leaves, first: int, last: int, scale: float, chunk_size: int | None
) -> Pulled:
    """The terms with at most ``last`` factors of curvature, each times ``scale`` and of a step from ``first`` on.

    And the norm of what the last order adds to the adjoint behind step ``first``, and of that of those before it.
    """
    steps, norm = trajectory.steps, trajectory.tasks.norm
    curvature = ParallelCurvature(trajectory, first, chunk_size, again=last > 1)
    direct, updates, adjoints = DirectTerms(trajectory), trajectory.updates.blocks(), repeated(cotangent, steps + 1)
    of_gradients, before = trajectory.layout.params(adjoints).zeros(), cotangent  # row t: E_t' Lambda_t
    scan(updates, adjoints, first + last, steps)  # order 0: Lambda_{t-1} = C_t' Lambda_t
    for order in range(1, last + 1):
        # Steps above ``high`` are saturated (theorem 3.A): final as they are. No later order reads those below.
        low, high = first + last - order, steps - order + 1
        write(of_gradients, low, scale * updates.to_gradient(rows(adjoints, low, high), low))
        # The last order also takes M_t' of the saturated steps, whose E_t' Lambda_t those before it have left.
        mixed, before = order == last and curvature.reads_wanted, copy_of_row(adjoints, first)
        stack = rows(of_gradients, low, steps if mixed else high)
        pushes = curvature.product(stack, low, direct if mixed else None, counted=high - low + 1)  # H_t E_t' Lambda
        scan(updates, adjoints, low, high, pushes)  # Lambda_{t-1} = C_t' Lambda_t + P' y_t
    scan(updates, adjoints, 1, first - 1)  # no curvature before the window
    measured = [norm(row(adjoints, first) - before), norm(before)] if last > 0 else []
    direct.add_updates(rows(adjoints, 1, steps))
    return Cotangents(row(adjoints, 0), direct.collect()), measured
