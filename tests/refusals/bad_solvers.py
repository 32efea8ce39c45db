"""Bad inputs: linear systems that cannot be solved, and linear solvers with options out of range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bad_row import Row, tensor
from torch import Tensor

import diffopt
from diffopt.linear_solve import GMRES, ConjugateGradient, Dense, Neumann, Nystrom

Bad = tuple[Callable[[], Any], type[Exception], str]
EYE = torch.eye(2, dtype=torch.float64)
CONJUGATE = ConjugateGradient()


def solved(matrix: Tensor, b: Any = None, solver: Any = CONJUGATE, **options: Any) -> Any:
    return solver.solve(lambda x: matrix @ x, tensor(1, 1) if b is None else b, **options)


MINIMUM = "; is the inner problem at a minimum, and all finite\\?"
SYMMETRIC = "expected a symmetric positive definite matrix; .*take GMRES \\(under Adam or Proximal it is not symmetric"
SOLVERS: dict[str, Bad] = {
    "indefinite": (lambda: solved(-EYE), diffopt.LinearSolveError, f"{SYMMETRIC}.*Dense\\(damping"),
    "singular": (lambda: solved(0 * EYE), diffopt.LinearSolveError, "broke down .*expected a symmetric positive d"),
    "not_symmetric": (
        lambda: solved(tensor(1, 5, 0, 1).view(2, 2)),
        diffopt.LinearSolveError,
        SYMMETRIC,
    ),
    "not_converged": (
        lambda: solved(torch.diag(tensor(1, 9)), solver=ConjugateGradient(max_iterations=1)),
        diffopt.LinearSolveError,
        "did not converge: residual .*expected one within .* a larger max_iterations or rtol, take GMRES if A is not s",
    ),
    "gmres_singular": (
        lambda: solved(torch.diag(tensor(1, 0)), solver=GMRES()),
        diffopt.LinearSolveError,
        r"did not converge: .*expected .*max_iterations or rtol, take Dense\(damping=",
    ),
    "dense_singular": (
        lambda: solved(0 * EYE, solver=Dense()),
        diffopt.LinearSolveError,
        f"expected a matrix that is not singular; a larger damping makes it so{MINIMUM}",
    ),
    "neumann_diverges": (
        lambda: solved(EYE, solver=Neumann(step_size=3.0)),
        diffopt.LinearSolveError,
        r"expected step_size \* A between 0 and 2; .* take a smaller step_size, or GMRES",
    ),
    "nystrom_singular": (
        lambda: solved(torch.ones_like(EYE), solver=Nystrom(2, damping=1e-3)),
        diffopt.LinearSolveError,
        f"Nystrom broke down .*expected .* of that rank at least; take GMRES .*or a larger damping{MINIMUM}",
    ),
    "nystrom_rank": (
        lambda: solved(tensor(2, 1, 1, 2).view(2, 2), solver=Nystrom(1, damping=1e-3)),
        diffopt.LinearSolveError,
        "Nystrom did not converge: .*expected .*the residual is larger than b itself: take a larger rank or damping",
    ),
    "nan": (
        lambda: solved(EYE, {"x": tensor(float("nan"))}),
        diffopt.LinearSolveError,
        r"b\['x'\] holds NaN .*expected finite",
    ),
    "start_nan": (
        lambda: solved(EYE, start=tensor(1, float("inf"))),
        diffopt.LinearSolveError,
        "start holds NaN or infinite .*expected",
    ),
    "start_shape": (
        lambda: solved(EYE, start=tensor(1)),
        diffopt.ShapeError,
        r"start is .*expected the shape \(2,\) of b",
    ),
    "start_tree": (
        lambda: solved(EYE, start={"a": tensor(1, 1)}),
        diffopt.StructureError,
        r"expected a tree .*start\['a'\] is too many",
    ),
    "b_number": (
        lambda: solved(EYE, 3.0),
        diffopt.LeafError,
        "b is float 3.0, expected a tree of dense floating tensors",
    ),
    "b_integer": (
        lambda: solved(EYE, torch.ones(2).int()),
        diffopt.LeafError,
        "b is a int32 .*expected a tree of dense floating",
    ),
    "b_empty": (lambda: solved(EYE, {}), diffopt.LeafError, r"b is dict \{\}, expected .*none of them empty"),
    "matvec_matrix": (
        lambda: CONJUGATE.solve(EYE, tensor(1, 1)),
        diffopt.LinearSolveError,
        "expected a function .*pass lambda",
    ),
    "matvec_none": (
        lambda: CONJUGATE.solve(lambda x: None, tensor(1)),
        diffopt.ShapeError,
        "NoneType None, expected a tree like b",
    ),
    "matvec_shape": (
        lambda: CONJUGATE.solve(lambda x: x[:1], tensor(1, 1)),
        diffopt.ShapeError,
        "expected a tree like b",
    ),
    "matvec_dtype": (
        lambda: CONJUGATE.solve(lambda x: x.float(), tensor(1)),
        diffopt.DtypeError,
        "float32.*expected the dtypes of b: .*float64",
    ),
    **{
        f"{make.__name__}_{options}": (
            lambda make=make, options=options: make(**options),
            diffopt.HyperparameterError,
            f"{make.__name__}: .* is .*expected",
        )
        for make, options in (
            (ConjugateGradient, {"max_iterations": 0}),
            (ConjugateGradient, {"rtol": -1.0}),
            (ConjugateGradient, {"rtol": float("nan")}),
            (ConjugateGradient, {"throw": "x"}),
            (Neumann, {"terms": 0}),
            (Neumann, {"step_size": 0.0}),
            (Neumann, {"power_iterations": 0}),
            (GMRES, {"max_iterations": 1.5}),
            (Nystrom, {"rank": 0, "damping": 1.0}),
            (Nystrom, {"rank": 1, "damping": 0.0}),
            (Nystrom, {"rank": 1, "damping": 1.0, "seed": "x"}),
            (Dense, {"damping": -1.0}),
        )
    },
}
ROWS: dict[str, Row] = {f"solver_{name}": Row("linear solver", *row) for name, row in SOLVERS.items()}
