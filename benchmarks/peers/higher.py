"""``higher``: a patched module and a differentiable copy of a ``torch.optim`` optimizer."""

from __future__ import annotations

import higher
import torch

from benchmarks.peers.modules import Holder
from benchmarks.problem import Gradients, MeanGradient, Problem


def innerloop(problem: Problem) -> Gradients:
    module, hyper = Holder(problem.initial), problem.fresh()[1]
    mean = MeanGradient(list(hyper.values()) or list(module.parameters()), problem.count)
    optimizer = torch.optim.SGD(module.parameters(), lr=problem.lr, momentum=problem.momentum)
    for support, query in problem.tasks():
        with higher.innerloop_ctx(module, optimizer, copy_initial_weights=False) as (functional, differentiable):
            for _ in range(problem.steps):
                differentiable.step(functional(problem.inner, hyper, support))
            mean.add(functional(problem.outer, query))
    return mean.result()
