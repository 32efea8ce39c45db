"""What every linear solver shares: the scalars of tasks, scaling, checks of what it is given, and its verdict."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias, final

import torch
from torch import Tensor

from diffopt.errors import (
    DeviceError,
    DtypeError,
    LeafError,
    LinearSolveError,
    ShapeError,
    StructureError,
)
from diffopt.tensors import traced_loops, tracing, transforms, tree
from diffopt.tensors.arguments import Options, check_function
from diffopt.tensors.leaves import Leaves, all_finite
from diffopt.tensors.spread import is_spread
from diffopt.tensors.tasks import Tasks, power_of_two
from diffopt.tensors.usable import is_calculable, refuse_unusable, usable_leaves

Matvec: TypeAlias = Callable[[Leaves], Leaves]

TINY = 1e-300


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


class LinearSolver(ABC):
    """Solves ``A x = b``; see the package's docstring.

    Attributes:
        throw: raise if a system is not solved.
        needs: what it expects of ``A``, said in the error where it breaks down.
        if_broken: what to do then.
        if_unsolved: what to do where its residual is too large.
        symmetric: whether ``A`` has to be symmetric, as the Jacobian of a :class:`diffopt.VectorField` need not be.
    """

    throw: bool
    needs: ClassVar[str] = "a matrix that is not singular"
    if_broken: ClassVar[str] = "try another solver"
    if_unsolved: ClassVar[str] = "allow it more products"
    symmetric: ClassVar[bool] = False

    @abstractmethod
    def iterate(
        self, matvec: Matvec, b: Leaves, tasks: Tasks, start: Leaves | None, precision: float
    ) -> LinearSolution:
        """Solve for stacked tasks, whose ``b`` is finite and of largest entry 1 to 2, or zero.

        ``precision`` is the relative rounding of the products if that is coarser than the vectors', else 0: see
        :func:`relative_bound`.
        """

    @final
    def run(self, matvec: Matvec, b: Leaves, tasks: Tasks, start: Leaves | None) -> LinearSolution:
        """Solve for ``Leaves`` of stacked tasks, without raising.

        Each task's system is scaled to a largest entry of 1 to 2, so that squares neither overflow nor vanish; a zero
        ``b`` has the solution zero, and one that is not finite is a breakdown. In half precision only the products are
        taken in it, all else in single precision.
        """
        wide = b.widened()
        coarse = [x.dtype for x, y in zip(b, wide, strict=True) if x.dtype != y.dtype]
        precision = max((torch.finfo(dtype).eps for dtype in coarse), default=0.0)
        if not coarse and is_alone(b, tasks):
            return self._run_alone(matvec, b, tasks, start)
        largest = tasks.largest(wide)
        usable = largest.isfinite() & (largest > 0)
        scale = power_of_two(largest)

        def scaled(x: Leaves) -> Leaves:
            inverse = tasks.like(torch.where(usable, 1 / scale, 0), x)
            return x.map(lambda v, i: torch.where(i > 0, i * v, 0), inverse)

        initial = None if start is None else scaled(start.widened())
        found = self.iterate(with_wide_vectors(matvec, b), scaled(wide), tasks, initial, precision)
        value = tasks.times(scale, found.value).cast(b)
        held = torch.stack([x.isfinite().reshape(*x.shape[: tasks.axes], -1).all(-1) for x in value]).all(0)
        finite = largest.isfinite() & found.residual.isfinite() & held
        return LinearSolution(
            value,
            torch.where(finite, scale * found.residual, torch.inf),
            found.iterations,
            found.converged & finite,
            found.breakdown | ~finite,
        )

    def _run_alone(self, matvec: Matvec, b: Leaves, tasks: Tasks, start: Leaves | None) -> LinearSolution:
        """The same for one problem on the CPU, scaled by a number of Python's, which costs no wait there."""
        largest, least = tasks.largest(b).item(), 4 * torch.finfo(b[0].dtype).tiny
        scale = max(2.0 ** (math.frexp(largest)[1] - 1), least) if 0 < largest < math.inf else 1.0

        def scaled(x: Leaves) -> Leaves:
            return x * (1 / scale) if 0 < largest < math.inf else x.zeros()

        found = self.iterate(matvec, scaled(b), tasks, None if start is None else scaled(start), 0.0)
        value, residual = found.value * scale, found.residual * scale
        if math.isfinite(largest) and all_finite([value[0].new_tensor(float(residual)), *value]):
            return found._replace(value=value, residual=residual)
        return LinearSolution(
            value,
            torch.full_like(residual, math.inf),
            found.iterations,
            torch.zeros_like(found.converged),
            torch.ones_like(found.breakdown),
        )

    @final
    def solve(self, matvec: Callable[[Any], Any], b: Any, start: Any = None) -> LinearSolution:
        """Solve ``matvec(x) = b`` for one system (or, under vmap, one per task).

        In half precision the products are, and nothing else is; a residual is then accepted up to eight times the
        dtype's ``eps``, relative to ``b``, whatever smaller ``rtol`` was asked for.

        Args:
            matvec: maps a tree like ``b`` to another, linearly.
            b: a tree of floating tensors.
            start: where an iterative solver starts, a tree like ``b``; ``None``: zero.

        Raises:
            LinearSolveError: the system was not solved and ``throw`` is set.
            ShapeError: ``matvec`` returns something else than a tree like ``b``.
        """
        leaves, structure = tree.flatten(b)
        leaves = usable_leaves(leaves, lambda: [f"b{path}" for path in tree.paths(structure)])
        if not leaves or not all(isinstance(x, Tensor) and is_calculable(x) and x.numel() for x in leaves):
            raise LeafError(f"b is {tree.describe(b)}", "a tree of dense floating tensors, none of them empty")
        check_function("matvec", matvec, "a function x -> A x", LinearSolveError, "pass lambda x: A @ x")

        def product(x: Leaves) -> Leaves:
            result = matvec(tree.unflatten(structure, x.tensors))
            out, out_structure = tree.flatten(result)
            tensors = all(isinstance(y, Tensor) for y in out)
            if not tensors or out_structure != structure or [y.shape for y in out] != [y.shape for y in leaves]:
                raise ShapeError(f"matvec returned {tree.describe(result)}", f"a tree like b: {Leaves(leaves)}")
            if [y.dtype for y in out] != [y.dtype for y in leaves]:
                raise DtypeError(
                    f"matvec returned {[y.dtype for y in out]}", f"the dtypes of b: {[y.dtype for y in leaves]}"
                )
            return Leaves(out)

        initial = None if start is None else leaves_like(start, "start", "b", leaves, structure)
        refuse_not_finite(self, b=b, start=start)
        found = self.run(product, Leaves(leaves), Tasks(0), initial)
        if self.throw and not transforms.transforms_active():
            refuse_unsolved(self, found)
        return found._replace(value=tree.unflatten(structure, found.value.tensors))


