"""JAX, as its users write it: ``jit`` of ``value_and_grad`` of ``vmap`` of ``scan``, with and without ``checkpoint``.

An optional peer: without JAX (``pip install -e '.[bench-jax]'``) its rows say so. It runs beside torch in one process,
so that both have the same rounds; its arrays stay its own, and what it is given is carried over once.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.problem import Problem

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else it takes most of a GPU's memory at once


class Losses(Protocol):
    """A problem's two losses in JAX."""

    def inner(self, params: Any, hyper: Any, support: Any) -> Any:
        """The inner loss of one task."""
        ...

    def outer(self, params: Any, query: Any) -> Any:
        """The outer loss of one task."""
        ...


class Program:
    """The hypergradient of one problem, compiled at the first call."""

    def __init__(self, problem: Problem, outer: Callable[..., Any], *, alone: bool = False) -> None:
        """``outer(wanted, initial, hyper, support, query)`` is the mean loss; ``alone``: of one task, called for each.

        ``wanted`` are the hyperparameters, or the initial params where there are none.
        """
        import jax

        self._jax: Any = jax
        self._names = list(problem.hyper or problem.initial)
        first = next(iter(problem.initial.values()))
        self._wide = first.dtype is torch.float64
        self._device = jax.devices("cpu" if first.device.type == "cpu" else "gpu")[0]
        with self._jax.enable_x64(self._wide):
            given = (problem.hyper or problem.initial, problem.initial, problem.hyper)
            common = jax.tree.map(self._carried, given)
            data = list(problem.tasks()) if alone else [(problem.support, problem.query)]
            self._given = [(*common, *jax.tree.map(self._carried, pair)) for pair in data]
            self._call = jax.jit(jax.value_and_grad(outer))

    def _carried(self, x: Tensor) -> Any:
        return self._jax.device_put(x.cpu().numpy(), self._device)

    def __call__(self) -> Sequence[Any]:
        """The gradient, once it is there."""
        with self._jax.enable_x64(self._wide):
            found = [self._call(*given)[1] for given in self._given]
            total = found[0] if len(found) == 1 else self._jax.tree.map(lambda *each: sum(each) / len(each), *found)
            self._jax.block_until_ready(total)
        return [total[name] for name in self._names]

    def bytes(self) -> int:
        """What XLA plans to hold at once beside the arguments, its answer included."""
        with self._jax.enable_x64(self._wide):
            plan = self._call.lower(*self._given[0]).compile().memory_analysis()
        return int(plan.temp_size_in_bytes + plan.output_size_in_bytes)


def unrolled(losses: Losses, *, remat: bool = False, alone: bool = False) -> Callable[[Problem], Program]:
    """Through the steps: ``scan`` of them under one ``vmap`` of all tasks.

    ``alone``: one task after the other, its steps written out. XLA's convolutions on a CPU are three to four times
    slower within its loops, and slower still where a ``vmap`` has grouped them.
    """

    def make(problem: Problem) -> Program:
        import jax

        def of_task(wanted: Any, initial: Any, hyper: Any, support: Any, query: Any) -> Any:
            params, hypers = (initial, wanted) if hyper else (wanted, hyper)
            step = _step(problem, losses, hypers, support)
            state = (params, jax.tree.map(jax.numpy.zeros_like, params) if problem.momentum else None)
            if alone:
                for _ in range(problem.steps):
                    state, _ = step(state, None)
            else:
                state, _ = jax.lax.scan(jax.checkpoint(step) if remat else step, state, None, length=problem.steps)
            return losses.outer(state[0], query)

        def of_all(wanted: Any, initial: Any, hyper: Any, support: Any, query: Any) -> Any:
            if problem.count == 1:
                return of_task(wanted, initial, hyper, *jax.tree.map(lambda x: x[0], (support, query)))
            return jax.vmap(of_task, (None, None, None, 0, 0))(wanted, initial, hyper, support, query).mean()

        return Program(problem, of_task if alone else of_all, alone=alone)

    return make


def binomial(losses: Losses, order: int) -> Callable[[Problem], Program]:
    """Formula (3.4) for the initial params under plain gradient descent: for each order one batch of products."""

    def make(problem: Problem) -> Program:
        import jax

        of_each = jax.tree.map

        def of_task(start: Any, support: Any, query: Any) -> Any:
            def gradient(params: Any) -> Any:
                return jax.grad(losses.inner)(params, {}, support)

            def step(now: Any, _: Any) -> Any:
                return of_each(lambda p, g: p - problem.lr * g, now, gradient(now)), now

            end, states = jax.lax.scan(step, start, None, length=problem.steps)
            found = jax.grad(losses.outer)(end, query)
            adjoints = of_each(lambda g: jax.numpy.broadcast_to(g, (problem.steps, *g.shape)), found)
            for _ in range(order):
                products = jax.vmap(lambda at, v: jax.jvp(gradient, (at,), (v,))[1])(states, adjoints)
                sums = of_each(lambda h: -problem.lr * jax.numpy.cumsum(h[::-1], 0)[::-1], products)
                found = of_each(lambda total, x: total + x[0], found, sums)
                adjoints = of_each(lambda x: jax.numpy.concatenate([x[1:], 0 * x[:1]]), sums)
            return found

        def with_that_gradient(wanted: Any, initial: Any, hyper: Any, support: Any, query: Any) -> Any:
            found = jax.vmap(of_task, (None, 0, 0))(wanted, support, query)
            terms = of_each(lambda g, x: (jax.lax.stop_gradient(g.mean(0)) * x).sum(), found, wanted)
            return sum(jax.tree.leaves(terms))

        return Program(problem, with_that_gradient)

    return make


def _step(problem: Problem, losses: Losses, hyper: Any, support: Any) -> Callable[..., Any]:
    """One step of SGD."""
    import jax

    def step(state: Any, _: Any) -> Any:
        now, velocity = state
        move = jax.grad(losses.inner)(now, hyper, support)
        if problem.momentum:
            move = velocity = jax.tree.map(lambda v, g: problem.momentum * v + g, velocity, move)
        return (jax.tree.map(lambda p, g: p - problem.lr * g, now, move), velocity), None

    return step


def implicit(losses: Losses, iterations: int) -> Callable[[Problem], Program]:
    """JAXopt's ``custom_root`` at the given solution, with its conjugate gradients."""

    def make(problem: Problem) -> Program:
        import jax

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # nobody keeps it up any more
            from jaxopt.implicit_diff import custom_root
            from jaxopt.linear_solve import solve_cg

        def solve(matvec: Any, right: Any, **options: Any) -> Any:
            return solve_cg(matvec, right, tol=0.0, maxiter=iterations, **options)

        def mean_loss(wanted: Any, initial: Any, hyper: Any, support: Any, query: Any) -> Any:
            own, other = jax.tree.map(lambda x: x[0], (support, query))
            found = custom_root(jax.grad(losses.inner), solve=solve)(lambda params, hyper, data: params)
            return losses.outer(found(initial, wanted, own), other)

        return Program(problem, mean_loss)

    return make
