r"""Linear solvers on trees, matrix-free: solve ``A x = b`` given ``x -> A x``.

Each solver is a small frozen object with ``solve(matvec, b) -> LinearSolution``. ``b`` is a tree of tensors and
``matvec`` maps such a tree to another. All work under ``torch.func.vmap``: every task has its own scalars, and a task
that has converged stands still while others go on. (There, unconverged tasks can only be reported, not raised.)
"""

from diffopt.linear_solve.base import (
    LinearSolution,
    LinearSolver,
    Matvec,
    check_options,
    leaves_like,
    refuse_not_finite,
    refuse_unsolved,
    with_wide_vectors,
)
from diffopt.linear_solve.conjugate_gradient import ConjugateGradient
from diffopt.linear_solve.dense import Dense
from diffopt.linear_solve.gmres import GMRES, minimal_residual
from diffopt.linear_solve.loop import all_stopped
from diffopt.linear_solve.neumann import Neumann, largest_eigenvalue
from diffopt.linear_solve.nystrom import Nystrom
from diffopt.tensors.tasks import Tasks

__all__ = [
    "GMRES",
    "ConjugateGradient",
    "Dense",
    "LinearSolution",
    "LinearSolver",
    "Matvec",
    "Neumann",
    "Nystrom",
    "Tasks",
    "all_stopped",
    "check_options",
    "largest_eigenvalue",
    "leaves_like",
    "minimal_residual",
    "refuse_not_finite",
    "refuse_unsolved",
    "with_wide_vectors",
]