def leaves_like(value: Any, name: str, model_name: str, model: Sequence[Tensor], structure: tree.Structure) -> Leaves:
    """The leaves of a tree that must look like another one."""
    leaves, found = tree.flatten(value)
    if found != structure:
        odd = tree.differences(name, value, structure)
        raise StructureError(
            f"{name} is {tree.describe(value)}",
            f"a tree with the structure of {model_name}: {', '.join(odd[:2]) or 'other kinds of branches'}",
        )
    for path, x, like in zip(tree.paths(structure), leaves, model, strict=True):
        where = f"{name}{path}"
        if isinstance(x, Tensor):
            refuse_unusable(x, lambda where=where: where)  # type: ignore[misc]
        if not isinstance(x, Tensor) or x.shape != like.shape:
            raise ShapeError(f"{where} is {tree.describe(x)}", f"the shape {tuple(like.shape)} of {model_name}")
        if x.dtype != like.dtype:
            raise DtypeError(f"{where} is {x.dtype}", f"{like.dtype} as in {model_name}", "convert it with .to()")
        if x.device != like.device:
            raise DeviceError(f"{where} is on {x.device}", f"{like.device} as {model_name}", "move it with .to()")
    return Leaves(leaves)


def refuse_not_finite(solver: LinearSolver, **trees: Any) -> None:
    """Refuse trees (named by their keywords; ``None``: not given) that hold NaN or infinite numbers."""
    if not solver.throw or transforms.transforms_active():
        return
    for name, value in trees.items():
        leaves, structure = tree.flatten(value)
        for path, x in zip(tree.paths(structure), leaves, strict=True):
            if x is not None and not _is_finite(x):
                raise LinearSolveError(f"{name}{path} holds NaN or infinite numbers", "finite ones", "check it")


