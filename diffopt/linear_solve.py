r"""Linear solvers on trees, matrix-free: solve ``A x = b`` given ``x -> A x``.

Each solver is a small frozen object with ``solve(matvec, b) -> LinearSolution``. ``b`` is a tree of tensors and
``matvec`` maps such a tree to another. All work under ``torch.func.vmap``: every task has its own scalars, and a task
that has converged stands still while others go on. (There, unconverged tasks can only be reported, not raised.)
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, final

import torch
from torch import Tensor

from diffopt import autodiff, tree
from diffopt.errors import DtypeError, HyperparameterError, LeafError, LinearSolveError, ShapeError, StructureError
from diffopt.leaves import Leaves

Matvec: TypeAlias = Callable[[Leaves], Leaves]

_TINY = 1e-300


class LinearSolution(NamedTuple):
    """What a solver returns. Scalars have the tasks' axes, if there are tasks.

    Attributes:
        value: the solution, a tree like ``b``.
        residual: the norm of ``b - A x``.
        iterations: how many products with ``A`` were used.
        converged: whether the residual is within the solver's tolerance.
        breakdown: whether the solver met a system it cannot solve (negative curvature, divergence, singularity).
    """

    value: Any
    residual: Tensor
    iterations: Tensor
    converged: Tensor
    breakdown: Tensor


@final
@dataclass(frozen=True)
class Tasks:
    """Inner products and multiples of ``Leaves`` whose first ``axes`` axes are independent problems."""

    axes: int

    def dot(self, a: Leaves, b: Leaves) -> Tensor:
        """The inner product, one per task."""
        parts = [(x * y).reshape(*x.shape[: self.axes], -1).sum(-1) for x, y in zip(a, b, strict=True)]
        return torch.stack(parts).sum(0)

    def norm(self, a: Leaves) -> Tensor:
        """The Euclidean norm, one per task."""
        return self.dot(a, a).sqrt()

    def like(self, scalars: Tensor, a: Leaves) -> Leaves:
        """One scalar per task, shaped to broadcast against each leaf."""
        return a.map(lambda x: scalars.reshape(scalars.shape + (1,) * (x.ndim - self.axes)))

    def times(self, factor: Tensor, a: Leaves) -> Leaves:
        """A multiple, each task with its own factor."""
        return self.like(factor, a) * a

    def start(self, a: Leaves) -> Leaves:
        """A fixed vector, the same for every task, that no symmetry of a problem is likely to annihilate."""

        def one(x: Tensor) -> Tensor:
            own = x.shape[self.axes :]
            numbers = torch.arange(1, own.numel() + 1, device=x.device).sin().to(x.dtype)
            return numbers.reshape(own).expand(x.shape)

        return a.map(one)

    def flatten(self, a: Leaves) -> Tensor:
        """One vector per task, ``[..., n]``."""
        return torch.cat([x.reshape(*x.shape[: self.axes], -1) for x in a], dim=-1)

    def unflatten(self, vector: Tensor, like: Leaves) -> Leaves:
        """The inverse of :meth:`flatten`."""
        sizes = [x[(0,) * self.axes].numel() for x in like]
        return Leaves(v.reshape(x.shape) for v, x in zip(torch.split(vector, sizes, dim=-1), like, strict=True))


class LinearSolver(ABC):
    """Solves ``A x = b``; see the module's docstring. ``throw``: raise if a system is not solved."""

    throw: bool

    @abstractmethod
    def iterate(self, matvec: Matvec, b: Leaves, tasks: Tasks, start: Leaves | None) -> LinearSolution:
        """Solve for stacked tasks, whose ``b`` is finite and of largest entry 1, or zero."""

    @final
    def run(self, matvec: Matvec, b: Leaves, tasks: Tasks, start: Leaves | None) -> LinearSolution:
        """Solve for ``Leaves`` of stacked tasks, without raising.

        Each task's system is scaled to a largest entry of 1, so that squares neither overflow nor vanish; a zero ``b``
        has the solution zero, and one that is not finite is a breakdown.
        """
        largest = torch.stack([x.abs().reshape(*x.shape[: tasks.axes], -1).amax(-1) for x in b]).amax(0)
        usable = largest.isfinite() & (largest > 0)
        scale = torch.where(usable, largest, 1)

        def scaled(x: Leaves) -> Leaves:
            inverse, keep = tasks.like(1 / scale, x), tasks.like(usable, x)
            return Leaves(torch.where(k, i * v, 0) for v, i, k in zip(x, inverse, keep, strict=True))

        found = self.iterate(matvec, scaled(b), tasks, None if start is None else scaled(start))
        finite = largest.isfinite() & found.residual.isfinite()
        return LinearSolution(
            tasks.times(scale, found.value),
            torch.where(finite, scale * found.residual, torch.inf),
            found.iterations,
            found.converged & finite,
            found.breakdown | ~finite,
        )

    @final
    def solve(self, matvec: Callable[[Any], Any], b: Any, start: Any = None) -> LinearSolution:
        """Solve ``matvec(x) = b`` for one system (or, under vmap, one per task).

        Args:
            matvec: maps a tree like ``b`` to another, linearly.
            b: a tree of floating tensors.
            start: where an iterative solver starts, a tree like ``b``; ``None``: zero.

        Raises:
            LinearSolveError: the system was not solved and ``throw`` is set.
            ShapeError: ``matvec`` returns something else than a tree like ``b``.
        """
        leaves, structure = tree.flatten(b)
        if not leaves or not all(isinstance(x, Tensor) and x.is_floating_point() and x.numel() for x in leaves):
            raise LeafError(f"b is {tree.describe(b)}, expected a tree of floating tensors, none of them empty")

        def product(x: Leaves) -> Leaves:
            out, out_structure = tree.flatten(matvec(tree.unflatten(structure, x.tensors)))
            if out_structure != structure or [y.shape for y in out] != [y.shape for y in leaves]:
                raise ShapeError(f"matvec returned {Leaves(out)}, expected tensors shaped like b: {Leaves(leaves)}")
            if [y.dtype for y in out] != [y.dtype for y in leaves]:
                raise DtypeError(f"matvec returned {[y.dtype for y in out]}, b has {[y.dtype for y in leaves]}")
            return Leaves(out)

        initial = None if start is None else leaves_like(start, "start", "b", leaves, structure)
        found = self.run(product, Leaves(leaves), Tasks(0), initial)
        if self.throw and not autodiff.transforms_active():
            refuse_unsolved(self, found)
        return found._replace(value=tree.unflatten(structure, found.value.tensors))


