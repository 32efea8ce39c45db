"""The patterns of hypertorch, in a few lines: reverse mode over stored states, and conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import grad

from benchmarks.problem import Gradients, Params, Problem


def _step(problem: Problem, state: list[Tensor], hyper: Params, *, graph: bool) -> list[Tensor]:
    """One step of SGD with momentum on the only task; the state is the params, then the velocity."""
    count = len(problem.initial)
    params, velocity = dict(zip(problem.initial, state[:count], strict=True)), state[count:]
    support, _ = next(problem.tasks())
    gradient = grad(problem.inner(params, hyper, support), state[:count], create_graph=graph)
    velocity = [problem.momentum * v + g for v, g in zip(velocity, gradient, strict=True)]
    return [p - problem.lr * v for p, v in zip(state[:count], velocity, strict=True)] + velocity


def stored_states(problem: Problem) -> Gradients:
    """Every state stored, every step recorded again on the way back."""
    initial, hyper, leaves = problem.fresh()
    now, states = [*initial.values(), *(torch.zeros_like(p) for p in initial.values())], []
    for _ in range(problem.steps):
        now = [x.detach().requires_grad_() for x in now]
        states.append(now)
        now = _step(problem, now, hyper, graph=False)
    now = [x.detach().requires_grad_() for x in now]
    params = dict(zip(initial, now, strict=False))
    adjoint = grad(problem.outer(params, next(problem.tasks())[1]), now, materialize_grads=True)
    total = [torch.zeros_like(x) for x in leaves]
    for state in reversed(states):
        after = _step(problem, state, hyper, graph=True)
        terms = grad(after, [*state, *leaves], adjoint, allow_unused=True, materialize_grads=True)
        adjoint = terms[: len(state)]
        torch._foreach_add_(total, list(terms[len(state) :]))
    return tuple(total)


def conjugate_gradient(problem: Problem, iterations: int) -> Gradients:
    """At the given solution, ``problem.initial``: one graph of the inner gradient serves all products."""
    params, hyper, leaves = problem.fresh()
    support, query = next(problem.tasks())
    gradient = grad(problem.inner(params, hyper, support), list(params.values()), create_graph=True)
    right = grad(problem.outer(params, query), list(params.values()))

    def product(vector: list[Tensor]) -> list[Tensor]:
        return list(grad(gradient, list(params.values()), vector, retain_graph=True))

    solution = _solve(product, list(right), iterations)
    return tuple(-x for x in grad(gradient, leaves, solution))


def _solve(product: Callable[[list[Tensor]], list[Tensor]], right: list[Tensor], iterations: int) -> list[Tensor]:
    def dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
        return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()

    solution, residual = [torch.zeros_like(x) for x in right], right
    direction, size = residual, dot(right, right)
    for _ in range(iterations):
        curved = product(direction)
        step = size / dot(direction, curved)
        solution = [x + step * d for x, d in zip(solution, direction, strict=True)]
        residual = [r - step * c for r, c in zip(residual, curved, strict=True)]
        new = dot(residual, residual)
        direction = [r + new / size * d for r, d in zip(residual, direction, strict=True)]
        size = new
    return solution