def _is_finite(x: Tensor) -> bool:
    return all_finite([x]) if tracing.current() is None else tracing.holds(x.isfinite())


def refuse_unsolved(solver: LinearSolver, found: LinearSolution) -> None:
    """Raise if any task's system was not solved."""
    if tracing.holds(found.converged):
        return
    name = type(solver).__name__
    worst, used = float(found.residual.max()), int(found.iterations.max())
    if bool(found.breakdown.any()):
        raise LinearSolveError(
            f"{name} broke down after {used} products (residual {worst:.1e})",
            solver.needs,
            f"{solver.if_broken}; is the inner problem at a minimum, and all finite?",
        )
    raise LinearSolveError(
        f"{name} did not converge: residual {worst:.1e} after {used} products",
        "one within its tolerance",
        f"{solver.if_unsolved}, or pass throw=False to take the solution as it is",
    )


def check_options(solver: LinearSolver, *optional: str, **lowest: float) -> None:
    """Refuse options below their lowest value, of another type, or not finite; those named may be ``None``.

    An option whose lowest value is an int must be one; a lowest value of 0.0 is allowed, another float is not.
    """
    options = Options(solver)
    for name, low in lowest.items():
        also = (None,) if name in optional else ()
        if isinstance(low, int):
            options.integer(name, low, also=also)
        else:
            options.number(name, low, 1 if name == "rtol" else math.inf, also=also)
    options.flag("throw")


def is_alone(b: Leaves, tasks: Tasks) -> bool:
    """Whether a system is one, on the CPU, in one dtype, and nobody differentiates, or traces, its solution."""
    alike = all([y.is_cpu and y.dtype == b[0].dtype for y in b])
    watched = torch.is_grad_enabled() or transforms.transforms_active() or transforms.in_dual_level()
    return tasks.axes == 0 and alike and not watched and tracing.current() is None and not any(map(is_spread, b))


def with_wide_vectors(matvec: Matvec, like: Leaves) -> Matvec:
    """``matvec`` for vectors in single precision at least, its products taken in the dtypes of ``like``."""
    if like.widened() is like:
        return matvec
    return lambda x: matvec(x.cast(like)).widened()


def relative_bound(rtol: float, precision: float) -> float:
    """The relative residual that counts as converged, where products are rounded to ``precision``.

    A solver iterates down to ``max(rtol, precision)``. What its recurrence does not see of the rounding comes on top:
    some multiple of ``precision``, here eight.
    """
    return max(rtol, 8 * precision)


def matrix_columns(matvec: Matvec, like: Leaves, tasks: Tasks, chosen: Sequence[int]) -> Tensor:
    """The columns of the matrix with these numbers, ``[..., n, len(chosen)]``."""
    flat = tasks.flatten(like)
    places = torch.arange(flat.shape[-1], device=flat.device)

    def column(i: int | Tensor) -> Tensor:
        unit = (places == i).to(flat.dtype).expand_as(flat)
        return tasks.flatten(matvec(tasks.unflatten(unit, like)))

    if tracing.current() is None:
        return torch.stack([column(i) for i in chosen], dim=-1)  # (all units at once would be a matrix)
    numbers = torch.tensor(chosen, device=flat.device)
    _, found = traced_loops.scan(lambda carry, row, _: (carry, [column(row[0])]), [flat.new_zeros(())], [numbers], ())
    return found[0].movedim(0, -1)
