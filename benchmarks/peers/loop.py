"""Plain autograd through the unrolled loop, one task after the other: the reference for every answer."""

from __future__ import annotations

import torch

from benchmarks.problem import Gradients, MeanGradient, Problem


def unroll(problem: Problem) -> Gradients:
    initial, hyper, leaves = problem.fresh()
    mean = MeanGradient(leaves, problem.count)
    for support, query in problem.tasks():
        params, velocity = initial, None
        for _ in range(problem.steps):
            loss = problem.inner(params, hyper, support)
            direction = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            if problem.momentum:
                old = direction if velocity is None else velocity
                scale = 0 if velocity is None else problem.momentum
                velocity = direction = tuple(scale * v + g for v, g in zip(old, direction, strict=True))
            params = {name: p - problem.lr * d for (name, p), d in zip(params.items(), direction, strict=True)}
        mean.add(problem.outer(params, query))
    return mean.result()
