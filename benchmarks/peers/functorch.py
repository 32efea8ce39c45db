"""The functional pattern: the whole of a task under ``torch.func.vmap``, as in functorch's and TorchOpt's examples."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import grad, vmap

from benchmarks.problem import Data, Gradients, Params, Problem


def _task_loss(problem: Problem, initial: Params, support: Data, query: Data) -> Tensor:
    params = initial
    for _ in range(problem.steps):
        direction = grad(problem.inner)(params, {}, support)
        params = {name: p - problem.lr * direction[name] for name, p in params.items()}
    return problem.outer(params, query)


def backward_outside(problem: Problem) -> Gradients:
    """``vmap(loss of the unrolled loop)``, then autograd. Wrong, silently, with an affine ``F.batch_norm``."""
    initial, _, leaves = problem.fresh()
    losses = vmap(lambda support, query: _task_loss(problem, initial, support, query))(problem.support, problem.query)
    return torch.autograd.grad(losses.mean(), leaves)


def gradient_inside(problem: Problem) -> Gradients:
    """``vmap(grad(loss of the unrolled loop))``."""

    def task_gradient(support: Data, query: Data) -> Params:
        return grad(lambda initial: _task_loss(problem, initial, support, query))(problem.initial)

    return tuple(g.mean(0) for g in vmap(task_gradient)(problem.support, problem.query).values())
