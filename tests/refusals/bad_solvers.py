"""Bad inputs: linear systems that cannot be solved."""

from __future__ import annotations

from typing import Any

import torch
from bad_row import Refused, tensor
from torch import Tensor

from diffopt import DtypeError, LeafError, LinearSolveError, ShapeError, StructureError
from diffopt.linear_solve import GMRES, ConjugateGradient, Dense, Neumann, Nystrom

refused = Refused("linear solver")
EYE = torch.eye(2, dtype=torch.float64)
CONJUGATE = ConjugateGradient()
MINIMUM = "; is the inner problem at a minimum, and all finite\\?"
SYMMETRIC = "expected a symmetric positive definite matrix; .*take GMRES \\(under Adam or Proximal it is not symmetric"
TOO_SHORT = "did not converge: residual .*expected one within .* max_iterations or rtol, take GMRES if A is not s"
TOO_SINGULAR = r"did not converge: .*expected .*max_iterations or rtol, take Dense\(damping="
NOT_SINGULAR = f"expected a matrix that is not singular; a larger damping makes it so{MINIMUM}"
DIVERGES = r"expected step_size \* A between 0 and 2; .* take a smaller step_size, or GMRES"
OF_THAT_RANK = f"Nystrom broke down .*expected .* of that rank at least; take GMRES .*or a larger damping{MINIMUM}"
TOO_LOW = "Nystrom did not converge: .*expected .*the residual is larger than b itself: take a larger rank or damping"


@refused(LinearSolveError, f"{SYMMETRIC}.*Dense\\(damping", -EYE, name="indefinite")
@refused(LinearSolveError, "broke down .*expected a symmetric positive d", 0 * EYE, name="singular")
@refused(LinearSolveError, SYMMETRIC, tensor(1, 5, 0, 1).view(2, 2), name="not_symmetric")
@refused(LinearSolveError, TOO_SHORT, torch.diag(tensor(1, 9)), solver=ConjugateGradient(max_iterations=1))
@refused(LinearSolveError, TOO_SINGULAR, torch.diag(tensor(1, 0)), solver=GMRES())
@refused(LinearSolveError, NOT_SINGULAR, 0 * EYE, solver=Dense())
@refused(LinearSolveError, DIVERGES, EYE, solver=Neumann(step_size=3.0))
@refused(LinearSolveError, OF_THAT_RANK, torch.ones_like(EYE), solver=Nystrom(2, damping=1e-3))
@refused(LinearSolveError, TOO_LOW, tensor(2, 1, 1, 2).view(2, 2), solver=Nystrom(1, damping=1e-3))
@refused(LinearSolveError, r"b\['x'\] holds NaN .*expected finite", EYE, {"x": tensor(float("nan"))})
@refused(LinearSolveError, "start holds NaN or infinite .*expected", EYE, start=tensor(1, float("inf")))
@refused(ShapeError, r"start is .*expected the shape \(2,\) of b", EYE, start=tensor(1))
@refused(StructureError, r"expected a tree .*start\['a'\] is too many", EYE, start={"a": tensor(1, 1)})
@refused(LeafError, "b is float 3.0, expected a tree of dense floating tensors", EYE, 3.0)
@refused(LeafError, "b is a int32 .*expected a tree of dense floating", EYE, torch.ones(2).int())
@refused(LeafError, r"b is dict \{\}, expected .*none of them empty", EYE, {})
def system(matrix: Tensor, b: Any = None, solver: Any = CONJUGATE, **options: Any) -> None:
    solver.solve(lambda x: matrix @ x, tensor(1, 1) if b is None else b, **options)


@refused(LinearSolveError, "expected a function .*pass lambda", EYE)
@refused(ShapeError, "NoneType None, expected a tree like b", lambda x: None, name="matvec_of_none")
@refused(ShapeError, "expected a tree like b", lambda x: x[:1], name="matvec_of_another_shape")
@refused(DtypeError, "float32.*expected the dtypes of b: .*float64", Tensor.float)
def matvec(product: Any) -> None:
    CONJUGATE.solve(product, tensor(1, 1))
