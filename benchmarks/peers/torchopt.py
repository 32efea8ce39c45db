"""TorchOpt: its differentiable optimizer for modules, its functional one, and its implicit differentiation."""

from __future__ import annotations

from typing import Any

import torch
import torchopt

from benchmarks.peers.modules import Holder
from benchmarks.problem import Data, Gradients, MeanGradient, Problem


def meta_sgd(problem: Problem) -> Gradients:
    """``MetaSGD`` moves a module's parameters along; its state is put back after every task."""
    module, hyper = Holder(problem.initial), problem.fresh()[1]
    mean = MeanGradient(list(hyper.values()) or list(module.parameters()), problem.count)
    optimizer = torchopt.MetaSGD(module, lr=problem.lr, momentum=problem.momentum)
    owners: tuple[Any, ...] = (module, optimizer)
    states = [torchopt.extract_state_dict(owner, by="reference", detach_buffers=True) for owner in owners]
    for support, query in problem.tasks():
        for _ in range(problem.steps):
            optimizer.step(module(problem.inner, hyper, support))
        mean.add(module(problem.outer, query))
        for owner, state in zip(owners, states, strict=True):
            torchopt.recover_state_dict(owner, state)
    return mean.result()


def functional(problem: Problem) -> Gradients:
    """``FuncOptimizer`` on dictionaries of tensors."""
    initial, hyper, leaves = problem.fresh()
    mean = MeanGradient(leaves, problem.count)
    for support, query in problem.tasks():
        optimizer = torchopt.FuncOptimizer(torchopt.sgd(lr=problem.lr, momentum=problem.momentum))
        params = initial
        for _ in range(problem.steps):
            params = optimizer.step(problem.inner(params, hyper, support), params)
        mean.add(problem.outer(params, query))
    return mean.result()


def conjugate_gradient(problem: Problem, iterations: int) -> Gradients:
    """``custom_root`` at the given solution, ``problem.initial``; its arguments have to be tuples of tensors."""
    _, hyper, leaves = problem.fresh()
    mean = MeanGradient(leaves, problem.count)
    for support, query in problem.tasks():

        def gradient(params: Gradients, hypers: Gradients, support: Data = support) -> Gradients:
            named = dict(zip(problem.hyper, hypers, strict=True))
            loss = torch.func.grad(lambda p: problem.inner(dict(zip(problem.initial, p, strict=True)), named, support))
            return loss(params)

        solver = torchopt.linear_solve.solve_cg(maxiter=iterations, rtol=0.0, atol=0.0)
        attach: Any = torchopt.diff.implicit.custom_root(gradient, argnums=1, solve=solver)
        params = attach(lambda params, hypers: params)(tuple(problem.initial.values()), tuple(hyper.values()))
        mean.add(problem.outer(dict(zip(problem.initial, params, strict=True)), query))
    return mean.result()