def leaves_like(value: Any, name: str, model_name: str, model: Sequence[Tensor], structure: tree.Structure) -> Leaves:
    """The leaves of a tree that must look like another one."""
    leaves, found = tree.flatten(value)
    if found != structure:
        raise StructureError(f"{name} is {tree.describe(value)}, expected a tree with the structure of {model_name}")
    for path, x, like in zip(tree.paths(structure), leaves, model, strict=True):
        if not isinstance(x, Tensor) or x.shape != like.shape:
            raise ShapeError(
                f"{name}{path} is {tree.describe(x)}, expected the shape {tuple(like.shape)} of {model_name}"
            )
    return Leaves(leaves)


def refuse_unsolved(solver: LinearSolver, found: LinearSolution) -> None:
    """Raise if any task's system was not solved."""
    if bool(found.converged.all()):
        return
    name = type(solver).__name__
    worst, used = float(found.residual.max()), int(found.iterations.max())
    if bool(found.breakdown.any()):
        raise LinearSolveError(
            f"{name} broke down after {used} products (residual {worst:.1e}): the matrix is not of the kind it solves. "
            f"{_NEEDS.get(name, '')}Is the inner problem at a minimum? GMRES or a damping may help"
        )
    raise LinearSolveError(
        f"{name} did not converge: residual {worst:.1e} after {used} products. Allow more iterations or a larger rtol, "
        "add damping, or pass throw=False to take the solution as it is"
    )


_NEEDS = {
    "ConjugateGradient": "Conjugate gradients need a positive definite matrix; it has a direction of curvature <= 0. ",
    "Neumann": "The Neumann series needs step_size * A between 0 and 2; it diverged. ",
}


def check_options(solver: LinearSolver, *optional: str, **lowest: float) -> None:
    """Refuse options below their lowest value, of another type, or not finite; those named may be ``None``.

    An option whose lowest value is an int must be one; a lowest value of 0.0 is allowed, another float is not.
    """
    for name, low in lowest.items():
        value: Any = getattr(solver, name)
        if value is None and name in optional:
            continue
        kinds = (int,) if isinstance(low, int) else (int, float)
        number = value if isinstance(value, kinds) and not isinstance(value, bool) else math.nan
        if not low <= number < (1 if name == "rtol" else math.inf):
            kind = "an integer" if isinstance(low, int) else "a finite number"
            raise HyperparameterError(f"{type(solver).__name__}: {name} is {value!r}, expected {kind} >= {low}")


