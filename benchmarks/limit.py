"""What the stacked form itself costs: its arithmetic written out, with nothing checked, chosen or kept apart.

A batch of tasks is one problem with stacked params; only the loss runs under ``vmap``, the inner gradients and the
adjoint are plain autograd. No library that computes the same in eager mode can be faster than this by much.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.problem import Data, Gradients, Problem
from diffopt.tensors import transforms


def stacked(problem: Problem) -> Gradients:
    """MAML with SGD without momentum, all tasks at once, outer losses too: the gradient for the initial params."""
    start = _start(problem, problem.count)
    end = _rollout(problem, start, problem.support)
    losses = _vmapped(problem, lambda params, data: problem.outer(params, data), problem.count)
    return tuple(g.sum(0) for g in torch.autograd.grad(losses(*end, *problem.query).mean(), start))


def chunked(problem: Problem, chunk: int) -> Gradients:
    """The same with the inner loops of ``chunk`` tasks at a time, and the outer losses one by one."""
    total = [torch.zeros_like(x) for x in problem.initial.values()]
    for first in range(0, problem.count, chunk):
        support, query = (tuple(x[first : first + chunk] for x in data) for data in (problem.support, problem.query))
        start = _start(problem, chunk)
        end = _rollout(problem, start, support)
        cotangents = []
        for i in range(chunk):
            own = {name: x[i].detach().requires_grad_() for name, x in zip(problem.initial, end, strict=True)}
            loss = problem.outer(own, tuple(x[i] for x in query))
            cotangents.append(torch.autograd.grad(loss, list(own.values())))
        gradients = torch.autograd.grad(end, start, [torch.stack(column) for column in zip(*cotangents, strict=True)])
        torch._foreach_add_(total, [g.sum(0) for g in gradients], alpha=1 / problem.count)
    return tuple(total)


def products(problem: Problem) -> Callable[[], Gradients]:
    """As many multiplications as the matrix products of ``stacked`` have, in square products that stay in the cache."""
    with FlopCounterMode(display=False) as counter:
        stacked(problem)
    side, device = 256, problem.query[0].device
    whole, rest = divmod(counter.get_total_flops() // (2 * side**2), side)
    square, into = torch.randn(side, side, device=device), torch.empty(side, side, device=device)

    def run() -> Gradients:
        for rows in (*(side,) * whole, rest):
            torch.mm(square[:rows], square, out=into[:rows])
        return (into,)

    return run


def _start(problem: Problem, count: int) -> list[Tensor]:
    return [x.detach().expand(count, *x.shape).contiguous().requires_grad_() for x in problem.initial.values()]


def _rollout(problem: Problem, start: list[Tensor], support: Data) -> list[Tensor]:
    losses, now = _vmapped(problem, lambda params, data: problem.inner(params, {}, data), len(start[0])), start
    for _ in range(problem.steps):
        gradients = torch.autograd.grad(losses(*now, *support).sum(), now, create_graph=True)
        now = [x - problem.lr * g for x, g in zip(now, gradients, strict=True)]
    return now


def _vmapped(problem: Problem, loss: Callable[..., Tensor], count: int) -> Callable[..., Tensor]:
    names = list(problem.initial)

    def of_leaves(*leaves: Tensor) -> Tensor:
        return loss(dict(zip(names, leaves, strict=False)), leaves[len(names) :])

    return transforms.vmap(of_leaves, [(0,) * (len(names) + len(problem.support))], [count], ["error"])
