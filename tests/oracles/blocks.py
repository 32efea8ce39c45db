"""A rollout as dense matrices: the blocks of every step by automatic differentiation of the oracles' plain steps.

An estimator is then a few lines of products, sums and solves of these matrices, none of them the library's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cases import OptimizerCase
from torch import Tensor
from torch.autograd.functional import jacobian


@dataclass(frozen=True)
class Step:
    """The blocks ``C``, ``E``, ``D`` of an update and ``H``, ``M`` of the gradient it takes (derivations, section 0).

    ``M`` comes in three: for the loss's argument, and for both halves of the batch numbered ``batch``.
    """

    C: Tensor
    E: Tensor
    D: Tensor
    H: Tensor
    M: tuple[Tensor, Tensor, Tensor]
    batch: int

    @property
    def curved(self) -> Tensor:
        """``E H P``."""
        product = self.E @ self.H
        return torch.nn.functional.pad(product, (0, len(self.C) - product.shape[1]))

    @property
    def J(self) -> Tensor:
        return self.C + self.curved


@dataclass(frozen=True)
class Blocks:
    """All steps of a rollout: ``steps[t - 1]`` is step ``t``.

    Attributes:
        steps: one per gradient.
        end: the last step once more, taken from the final state.
        last: ``Lambda_T``, the derivative of the outer loss in the final state.
        start: the derivatives of the initial state in the params and in the hyperparameters.
        moved: the initial params minus the final ones.
        batches: both halves of the batches, whose shapes their hypergradients have.
    """

    steps: list[Step]
    end: Step
    last: Tensor
    start: tuple[Tensor, Tensor]
    moved: Tensor
    batches: tuple[Tensor, Tensor]

    @property
    def T(self) -> int:
        return len(self.steps)

    def answer(
        self,
        initial: Tensor,
        adjoints: Sequence[Tensor | None],
        mixed: Sequence[Tensor | None] | None = None,
        steps: Sequence[Step] | None = None,
    ) -> list[Tensor]:
        """(1.2) from ``Lambda_0`` and, for each step, the adjoint that its direct terms take (``None``: no term).

        Those of the loss take ``mixed``, where it is another one. Params and hyperparameters are one vector each.
        """
        steps, mixed = self.steps if steps is None else steps, adjoints if mixed is None else mixed
        params, hypers = (s.mT @ initial for s in self.start)
        weights, halves = torch.zeros_like(self.end.M[0][0]), [torch.zeros_like(x) for x in self.batches]
        for step, adjoint, other in zip(steps, adjoints, mixed, strict=True):
            if adjoint is not None:
                hypers = hypers + step.D.mT @ adjoint
            if other is not None:
                weights = weights + step.M[0].mT @ step.E.mT @ other
                for half, m in zip(halves, step.M[1:], strict=True):
                    half[step.batch - 1] += (step.E @ m).mT.matmul(other).reshape(half[0].shape)
        return [params, weights, *halves, hypers]


def blocks(problem: Any, case: OptimizerCase, steps: int, window: int = 1) -> Blocks:
    """The blocks of ``steps`` updates, ``window`` of which share a gradient."""
    shapes = [p.shape for p in problem.params]
    params = torch.cat([p.detach().flatten() for p in problem.params])
    count, eta = len(params), params.new_tensor(list(case.learned.values()))

    def split(vector: Tensor) -> list[Tensor]:
        parts = torch.split(vector, [s.numel() for s in shapes])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def options(eta: Tensor) -> dict[str, Any]:
        return case.options(dict(zip(case.learned, eta.unbind(), strict=True)))

    seen = case.buffers(params, **options(eta))
    case.step(params, params, seen, 2, **options(eta))
    names = list(seen)  # every buffer that the plain step makes

    def initial(params: Tensor, eta: Tensor) -> Tensor:
        given = case.buffers(params, **options(eta))
        return torch.cat([params, *(given.get(name, 0 * params) for name in names)])

    def update(state: Tensor, g: Tensor, eta: Tensor, first: int, last: int) -> Tensor:
        for t in range(first, last + 1):
            now, *rest = state.reshape(-1, count).unbind()
            buffers = dict(zip(names, rest, strict=True))
            now = case.step(now, g, buffers, t, **options(eta))
            state = torch.cat([now, *(buffers[name] for name in names)])
        return state

    def gradient(params: Tensor, weights: Tensor, *batch: Tensor) -> Tensor:
        with torch.enable_grad():
            params = params if params.requires_grad else params.detach().requires_grad_()
            (g,) = torch.autograd.grad(problem.loss(split(params), weights, batch), params, create_graph=True)
        return g

    def step_at(state: Tensor, first: int) -> tuple[Step, Tensor]:
        last, batch = min(first + window - 1, steps), tuple(x[first - 1].detach() for x in problem.batches)
        inputs = (state[:count], problem.weights.detach(), *batch)
        g = gradient(*inputs).detach()
        c, e, d = jacobian(lambda s, g, eta: update(s, g, eta, first, last), (state, g, eta))
        h, *m = jacobian(gradient, inputs)
        made = Step(c, e, d, h, tuple(x.reshape(count, -1) for x in m), first)
        return made, update(state, g, eta, first, last).detach()

    state, made = initial(params, eta).detach(), []
    for first in range(1, steps + 1, window):
        step, state = step_at(state, first)
        made.append(step)
    last = jacobian(lambda s: problem.outer_loss(split(s[:count])), state)
    start = jacobian(initial, (params, eta))
    return Blocks(made, step_at(state, made[-1].batch)[0], last, start, params - state[:count], problem.batches)


def swept(b: Blocks, steps: int) -> list[Tensor]:
    """Back-propagation through the last ``steps`` steps, (1.1) and (3.1)."""
    adjoint, adjoints = b.last, [None] * b.T
    for t in range(b.T, b.T - steps, -1):
        adjoints[t - 1] = adjoint
        adjoint = b.steps[t - 1].J.mT @ adjoint
    return b.answer(adjoint, adjoints)


def first_order(b: Blocks) -> list[Tensor]:
    return b.answer(b.last, [None] * b.T)


def reptile(b: Blocks) -> list[Tensor]:
    nothing = [None] * b.T
    return [b.moved, *b.answer(0 * b.last, nothing)[1:]]


def enumerated(b: Blocks, order: int, window: int | None = None, scale: float = 1.0) -> list[Tensor]:
    """Every subset of at most ``order`` steps whose curvature counts, one product of matrices each: theorem 3.A (i)."""
    curved = range(b.T - (b.T if window is None else window) + 1, b.T + 1)

    def adjoint(t: int, order: int) -> Tensor:
        """``Lambda_t^(order)``."""
        total, later = 0 * b.last, [j for j in curved if j > t]
        for size in range(order + 1):
            for chosen in itertools.combinations(later, size):
                term = b.last
                for j in range(b.T, t, -1):
                    step = b.steps[j - 1]
                    term = (scale * step.curved if j in chosen else step.C).mT @ term
                total = total + term
        return total

    mixed = [scale * adjoint(t, order - 1) if t in curved and order > 0 else None for t in range(1, b.T + 1)]
    return b.answer(adjoint(0, order), [adjoint(t, order) for t in range(1, b.T + 1)], mixed)


def minimal_residual(b: Blocks, order: int) -> list[Tensor]:
    """Section 3.7 by one system of all adjoints and an orthonormal basis of its Krylov space."""
    n, T = len(b.last), b.T
    shift, product = torch.zeros(2, T * n, T * n, dtype=b.last.dtype)
    known, curved = torch.zeros(2, T * n, dtype=b.last.dtype)
    for t in range(1, T):
        rows, columns = slice((t - 1) * n, t * n), slice(t * n, (t + 1) * n)
        shift[rows, columns], product[rows, columns] = b.steps[t - 1].C.mT, b.steps[t - 1].curved.mT
    known[-n:], curved[-n:] = b.steps[-1].C.mT @ b.last, b.steps[-1].curved.mT @ b.last
    scan = torch.linalg.inv(torch.eye(T * n, dtype=b.last.dtype) - shift)
    matrix, x, right = torch.eye(T * n, dtype=b.last.dtype) - scan @ product, scan @ known, scan @ (known + curved)
    residual, basis = right - matrix @ x, torch.zeros(T * n, 0, dtype=b.last.dtype)
    for _ in range(order - 1):
        new = residual if basis.shape[1] == 0 else matrix @ basis[:, -1]
        for _ in range(2):
            new = new - basis @ (basis.mT @ new)
        basis = torch.column_stack([basis, new / new.norm()])
    if order > 1:
        x = x + basis @ torch.linalg.lstsq(matrix @ basis, residual, driver="gelsd").solution
        residual = right - matrix @ x
    before, after = ([*v.reshape(T, n), b.last] for v in (x, x + residual if order > 0 else x))
    return b.answer(after[0], after[1:], before[1:] if order > 0 else [None] * T)


def at_the_fixed_point(b: Blocks, moving: Callable[[int], Sequence[int]]) -> tuple[list[Tensor], float]:
    """(6.1) at the final state, solved for the numbers ``moving(params)`` of it; and the condition of that system.

    Of the others, those that a step hands through are its inputs; what it moves has no derivative.
    """
    numbers = list(moving(b.end.H.shape[0]))
    matrix = torch.eye(len(numbers), dtype=b.last.dtype) - b.end.J[numbers][:, numbers].mT
    v = torch.zeros_like(b.last)
    v[numbers] = torch.linalg.solve(matrix, b.last[numbers])
    still = (torch.eye(len(v), dtype=v.dtype) == b.end.J).all(1)
    still[numbers] = False
    initial = torch.where(still, b.last + b.end.J.mT @ v, 0)
    return b.answer(initial, [v], steps=[b.end]), float(torch.linalg.cond(matrix))