def _all_stopped(active: Tensor) -> bool:
    """Whether an iteration may stop early: asked on the CPU only, where the answer costs nothing."""
    return not autodiff.transforms_active() and active.device.type == "cpu" and not bool(active.any())


@final
@dataclass(frozen=True)
class ConjugateGradient(LinearSolver):
    r"""Conjugate gradients, for symmetric positive definite ``A``.

    The error after ``k`` products is at most ``2 sqrt(kappa) ((sqrt(kappa)-1)/(sqrt(kappa)+1))**k`` of the first, with
    ``kappa`` the condition number. A direction of curvature ``<= 0`` stops its task and is reported as a breakdown.

    Args:
        max_iterations: products at most.
        rtol: converged when the residual's norm is below ``rtol`` times that of ``b``.
        throw: raise :class:`diffopt.LinearSolveError` if not converged.

    Reference: Hestenes and Stiefel (1952), "Methods of Conjugate Gradients for Solving Linear Systems". Derivations,
    section 6.1.
    """

    max_iterations: int = 100
    rtol: float = 1e-5
    throw: bool = True

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self, max_iterations=1, rtol=0.0)

    def iterate(self, matvec: Matvec, b: Leaves, tasks: Tasks, start: Leaves | None) -> LinearSolution:
        """Solve for stacked tasks."""
        x = b.zeros() if start is None else start
        r = b if start is None else b - matvec(x)
        p, rr = r, tasks.dot(r, r)
        bound = self.rtol**2 * tasks.dot(b, b)
        active, breakdown = rr > bound, torch.zeros_like(rr, dtype=torch.bool)
        iterations = torch.zeros_like(rr, dtype=torch.int64) + int(start is not None)
        for _ in range(self.max_iterations):
            if _all_stopped(active):
                break
            ap = matvec(p)
            curvature = tasks.dot(p, ap)
            iterations = iterations + active
            # "not above" so that NaN counts as a breakdown too
            breakdown = breakdown | (active & ~(curvature > 0))
            active = active & (curvature > 0)
            alpha = torch.where(active, rr / torch.where(active, curvature, 1), 0)
            x, r = x + tasks.times(alpha, p), r - tasks.times(alpha, ap)
            new = tasks.dot(r, r)
            # this differs from the textbook only in that a task that has stopped keeps its numbers
            p = r + tasks.times(torch.where(active, new / torch.where(active, rr, 1), 0), p)
            rr, active = new, active & (new > bound)
        return LinearSolution(x, rr.sqrt(), iterations, (rr <= bound) & ~breakdown, breakdown)


@final
@dataclass(frozen=True)
class Neumann(LinearSolver):
    r"""The Neumann series ``x = a sum_j (I - a A)^j b``, for ``A`` with eigenvalues in ``(0, 2/a)``.

    ``k`` terms are ``k`` steps of gradient descent on the quadratic, and at a stationary point the hypergradient
    truncated to ``k`` steps. A residual that has grown is reported as a breakdown.

    Args:
        terms: how many terms; stops when converged.
        step_size: ``a``; ``None``: one over the largest eigenvalue, estimated by ``power_iterations`` products.
        rtol, throw: as in :class:`ConjugateGradient`; ``rtol=None`` takes any residual that has not grown.
        power_iterations: for the estimate.

    Reference: Lorraine, Vicol and Duvenaud (2020), "Optimizing Millions of Hyperparameters by Implicit
    Differentiation", section 4. Derivations, sections 6.1 and 6.6.
    """

    terms: int = 100
    step_size: float | None = None
    rtol: float | None = 1e-5
    throw: bool = True
    power_iterations: int = 10

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self, "rtol", "step_size", terms=1, step_size=_TINY, rtol=0.0, power_iterations=1)

    def iterate(self, matvec: Matvec, b: Leaves, tasks: Tasks, start: Leaves | None) -> LinearSolution:
        """Solve for stacked tasks."""
        first = tasks.norm(b)
        x, r = (b.zeros(), b) if start is None else (start, b - matvec(start))
        used = int(start is not None)
        if self.step_size is None:
            step, used = 1 / largest_eigenvalue(matvec, b, tasks, self.power_iterations), used + self.power_iterations
        else:
            step = torch.full_like(first, self.step_size)
        bound = 0 * first if self.rtol is None else self.rtol * first
        active, iterations = tasks.norm(r) > bound, torch.full_like(first, used, dtype=torch.int64)
        for _ in range(self.terms):
            if _all_stopped(active):
                break
            move = tasks.times(torch.where(active, step, 0), r)
            x, r = x + move, r - matvec(move)
            iterations, active = iterations + active, active & (tasks.norm(r) > bound)
        residual = tasks.norm(r)
        breakdown = ~(residual <= first)
        converged = ~breakdown if self.rtol is None else residual <= bound
        return LinearSolution(x, residual, iterations, converged, breakdown)


