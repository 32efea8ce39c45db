"""The pattern of learn2learn's ``MAML``, in a few lines: clone the module, adapt the clone in place, backward."""

from __future__ import annotations

import torch

from benchmarks.peers.modules import Holder
from benchmarks.problem import Gradients, MeanGradient, Problem


def clone(module: Holder) -> Holder:
    """A module whose parameters are differentiable copies."""
    copy = module.__new__(type(module))
    copy.__dict__ = module.__dict__.copy()
    copy._parameters = {name: p.clone() for name, p in module._parameters.items() if p is not None}  # type: ignore[misc]
    return copy


def adapt(problem: Problem) -> Gradients:
    """Without momentum and for the initial parameters only, as there."""
    module = Holder(problem.initial)
    mean = MeanGradient(list(module.parameters()), problem.count)
    for support, query in problem.tasks():
        learner = clone(module)
        for _ in range(problem.steps):
            loss = learner(problem.inner, {}, support)
            old = [getattr(learner, name) for name in learner.names]
            gradients = torch.autograd.grad(loss, old, create_graph=True)
            new = (p - problem.lr * g for p, g in zip(old, gradients, strict=True))
            learner._parameters = dict(zip(learner.names, new, strict=True))  # type: ignore[assignment]
        mean.add(learner(problem.outer, query))
    return mean.result()
