"""The library, called as a user would call it: all tasks at once, in chunks, or one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap

import diffopt
from benchmarks.problem import Data, Gradients, MeanGradient, Params, Problem
from diffopt.estimators import Estimator, Reverse
from diffopt.linear_solve import ConjugateGradient

EXACT = Reverse()


def adapt(
    problem: Problem, initial: Params, hyper: Params, support: Data, estimator: Estimator, *, compiled: bool = False
) -> Params:
    """The params of one task at the end of the inner loop."""
    return diffopt.solve(
        problem.inner,
        initial,
        hyper,
        support,
        optimizer=diffopt.SGD(problem.lr, momentum=problem.momentum),
        steps=problem.steps,
        estimator=estimator,
        compile=compiled,
    ).params


def vmapped(problem: Problem, estimator: Estimator, *, compiled: bool = False) -> Gradients:
    """All tasks in one ``vmap``, inner loop and outer loss alike."""
    initial, hyper, leaves = problem.fresh()

    def task_loss(support: Data, query: Data) -> Tensor:
        return problem.outer(adapt(problem, initial, hyper, support, estimator, compiled=compiled), query)

    return torch.autograd.grad(vmap(task_loss)(problem.support, problem.query).mean(), leaves)


def program(problem: Problem, rule: Estimator = EXACT) -> Callable[[], Gradients]:
    """All of it in one program, whose gradient is taken as its users take it."""

    def outer(wanted: Params, given: Params, support: Data, query: Data) -> Tensor:
        initial, hyper = (given, wanted) if problem.hyper else (wanted, {})

        def task_loss(support: Data, query: Data) -> Tensor:
            return problem.outer(adapt(problem, initial, hyper, support, rule), query)

        if problem.count == 1:
            return task_loss(tuple(x[0] for x in support), tuple(x[0] for x in query))
        return vmap(task_loss)(support, query).mean()

    made, wanted = diffopt.compiled(outer), problem.hyper or problem.initial
    given = problem.initial if problem.hyper else {}
    return lambda: tuple(made.value_and_grad(wanted, given, problem.support, problem.query)[1].values())


def looped(problem: Problem, estimator: Estimator, *, compiled: bool = False) -> Gradients:
    """One task after the other."""
    initial, hyper, leaves = problem.fresh()
    mean = MeanGradient(leaves, problem.count)
    for support, query in problem.tasks():
        start = initial if problem.hyper == {} else problem.initial
        params = adapt(problem, start, hyper, support, estimator, compiled=compiled)
        mean.add(problem.outer(params, query))
    return mean.result()


def chunked(problem: Problem, estimator: Estimator, chunk: int) -> Gradients:
    """The inner loops of ``chunk`` tasks at a time in one ``vmap``; the outer losses, on larger batches, one by one."""
    initial, hyper, leaves = problem.fresh()
    total = [torch.zeros_like(x) for x in leaves]
    for start in range(0, problem.count, chunk):
        part = dataclasses.replace(
            problem,
            support=tuple(x[start : start + chunk] for x in problem.support),
            query=tuple(x[start : start + chunk] for x in problem.query),
        )
        adapted = vmap(lambda support: adapt(problem, initial, hyper, support, estimator))(part.support)
        cotangents = []
        for i, (_, query) in enumerate(part.tasks()):
            params = {name: p[i].detach().requires_grad_() for name, p in adapted.items()}
            cotangents.append(torch.autograd.grad(problem.outer(params, query), list(params.values())))
        stacked = [torch.stack(column) for column in zip(*cotangents, strict=True)]
        gradients = torch.autograd.grad(list(adapted.values()), leaves, stacked)
        torch._foreach_add_(total, gradients, alpha=1 / problem.count)
    return tuple(total)


def conjugate_gradient(problem: Problem, iterations: int) -> Gradients:
    """Implicit differentiation at the given solution, ``problem.initial``."""
    _, hyper, leaves = problem.fresh()
    mean = MeanGradient(leaves, problem.count)
    for support, query in problem.tasks():
        mean.add(_at_solution(problem, problem.initial, hyper, support, query, iterations))
    return mean.result()


def conjugate_gradient_program(problem: Problem, iterations: int) -> Callable[[], Gradients]:
    """The same as one program, of the only task."""

    def outer(hyper: Params, initial: Params, support: Data, query: Data) -> Tensor:
        return _at_solution(problem, initial, hyper, support, query, iterations)

    made, (support, query) = diffopt.compiled(outer), next(problem.tasks())
    return lambda: tuple(made.value_and_grad(problem.hyper, problem.initial, support, query)[1].values())


def _at_solution(
    problem: Problem, initial: Params, hyper: Params, support: Data, query: Data, iterations: int
) -> Tensor:
    solver = ConjugateGradient(max_iterations=iterations, rtol=0.0, throw=False)
    params = diffopt.implicit(problem.inner, initial, hyper, support, solver=solver, stationarity=None)
    return problem.outer(params, query)