def largest_eigenvalue(matvec: Matvec, like: Leaves, tasks: Tasks, iterations: int) -> Tensor:
    """The eigenvalue of largest modulus (its modulus), one per task, by the power method from a fixed start."""
    v = tasks.start(like)
    size = tasks.norm(v)
    for _ in range(iterations):
        v = matvec(tasks.times(1 / size, v))
        size = tasks.norm(v)
    return size


@final
@dataclass(frozen=True)
class GMRES(LinearSolver):
    r"""Minimal residuals over the Krylov space, for any nonsingular ``A``.

    ``k`` products give the ``x`` of smallest residual in a ``k``-dimensional space; ``n`` products solve the system.
    Memory: one vector per product.

    Args:
        max_iterations: the dimension of the space.
        rtol, throw: as in :class:`ConjugateGradient`.

    Reference: Saad and Schultz (1986), "GMRES: A Generalized Minimal Residual Algorithm for Solving Nonsymmetric
    Linear Systems".
    """

    max_iterations: int = 20
    rtol: float = 1e-5
    throw: bool = True

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self, max_iterations=1, rtol=0.0)

    def iterate(self, matvec: Matvec, b: Leaves, tasks: Tasks, start: Leaves | None) -> LinearSolution:
        """Solve for stacked tasks."""
        r0 = b if start is None else b - matvec(start)
        bound = self.rtol * tasks.norm(b)
        update, _, used = minimal_residual(matvec, r0, tasks, self.max_iterations, bound)
        x = update if start is None else start + update
        # the recurrence's own residual goes on falling when round-off no longer lets the true one fall
        size = tasks.norm(b - matvec(x)) if used else tasks.norm(r0)
        iterations = torch.full_like(size, used + int(used > 0) + int(start is not None), dtype=torch.int64)
        return LinearSolution(x, size, iterations, size <= bound, ~size.isfinite())


def minimal_residual(
    matvec: Matvec, r0: Leaves, tasks: Tasks, products: int, bound: Tensor | None = None
) -> tuple[Leaves, Leaves, int]:
    """The update in the Krylov space of ``r0`` after which the residual is smallest, that residual, and products used.

    With ``bound``, stops when every task's residual is below it. The residual vector comes from the Arnoldi relation,
    without another product.
    """
    size = tasks.norm(r0)
    basis = [tasks.times(_reciprocal(size), r0)]
    columns: list[list[Tensor]] = []
    dimension = tasks.flatten(r0).shape[-1]
    weights, residual = torch.zeros_like(size)[..., None][..., :0], size[..., None]
    for k in range(min(products, dimension)):
        if bound is not None and _all_stopped(residual.norm(dim=-1) > bound):
            break
        w = matvec(basis[k])
        before, column = tasks.norm(w), []
        for q in basis:
            column.append(tasks.dot(w, q))
            w = w - tasks.times(column[-1], q)
        after = tasks.norm(w)
        # a vector that was in the space already leaves round-off behind, which must not become a direction
        after = torch.where(after > 1e3 * torch.finfo(after.dtype).eps * before, after, 0)
        columns.append([*column, after])
        basis.append(tasks.times(_reciprocal(after), w))
        if bound is not None:
            weights, residual = _least_squares(columns, size)
    if bound is None and columns:
        weights, residual = _least_squares(columns, size)
    update = _combine(tasks, weights, basis, r0)
    return update, _combine(tasks, residual, basis, r0), len(columns)


def _reciprocal(size: Tensor) -> Tensor:
    return torch.where(size > 0, 1 / torch.where(size > 0, size, 1), 0)


