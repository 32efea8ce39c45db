"""Linear systems of every kind for the tests of the linear solvers."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from diffopt.linear_solve import GMRES, ConjugateGradient, Dense, LinearSolver, Neumann, Nystrom

SIZE = 7
ITERATIVE = [ConjugateGradient(), Neumann(), GMRES()]
SOLVERS = [*ITERATIVE, Nystrom(SIZE, damping=0.3), Dense(), Dense(damping=0.3)]
# Condition numbers are at most 10, residuals asked for are 1e-12 (1e-5): errors are within ten of that.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4}


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def identity(size: int = SIZE) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def damped(solver: LinearSolver, matrix: Tensor) -> Tensor:
    """The matrix that the solver solves for."""
    return matrix + getattr(solver, "damping", 0.0) * identity()


def with_eigenvalues(seed: int, eigenvalues: list[float]) -> Tensor:
    basis = torch.linalg.qr(normal(seed, len(eigenvalues), len(eigenvalues)))[0]
    matrix = (basis * torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.mT
    return (matrix + matrix.mT) / 2


def definite(seed: int, condition: float = 10.0, size: int = SIZE) -> Tensor:
    return with_eigenvalues(seed, np.geomspace(1 / condition, 1, size).tolist())


def nonsymmetric(seed: int) -> Tensor:
    return definite(seed) + 0.5 * torch.triu(normal(seed, SIZE, SIZE), 1)


def low_rank(seed: int, rank: int = 3) -> Tensor:
    return with_eigenvalues(seed, [1.0, 0.7, 0.4][:rank] + [0.0] * (SIZE - rank))


class Product:
    """Multiplication with a matrix, on vectors or on a nested tree of seven numbers; remembers what it was given.

    Below float64 a product is rounded once, as if it had been exact: how a processor adds up decides nothing, and the
    error of a residual has a bound, half an ``eps`` of every number of ``A x``.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.given: list[Tensor] = []

    def __call__(self, x):
        flat = x if isinstance(x, Tensor) else self.vector(x)
        self.given.append(flat)
        product = (self.matrix.double() @ flat.double()).to(self.matrix.dtype)
        return product if isinstance(x, Tensor) else self.tree(product)

    @staticmethod
    def tree(x: Tensor):
        return {"weight": x[:4].reshape(2, 2), "rest": [x[4], (x[5:].reshape(1, 2),)]}

    @staticmethod
    def vector(tree) -> Tensor:
        scalar, (row,) = tree["rest"]
        return torch.cat([tree["weight"].flatten(), scalar[None], row.flatten()])


def changed(solver: LinearSolver, **options) -> LinearSolver:
    names = {field.name for field in dataclasses.fields(solver)}
    more = {"terms": options["max_iterations"]} if "max_iterations" in options else {}
    return dataclasses.replace(solver, **{k: v for k, v in {**options, **more}.items() if k in names})


def name(solver: LinearSolver) -> str:
    return type(solver).__name__ + ("" if getattr(solver, "damping", 0) == 0 else "-damped")


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


KINDS = {"definite": definite, "nonsymmetric": nonsymmetric, "low rank": low_rank}
