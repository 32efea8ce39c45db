"""What the stacked form itself costs: its arithmetic written out for one problem, with nothing checked or kept apart.

A batch of tasks is one problem with stacked params; only the loss runs under ``vmap``, the inner gradients and the
adjoint are plain autograd. No library that computes the same in eager mode can be faster than this by much.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.problem import Gradients, Problem
from diffopt import transforms


def stacked(problem: Problem) -> Gradients:
    """MAML with SGD without momentum: the gradient for the initial params."""
    names, count = list(problem.initial), problem.count
    start = [x.detach().expand(count, *x.shape).contiguous().requires_grad_() for x in problem.initial.values()]
    tensors = len(names) + len(problem.support)

    def inner(*leaves: Tensor) -> Tensor:
        return problem.inner(dict(zip(names, leaves, strict=False)), {}, leaves[len(names) :])

    def outer(*leaves: Tensor) -> Tensor:
        return problem.outer(dict(zip(names, leaves, strict=False)), leaves[len(names) :])

    inner, outer = (transforms.vmap(f, [(0,) * tensors], [count], ["error"]) for f in (inner, outer))
    now = start
    for _ in range(problem.steps):
        gradients = torch.autograd.grad(inner(*now, *problem.support).sum(), now, create_graph=True)
        now = [x - problem.lr * g for x, g in zip(now, gradients, strict=True)]
    stacked_gradients = torch.autograd.grad(outer(*now, *problem.query).mean(), start)
    return tuple(g.sum(0) for g in stacked_gradients)