def _least_squares(columns: Sequence[Sequence[Tensor]], size: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise ``|size e_1 - H y|`` for the Hessenberg matrix with these columns; ``y`` and the residual."""
    rows, zero = len(columns) + 1, torch.zeros_like(size)
    full = [torch.stack([*column, *[zero] * (rows - len(column))], dim=-1) for column in columns]
    h = torch.stack(full, dim=-1)
    h = torch.where(h.isfinite(), h, 0)  # one task's NaN would stop the decomposition of all
    e = torch.stack([size, *[zero] * (rows - 1)], dim=-1)
    y = (torch.linalg.pinv(h) @ e[..., None])[..., 0]
    return y, e - (h @ y[..., None])[..., 0]


def _combine(tasks: Tasks, weights: Tensor, basis: Sequence[Leaves], like: Leaves) -> Leaves:
    total = like.zeros()
    for weight, q in zip(weights.unbind(-1), basis, strict=False):
        total = total + tasks.times(weight, q)
    return total


@final
@dataclass(frozen=True)
class Nystrom(LinearSolver):
    r"""A low-rank solver for symmetric positive semidefinite ``A`` with a damping: ``(A_k + rho I) x = b``.

    .. math:: x = \frac1\rho b - \frac1{\rho^2} c \big(A_{KK} + \tfrac1\rho c^\top c\big)^{-1} c^\top b,\qquad
              c = A_{[:, K]}

    for ``rank`` randomly chosen coordinates ``K``: as many products, none of which waits for another. Exact for the
    damped system when ``A`` has rank at most ``rank`` (and the columns span it).

    Args:
        rank: number of coordinates, capped at the number there are.
        damping: ``rho > 0``.
        seed: of the choice of coordinates.
        throw: raise if the small system is singular.

    Reference: Hataya and Yamada (2023), "Nystrom Method for Accurate and Scalable Implicit Differentiation",
    equation (6). Derivations (6.4).
    """

    rank: int
    damping: float
    seed: int = 0
    throw: bool = True

    def __post_init__(self) -> None:
        """Check the options."""
        check_options(self, rank=1, damping=_TINY)

    def iterate(self, matvec: Matvec, b: Leaves, tasks: Tasks, start: Leaves | None) -> LinearSolution:
        """Solve for stacked tasks."""
        flat, rho = tasks.flatten(b), self.damping
        size = flat.shape[-1]
        # not torch's generator, which vmap forbids: the choice is the same for every task
        chosen = random.Random(self.seed).sample(range(size), min(self.rank, size))
        c = _columns(matvec, b, tasks, chosen)
        inner = c[..., chosen, :] + c.mT @ c / rho
        small, info = torch.linalg.solve_ex(inner, c.mT @ flat[..., None])
        x = flat / rho - (c @ small)[..., 0] / rho**2
        value = tasks.unflatten(x, b)
        residual = tasks.norm(b - (matvec(value) + rho * value))
        iterations = torch.full_like(residual, len(chosen) + 1, dtype=torch.int64)
        breakdown = (info > 0) | ~residual.isfinite()
        return LinearSolution(value, residual, iterations, ~breakdown, breakdown)


@final
@dataclass(frozen=True)
class Dense(LinearSolver):
    """The matrix, column by column, and a direct solve: ``n`` products, ``n * n`` numbers. For small systems.

    Args:
        damping: added to the diagonal.
        throw: raise if the matrix is singular.
    """

    damping: float = 0.0
    throw: bool = True

    def __post_init__(self) -> None:
        """Check the damping."""
        check_options(self, damping=0.0)

    def iterate(self, matvec: Matvec, b: Leaves, tasks: Tasks, start: Leaves | None) -> LinearSolution:
        """Solve for stacked tasks."""
        flat = tasks.flatten(b)
        size = flat.shape[-1]
        matrix = _columns(matvec, b, tasks, range(size))
        matrix = matrix + self.damping * torch.eye(size, dtype=flat.dtype, device=flat.device)
        x, _ = torch.linalg.solve_ex(matrix, flat[..., None])
        residual = (flat - (matrix @ x)[..., 0]).norm(dim=-1)
        sizes = torch.linalg.svdvals(torch.where(matrix.isfinite(), matrix, 0))
        singular = sizes[..., -1] <= size * torch.finfo(flat.dtype).eps * sizes[..., 0]
        breakdown = singular | ~residual.isfinite()
        iterations = torch.full_like(residual, size, dtype=torch.int64)
        return LinearSolution(tasks.unflatten(x[..., 0], b), residual, iterations, ~breakdown, breakdown)


def _columns(matvec: Matvec, like: Leaves, tasks: Tasks, chosen: Sequence[int]) -> Tensor:
    """The columns of the matrix with these numbers, ``[..., n, len(chosen)]``."""
    flat = tasks.flatten(like)
    unit = torch.eye(flat.shape[-1], dtype=flat.dtype, device=flat.device)
    columns = [tasks.flatten(matvec(tasks.unflatten(unit[i].expand_as(flat), like))) for i in chosen]
    return torch.stack(columns, dim=-1)
