"""Binomial and Krylov of order 3 on W1 with 100 steps and 4 tasks, beside exact estimators: what a shallower one saves.

The step size is small, so that the series means something here; its cost does not depend on it.
"""

from __future__ import annotations

import dataclasses
import functools

from benchmarks import methods, ours
from benchmarks.measure import Cell, Method, Prepared, Role, Size
from benchmarks.peers import jax, jax_losses
from benchmarks.problem import Gradients, Problem
from benchmarks.workloads.sinusoid import JAX, problem
from diffopt.estimators import Binomial, Estimator, Krylov


def biased(name: str, estimator: Estimator) -> Method:
    return Method(f"ours, {name}", Role.BIASED, lambda problem: ours.vmapped(problem, estimator))


def compiled(name: str, estimator: Estimator) -> tuple[Method, Method]:
    """The same as two programs within plain code, and with the outer loss as one."""

    def drop_in(problem: Problem) -> Gradients:
        return ours.vmapped(problem, estimator, compiled=True)

    program = Prepared(lambda problem: ours.program(problem, estimator))
    return (
        Method(f"ours, {name}, compile=True", Role.BIASED, drop_in, compiles=True),
        Method(f"ours, {name}, compiled program", Role.BIASED, program, compiles=True),
    )


BY_JAX = dataclasses.replace(
    methods.jax_method("JAX, Binomial(3)", jax.binomial(jax_losses.Waves(), 3)), role=Role.BIASED_PEER
)


def cells(size: Size) -> list[Cell]:
    steps, tasks = (6, 2) if size is Size.SMOKE else (100, 4)
    ways = (
        methods.PLAIN_LOOP,
        *JAX,
        *methods.OURS_VMAPPED,
        *(methods.PROGRAM, methods.COMPILED),
        biased("Binomial(3)", Binomial(3)),
        *compiled("Binomial(3)", Binomial(3)),
        biased("Binomial(3), chunks of 10", Binomial(3, chunk_size=10)),
        BY_JAX,
        biased("Krylov(3)", Krylov(3)),
        *compiled("Krylov(3)", Krylov(3)),
    )
    make = functools.partial(problem, steps=steps, lr=1e-5)
    return [Cell("Binomial", f"T={steps} B={tasks}", make, ways, tasks, seconds=20 if size is Size.FULL else 0)]
